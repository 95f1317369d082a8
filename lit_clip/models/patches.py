"""Images as sequences of patches, in their own aspect ratio (NaFlex, Tschannen et al. 2025).

An image is one tensor ``[1 + N, 3PP]`` for a budget of N patches of P x P pixels. Its first row begins with the height
and the width of the grid of patches, two bytes each; below are the patches, row by row, each ``[P, P, 3]`` flattened,
and zeros up to the budget. Anything that handles a batch of images handles these: they are uint8 and stack.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from lit_clip.models.config import Preprocessing
from lit_clip.models.transformer import is_traced

LEAST_SCALE, LARGEST_SCALE, PRECISION = 1e-6, 100.0, 1e-5  # of the search, as in transformers: sizes must be the same


class Patches(NamedTuple):
    """The patches of a batch, as timm's NaFlexVit reads them."""

    patches: Tensor  # [B, N, 3PP]
    patch_coord: Tensor  # int64 [B, N, 2], row and column in the grid; 0 for padding
    patch_valid: Tensor  # bool [B, N], false for padding


@lru_cache(maxsize=4096)
def grid_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Return rows and columns of the largest patch grid with an image's aspect ratio within the budget."""

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows, columns

    low, high = LEAST_SCALE, LARGEST_SCALE
    while high - low >= PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(grid(middle)) <= max_patches else (low, middle)
    return grid(low)


def sequence_size(height: int, width: int, config: Preprocessing) -> tuple[int, int]:
    """Return the height and width in pixels to resize an image to."""
    assert config.patch_size
    assert config.max_patches
    rows, columns = grid_size(height, width, config.patch_size, config.max_patches)
    return rows * config.patch_size, columns * config.patch_size


def patch_sequence(image: Any, config: Preprocessing) -> Tensor:
    """Resize an RGB image, PIL or uint8 ``[3, H, W]``, and cut it into patches: uint8 ``[1 + N, 3PP]``."""
    height, width = TF.get_size(image)
    size = sequence_size(height, width, config)
    image = TF.resize(image, list(size), InterpolationMode(config.interpolation))
    pixels = TF.pil_to_tensor(image) if isinstance(image, Image.Image) else image
    P, N = config.patch_size, config.max_patches
    assert P
    assert N
    rows, columns = size[0] // P, size[1] // P
    patches = pixels.view(3, rows, P, columns, P).permute(1, 3, 2, 4, 0).reshape(rows * columns, 3 * P * P)
    header = torch.zeros(1, 3 * P * P, dtype=torch.uint8)
    header[0, :4] = torch.tensor([*divmod(rows, 256), *divmod(columns, 256)], dtype=torch.uint8)
    return torch.cat([header, F.pad(patches, (0, 0, 0, N - len(patches)))])


def as_image(pixels: Tensor) -> Tensor:
    """Join the patches of uint8 ``[1 + N, 3PP]`` to ``[3, H, W]``; return ``[3, H, W]`` unchanged."""
    if pixels.ndim == 3:
        return pixels
    high, low, more, less = pixels[0, :4].tolist()
    rows, columns, P = 256 * high + low, 256 * more + less, math.isqrt(pixels.shape[1] // 3)
    patches = pixels[1 : 1 + rows * columns].reshape(rows, columns, P, P, 3)
    return patches.permute(4, 0, 2, 1, 3).reshape(3, rows * P, columns * P)


def unpacked(images: Tensor) -> Patches:
    """Split ``[B, 1 + N, 3PP]``; on a CPU, where reading values is free, drop columns that are only padding.

    A blank image of zeros, first row included, is one row of N patches.
    """
    grid = images[:, 0, :4].float()  # bytes are exact in 16 bits too
    N = images.shape[1] - 1
    rows, columns = (grid[:, i] * 256 + grid[:, i + 1] for i in (0, 2))  # [B]
    rows, columns = rows.clamp(min=1)[:, None], torch.where(columns > 0, columns, N)[:, None]  # [B, 1]
    place = torch.arange(N, device=images.device, dtype=torch.float32)  # [N]
    valid = place < rows * columns  # [B, N]
    row = torch.div(place, columns, rounding_mode="floor")
    coord = (torch.stack([row, place - row * columns], dim=2) * valid[:, :, None]).long()
    patches = images[:, 1:]
    if images.device.type == "cpu" and len(images) and not is_traced():
        N = int(valid.sum(dim=1).max())
    return Patches(patches[:, :N], coord[:, :N], valid[:, :N])
