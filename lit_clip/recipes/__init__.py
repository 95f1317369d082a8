"""Recipes: what chooses settings of ``fit`` from the data, see :class:`Recipe`."""

from lit_clip.recipes.pretrained_encoders import PretrainedEncoders
from lit_clip.recipes.recipe import Choice, Facts, Recipe, Run

__all__ = ["Choice", "Facts", "PretrainedEncoders", "Recipe", "Run"]
