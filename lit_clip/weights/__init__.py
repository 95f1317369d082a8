"""Weights in files: sources and the hub, loading, other libraries' formats, export, model card."""
