"""How the encoders run: compiled, checkpointed, or on part of the patches."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.errors import InputError, require
from lit_clip.models.layers import TOWERS, tower_blocks
from lit_clip.models.transformer import VisionTransformer
from lit_clip.training.activation_checkpointing import checkpoint_encoders

MOST_GRAPHS = 64


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


class PatchDropout(Callback):
    """Leave out a share of each image's patches in training steps (FLIP, Li et al. 2023).

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


class Compile(Callback):
    """Compile the blocks of both encoders with ``torch.compile``; parameter names stay.

    The first steps take minutes. Texts of any lengths share a few graphs: the paper's text encoder packs them into rows
    of fixed length. A ``lora`` on attention's inputs breaks the graphs.
    """

    changes_model = True  # before others measure it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        callbacks: Any = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  # set by a connector
        blocks = [block for tower in TOWERS for block in tower_blocks(model, tower)]
        batch_norm = any(isinstance(layer, _BatchNorm) for block in blocks for layer in block.modules())
        require(
            not (batch_norm and any(isinstance(callback, ActivationCheckpointing) for callback in callbacks)),
            "callbacks.Compile: cannot keep BatchNorm's statistics in blocks that callbacks.ActivationCheckpointing "
            "computes again; leave one of the two out",
        )
        compile_blocks(model)


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile each encoder block of a :class:`lit_clip.CLIP`, unless it is already compiled.

    Blocks rather than whole encoders: equal blocks share their graphs, and the code between them may look at the batch.
    """
    # All blocks are one function to torch: of each encoder, with and without gradients, for fixed and for any shapes
    # they are graphs of it, and beyond the limit torch falls back to eager mode.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for tower in TOWERS:
        for block in tower_blocks(model, tower):
            if block._compiled_call_impl is None:
                block.compile(backend=backend)
