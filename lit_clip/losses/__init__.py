"""The losses, each with one definition; their tiled and distributed form, and which pairs are duplicates."""
