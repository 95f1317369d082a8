"""Small things with one job each, which know nothing of CLIP: hashing, HTML, hardware, messages, processes."""
