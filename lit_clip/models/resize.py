"""Adapt weights to another image size or context length."""

import dataclasses
import math

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceImageConfig,
    Size,
    TextConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    height_width,
)
from lit_clip.models.custom_config import CustomEncoderConfig
from lit_clip.models.external import TimmImageEncoder, resized_trunk
from lit_clip.models.transformer import resample_positions

KEPT_POSITIONS = 20  # of a text: Long-CLIP's count of the positions that CLIP's short captions have trained well


def resized(config: CLIPConfig, image_size: Size | None, context_length: int | None) -> CLIPConfig:
    """Return the architecture with other sizes; None keeps a size."""
    image, text, preprocessing = config.image, config.text, config.preprocessing
    assert preprocessing is not None
    if image_size is not None and height_width(image_size) != height_width(preprocessing.image_size):
        _not_custom(image, "image_size")
        if preprocessing.max_patches is not None and (patch := preprocessing.patch_size) is not None:
            patches = math.prod(side // patch for side in height_width(image_size))
            require(patches > 0, f"image_size: {image_size} holds no patch of {patch} pixels")
            preprocessing = dataclasses.replace(preprocessing, max_patches=patches)
            image_size = preprocessing.image_size
        image = dataclasses.replace(image, image_size=image_size)
        preprocessing = dataclasses.replace(preprocessing, image_size=image_size)
    if context_length is not None and context_length != text.context_length:
        shorter = context_length < text.context_length or getattr(text, "pool", None) == "class"
        why = "this text encoder attends to padding too, so another length would change the features"
        known = f"context_length: must be the weights' {text.context_length}"
        require(not (shorter and reads_padding(text)), f"{known}, not {context_length}; {why}")
        _not_custom(text, "context_length")
        text = dataclasses.replace(text, context_length=context_length)
    return dataclasses.replace(config, image=image, text=text, preprocessing=preprocessing)


def reads_padding(text: TextConfig) -> bool:
    """Return whether the features of every text depend on the context length (SigLIP)."""
    return isinstance(text, TextTransformerConfig) and text.padding_read > 0


def _not_custom(tower: object, size: str) -> None:
    if isinstance(tower, HuggingFaceImageConfig):
        raise InputError(f"{size}: transformers' {tower.model['model_type']} keeps the weights' {tower.image_size}")
    if isinstance(tower, CustomEncoderConfig):
        raise InputError(f"{size}: {tower.class_path} chooses its own; set it with architecture's init_args")


def resize_weights(state: dict[str, Tensor], old: CLIPConfig, new: CLIPConfig) -> dict[str, Tensor]:
    """Adapt weights of the architecture ``old`` to ``new``, which comes from :func:`resized`.

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
