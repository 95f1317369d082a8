"""One command per file: each is a function whose signature is its command line."""
