"""timm's NaFlexVit for our patch sequences; importing timm takes seconds.

timm resizes the position embedding once for each size of grid, whose sizes it copies from the device: every training
step would wait for the device. Here the same values are one matrix product.
"""

from typing import Any

import torch
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from torch import Tensor, nn

from lit_clip.errors import InputError
from lit_clip.models.patches import unpacked


class _Embeds(NaFlexEmbeds):
    """timm's embeddings, with a bilinear, antialiased position embedding that does not synchronise with the device."""

    def _apply_learned_naflex_pos_embed(self, x: Tensor, patch_coord: Tensor) -> None:
        grid: Any = self.pos_embed  # [1, rows, columns, W]
        sizes = patch_coord.amax(dim=1, keepdim=True) + 1  # [B, 1, 2]
        rows, columns = (
            _weights(patch_coord[:, :, axis], sizes[:, :, axis], grid.shape[1 + axis]) for axis in (0, 1)
        )  # [B, N, rows], [B, N, columns]
        weights = (rows[:, :, :, None] * columns[:, :, None, :]).flatten(2)
        exact = torch.promote_types(grid.dtype, weights.dtype)
        x += (weights.to(exact) @ grid.flatten(0, 2).to(exact)).to(x.dtype)


def _weights(place: Tensor, length: Tensor, cells: int) -> Tensor:
    """Return the weights of a grid's cells at each place along one axis: int64 ``[B, N]`` -> ``[B, N, cells]``.

    They are those of ``F.interpolate(mode="bilinear", antialias=True)`` to ``length``, ``[B, 1]``.
    """
    scale = cells / length  # [B, 1]
    centre = (place + 0.5) * scale - 0.5  # [B, N]
    cell = torch.arange(cells, device=place.device, dtype=torch.float32)
    distance = (cell - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)


def is_naflex(trunk: nn.Module) -> bool:
    """Return whether a timm model reads patch sequences."""
    return isinstance(trunk, NaFlexVit) and bool(trunk.embeds.is_linear and trunk.embeds.channels_last)


def prepare(trunk: nn.Module) -> None:
    """Replace timm's position embedding if ours has equal values, and mask only keys: queries may be padding."""
    assert isinstance(trunk, NaFlexVit)
    embeds, trunk.use_key_only_attn_mask = trunk.embeds, True
    as_ours = embeds.pos_embed_interp_mode == "bilinear" and embeds.pos_embed_antialias
    other = embeds.pos_embed_ar_preserving or embeds.pos_embed_align_corners or embeds.pos_embed_use_grid_sample
    if embeds.pos_embed_type == "learned" and as_ours and not other:
        embeds.__class__ = _Embeds  # timm has no hook for it


def features(trunk: Any, images: Tensor) -> Tensor:
    """``[B, 1 + N, 3PP]`` float, normalised -> ``[B, W]``, for a trunk that :func:`is_naflex`; ignores padding."""
    row = trunk.embeds.proj.in_features
    if images.shape[2] != row:
        raise InputError(f"images are {list(images.shape)}, the model reads [B, 1 + N, {row}]; use model.preprocess")
    return trunk(unpacked(images)._asdict())
