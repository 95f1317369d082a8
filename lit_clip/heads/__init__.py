"""Class heads from few examples: a small file turns a model into a classifier of your own classes.

``head`` (what is applied, and its file) and ``examples`` (fit one; what more examples would give). How a head is fitted
is in :mod:`lit_clip.evaluation.class_head`.
"""

from lit_clip.heads.examples import Examples, head_from_images
from lit_clip.heads.head import Head, HeadedModel, load_head, save_head

__all__ = ["Examples", "Head", "HeadedModel", "head_from_images", "load_head", "save_head"]
