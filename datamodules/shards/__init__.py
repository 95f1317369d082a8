"""Pairs in tar shards: locate, index, order, read and write them."""
