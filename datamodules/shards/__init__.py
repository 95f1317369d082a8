"""Pairs in tar shards: read, indexed, put in order, written."""
