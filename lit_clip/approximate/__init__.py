"""Approximate search in millions of features: a graph (HNSW) of usearch in a file beside the feature files."""

from lit_clip.approximate.approximate_index import ApproximateIndex, add_to_index, open_index

__all__ = ["ApproximateIndex", "add_to_index", "open_index"]
