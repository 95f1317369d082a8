"""Activation checkpointing of the encoders' blocks: it needs less memory and more computation."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_clip.errors import require
from lit_clip.training.activation_checkpointing import checkpoint_encoders


class ActivationCheckpointing(Callback):
    """Keep only each block's inputs, and compute its activations again in the backward pass.

    Far less memory for a third more arithmetic, and the same numbers.

    Args:
        share: of each encoder's blocks, starting with the first; 1 for all.
    """

    changes_model = True  # before others measure it

    def __init__(self, share: float = 1.0) -> None:
        require(0 < share <= 1, f"ActivationCheckpointing.share: {share} must be above 0 and at most 1")
        self.share = share

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        if stage == "fit":
            checkpoint_encoders(model, self.share)
