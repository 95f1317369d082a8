"""Cosines of texts at each pixel of an image; for :meth:`lit_clip.CLIP.locate`.

Shapes: N texts, D embedding dimension, T tiles, h x w places, H x W pixels.
"""

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lit_clip.errors import require
from lit_clip.models.encoding import as_features
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.models.preprocess import to_rgb, windowed
from lit_clip.models.size import height_width
from lit_clip.models.transformer import VisionTransformer
from lit_clip.tools.images import image_for_model

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
