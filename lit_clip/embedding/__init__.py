"""Encode images or texts into feature files, and search them."""
