"""Encode texts, images and image files from one list, in this process; for :meth:`lit_clip.CLIP.encode`."""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.tools.images import SUFFIXES, image_for_model

Item = str | os.PathLike[str] | Image.Image
"""A text, an image file or an image."""


def encode_items(model: Any, items: Item | Sequence[Item], batch_size: int) -> Tensor:
    """Implement :meth:`lit_clip.CLIP.encode`; items -> float32 ``[N, D]`` on the CPU, a single item -> ``[D]``."""
    single = isinstance(items, str | os.PathLike | Image.Image)
    items = [items] if single else items
    require(batch_size >= 1, f"batch_size: {batch_size} must be at least 1")
    found: list[Any] = [_image_or_text(i, item) for i, item in enumerate(items)]
    result = torch.zeros(len(found), model.config.embed_dim)
    texts = [i for i, item in enumerate(found) if isinstance(item, str)]
    images = [i for i, item in enumerate(found) if not isinstance(item, str)]
    with torch.no_grad(), evaluation_mode(model):
        for rows, encode in ((texts, _texts), (images, _images)):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                result[batch] = encode(model, [found[i] for i in batch]).float().cpu()
    return result[0] if single else result


def _image_or_text(i: int, item: Any) -> str | Path | Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, os.PathLike):
        return Path(item)
    if not isinstance(item, str):
        kind = f"{type(item).__module__}.{type(item).__name__}".removeprefix("builtins.")
        raise InputError(f"encode: item {i} is a {kind}; it must be a text, a PIL image or the path of an image file")
    if not item.lower().endswith(tuple(SUFFIXES)):
        return item
    with suppress(OSError, ValueError):  # too long for a path, or holds a null character
        if Path(item).is_file():
            return Path(item)
    if len(item.split()) > 1:
        return item
    # A caption may be a file name; a mistyped path must not become one in silence.
    message = f"encode: {item!r} is no file here and is encoded as a text; pass a Path for files"
    warnings.warn(message, stacklevel=_callers_level())
    return item


def _callers_level() -> int:
    """Return a warning's ``stacklevel`` that points to the line that called lit-clip."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == "lit_clip":
        frame, level = frame.f_back, level + 1
    return level


def _texts(model: Any, texts: list[str]) -> Tensor:
    tokens = model.tokenize(texts)
    lengths = model.tokenizer.lengths(tokens).tolist()
    return model.encode_text(model.tokenizer.trim(tokens).to(model.device), normalize=True, lengths=lengths)


def _images(model: Any, images: list[Path | Image.Image]) -> Tensor:
    opened = (image_for_model(image) if isinstance(image, Path) else image for image in images)
    pixels = torch.stack([model.preprocess(image) for image in opened])
    # In the weights' precision, which need not be float32.
    weights = next(model.visual.parameters(), model.logit_scale)
    return model.encode_image(pixels.to(model.device, weights.dtype), normalize=True)


def as_features(model: Any, items: Any, batch_size: int) -> Tensor:
    """Return unit features ``[N, D]`` of items, or the given features, on the CPU in float32."""
    if not isinstance(items, Tensor | np.ndarray):
        features = model.encode(items, batch_size)
    else:
        features = torch.as_tensor(items).detach().float().cpu()
        features = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    features = features[None] if features.ndim == 1 else features
    dim = model.config.embed_dim
    require(
        features.ndim == 2 and features.shape[1] == dim,
        f"similarity: features are {list(features.shape)}, this model's are [N, {dim}]",
    )
    return features
