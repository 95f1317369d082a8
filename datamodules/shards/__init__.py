"""Pairs in tar shards: locating, indexing, ordering, reading and writing them."""
