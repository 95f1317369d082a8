"""Recipes: they choose settings of ``fit`` from the data, see :class:`Recipe`."""

from typing import TYPE_CHECKING

from lit_clip.recipes.recipe import Choice, Facts, Recipe, Run
from lit_clip.tools.imports import lazy_names

if TYPE_CHECKING:
    from lit_clip.recipes.pretrained_encoders import PretrainedEncoders
    from lit_clip.recipes.sizes import FineTuning, FromScratch

__all__ = ["Choice", "Facts", "FineTuning", "FromScratch", "PretrainedEncoders", "Recipe", "Run"]

__getattr__ = lazy_names(__name__, __file__)
