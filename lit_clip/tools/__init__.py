"""Small, single-purpose tools that know nothing of CLIP: hashing, HTML, hardware, messages, processes."""
