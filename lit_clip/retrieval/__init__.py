"""Recall and loss over a whole set of pairs, on any number of ranks."""
