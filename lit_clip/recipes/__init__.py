"""Recipes: they choose settings of ``fit`` from the data, see :class:`Recipe`."""

from lit_clip.recipes.pretrained_encoders import PretrainedEncoders
from lit_clip.recipes.recipe import Choice, Facts, Recipe, Run
from lit_clip.recipes.sizes import FineTuning, FromScratch

__all__ = ["Choice", "Facts", "FineTuning", "FromScratch", "PretrainedEncoders", "Recipe", "Run"]
