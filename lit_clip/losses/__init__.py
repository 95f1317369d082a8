"""Losses: their contract, plain definitions, tiled and distributed forms, combinations, duplicates, distillation."""

from typing import TYPE_CHECKING

from lit_clip.losses.loss import Loss, LossValue, Pairs, WholeBatch
from lit_clip.losses.pairwise import Contrastive, Sigmoid
from lit_clip.tools.imports import lazy_names

if TYPE_CHECKING:
    from lit_clip.losses.combined import Matryoshka, Sum
    from lit_clip.losses.weighted import Alignment, WeightedContrastive

__all__ = [
    "Alignment",
    "Contrastive",
    "Loss",
    "LossValue",
    "Matryoshka",
    "Pairs",
    "Sigmoid",
    "Sum",
    "WeightedContrastive",
    "WholeBatch",
]

__getattr__ = lazy_names(__name__, __file__)
