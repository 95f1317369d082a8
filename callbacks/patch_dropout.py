"""Patch dropout (FLIP, Li et al. 2023): train on part of each image's patches."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_clip.errors import InputError, require
from lit_clip.models.transformer import VisionTransformer


class PatchDropout(Callback):
    """Leave out a share of each image's patches in training steps.

    The image encoder does that much less work, at a cost in accuracy (docs/evidence/performance.md). Only for the
    paper's ViTs; timm's have ``options: {patch_drop_rate: ...}`` of their own.

    Args:
        share: of the patches, at least 0 and below 1.
    """

    changes_model = True  # before others measure it

    def __init__(self, share: float = 0.5) -> None:
        require(0 <= share < 1, f"PatchDropout.share: {share} must be at least 0 and below 1")
        self.share = share

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        if not isinstance(model.visual, VisionTransformer):
            raise InputError(
                f"callbacks.PatchDropout: {type(model.visual).__name__} has no patches; remove the callback"
            )
        model.visual.patch_dropout = self.share
