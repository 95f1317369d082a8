"""The release number, at the bottom of the import order so that results and model cards can name it."""

__version__ = "0.1.0"
