"""One command per file: each is a function, and its signature is its command line."""
