"""Adapt weights to another image size or context length."""

import dataclasses

import torch
from torch import Tensor

from lit_clip.models.config import (
    CLIPConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    height_width,
)
from lit_clip.models.registry import KEPT_POSITIONS
from lit_clip.models.transformer import resample_positions


def resize_weights(state: dict[str, Tensor], old: CLIPConfig, new: CLIPConfig) -> dict[str, Tensor]:
    """Adapt weights of the architecture ``old`` to ``new``, which comes from :func:`lit_clip.models.registry.resized`.

    The image encoder's position embedding is interpolated (bicubic, antialiased, as in open_clip and timm). The text
    encoder's is truncated at the end, or :func:`stretched`: features of captions of at most ``KEPT_POSITIONS`` tokens
    stay bit-identical, of longer ones only when the context is shortened. Those of a text encoder that reads padding
    change.
    """
    state = dict(state)
    if new.image != old.image:
        state = _image(state, old, new)
    key = "positional_embedding" if old.papers_layout else "text.positional_embedding"
    if new.text != old.text and isinstance(new.text, TextTransformerConfig):
        positions, length = state[key], new.text.context_length
        state[key] = stretched(positions, length) if length > len(positions) else positions[:length]
    return state


def stretched(position_LW: Tensor, length: int) -> Tensor:
    """Lengthen a position embedding ``[L, W]`` for texts as Long-CLIP does: order and distance keep their meaning.

    The first ``KEPT_POSITIONS``, which short captions have trained well, stay bit-identical. The others are stretched
    by the ratio that fits, (length - kept) / (L - kept), which from 77 to 248 is 4: new position i lies at the old
    position kept + (i - kept) / ratio, interpolated linearly, and on the line through the last two beyond the last
    (Zhang et al. 2024, "Long-CLIP", knowledge-preserved stretching; its code has the ratio 4 alone). Of a table too
    short to keep so many, all but two positions are kept.
    """
    kept = min(KEPT_POSITIONS, len(position_LW) - 2)
    ratio = (length - kept) / (len(position_LW) - kept)
    place = kept + torch.arange(length - kept, dtype=torch.float64) / ratio
    left = place.long().clamp(max=len(position_LW) - 2)  # beyond the last: the line through the last two
    share = (place - left).to(position_LW)[:, None]
    return torch.cat([position_LW[:kept], position_LW[left].lerp(position_LW[left + 1], share)])


def _image(state: dict[str, Tensor], old: CLIPConfig, new: CLIPConfig) -> dict[str, Tensor]:
    if isinstance(new.image, TimmConfig):
        from lit_clip.models.external import TimmImageEncoder, resized_trunk

        trunk = TimmImageEncoder(dataclasses.replace(new.image, pretrained=False), new.embed_dim).trunk
        return resized_trunk(state, trunk, "visual.trunk.")
    key, stride = "visual.attnpool.positional_embedding", 32
    if isinstance(new.image, VisionTransformerConfig):
        key, stride = "visual.positional_embedding", new.image.patch_size
    assert old.image.image_size is not None
    assert new.image.image_size is not None
    (height, width), (new_height, new_width) = height_width(old.image.image_size), height_width(new.image.image_size)
    grids = (height // stride, width // stride), (new_height // stride, new_width // stride)
    state[key] = resample_positions(state[key], *grids)
    return state
