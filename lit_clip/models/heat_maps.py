"""Features of a list of texts and images, and cosines of texts at each pixel: ``CLIP.encode`` and ``CLIP.locate``.

Shapes: N texts, D embedding dimension, T tiles, h x w places, H x W pixels.
"""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lit_clip.errors import InputError, require
from lit_clip.models.preprocess import to_rgb, windowed
from lit_clip.models.running import evaluation_mode
from lit_clip.models.size import height_width
from lit_clip.models.transformer import VisionTransformer
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


MOST_SCALE = 4
MOST_ELONGATED = 32  # longer to shorter side; a longer side is squashed, or one image could cost hundreds
TILE = 2  # sides of a tile, in the model's image size; neighbours overlap by a quarter
TOGETHER = 8  # tiles encoded at once


def heat_maps(
    model: Any, image: Image.Image | str | os.PathLike[str], texts: str | Sequence[str] | Tensor, scale: float
) -> Tensor:
    """Implement :meth:`lit_clip.CLIP.locate`."""
    require(len(texts) > 0, "locate: no texts given; say what to find")
    opened = image if isinstance(image, Image.Image) else image_for_model(Path(image))
    cosines = place_cosines(model, opened, as_features(model, texts, 64), scale)
    return map_of(cosines, (opened.height, opened.width))


def map_of(cosines: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate cosines at places to a height and width: ``[N, h, w]`` -> ``[N, H, W]``."""
    return F.interpolate(cosines[None], tuple(size), mode="bilinear", antialias=True)[0]


def place_cosines(model: Any, image: Image.Image, features: Tensor, scale: float) -> Tensor:
    """Return cosines of unit features ``[N, D]`` with each place of an image: float32 ``[N, h, w]``, on the CPU."""
    require(1 <= scale <= MOST_SCALE, f"scale: {scale} must be between 1 and {MOST_SCALE}")
    require(model.preprocessing.max_patches is None, "locate: a NaFlex model reads patches; use one that reads images")
    stride = _stride(model.visual)
    with torch.no_grad(), evaluation_mode(model):
        return _tiled(model, _resized(image, model.preprocessing, stride, scale), features, stride)


def _stride(visual: Any) -> int:
    """Return the number of pixels that must divide an image's sides."""
    if isinstance(visual, VisionTransformer):
        return visual.conv1.kernel_size[0]
    if hasattr(visual, "trunk"):
        return int(visual.trunk.feature_info[-1]["reduction"])
    return int(getattr(getattr(visual, "encoder", None), "patch_size", 32))


def _resized(image: Image.Image, preprocessing: Any, stride: int, scale: float) -> Tensor:
    """Resize a whole image to multiples of ``stride`` that cover the model's image size: uint8 ``[3, H, W]``."""
    covered = height_width(preprocessing.image_size)
    ratio = max(side / now for side, now in zip(covered, (image.height, image.width), strict=True))
    longest = MOST_ELONGATED * min(covered)
    sides = (scale * min(longest, now * ratio) for now in (image.height, image.width))
    size = [stride * max(1, round(side / stride)) for side in sides]
    resize = v2.Resize(size, InterpolationMode(preprocessing.interpolation))
    steps = [v2.Lambda(partial(windowed, config=preprocessing)), resize, v2.Lambda(to_rgb), v2.PILToTensor()]
    return v2.Compose(steps)(image)  # RGB conversion comes last, as in preprocessing


def _tiled(model: Any, pixels: Tensor, features: Tensor, stride: int) -> Tensor:
    """Return the cosine of each text with each place, blended from overlapping tiles: float32 ``[N, h, w]``."""
    most = [math.ceil(TILE * side / stride) for side in height_width(model.preprocessing.image_size)]
    grid = [side // stride for side in pixels.shape[1:]]
    height, width = (min(pair) for pair in zip(grid, most, strict=True))
    corners = [(top, left) for top in _starts(grid[0], height) for left in _starts(grid[1], width)]
    total = weight = torch.zeros(())
    for start in range(0, len(corners), TOGETHER):
        part = corners[start : start + TOGETHER]
        windows = [pixels[:, top * stride :, left * stride :] for top, left in part]
        tiles = torch.stack([window[:, : height * stride, : width * stride] for window in windows])
        places = model.encode_patches(model.normalize(tiles.to(model.device)), normalize=True).float()
        cosines = torch.einsum("nd,tdhw->tnhw", features.to(places.device), places).cpu()
        if len(corners) == 1:
            return cosines[0]
        fine = cosines.shape[2] // height  # places in each stride
        tent = _tent(height * fine)[:, None] * _tent(width * fine)
        if start == 0:
            total = torch.zeros(len(features), grid[0] * fine, grid[1] * fine)
            weight = torch.zeros_like(total[0])
        for (top, left), tile in zip(part, cosines, strict=True):
            window = slice(top * fine, (top + height) * fine), slice(left * fine, (left + width) * fine)
            total[:, *window] += tent * tile
            weight[window] += tent
    return total / weight


def _starts(places: int, tile: int) -> list[int]:
    """Return the first places of tiles along one axis, evenly spread; neighbours overlap by at least a quarter."""
    count = 1 + math.ceil((places - tile) / max(1, tile - tile // 4))
    return [round(number * (places - tile) / max(1, count - 1)) for number in range(count)]


def _tent(places: int) -> Tensor:
    """Return the weights of a tile's places along one axis, highest in its middle."""
    centres = torch.arange(places) + 0.5
    return torch.minimum(centres, places - centres)
