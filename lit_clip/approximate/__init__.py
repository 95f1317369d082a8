"""Approximate search in millions of features: a graph (HNSW) in a file beside the feature files.

``approximate_index.py`` builds, extends, opens and searches one with usearch; ``faiss_files.py`` writes indices for
faiss.
"""

from lit_clip.approximate.approximate_index import ApproximateIndex, add_to_index, open_index

__all__ = ["ApproximateIndex", "add_to_index", "open_index"]
