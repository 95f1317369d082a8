"""Weights from and to files: sources and the hub, loading, the formats of other libraries, export and model card."""
