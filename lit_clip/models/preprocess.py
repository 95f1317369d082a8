"""Turn images into pixels: uint8 for the data loaders, normalised float for ``encode_image``."""

import math
import warnings
from functools import partial
from typing import Any

import torch
from numpy import ndarray as Array
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing, height_width
from lit_clip.tools.bands import banded, eight_bit_bands, tiff_bands
from lit_clip.tools.levels import BITS, check_count, eight_bits, levels_of


def to_rgb(image: Any) -> Any:
    """Convert any image to RGB by Pillow's rules: published models were trained on such pixels.

    Transparency is dropped (the colours underneath show), and a camera's rotation flag is ignored. Of 16-bit grey
    levels, which Pillow clips at 255, the highest 8 bits are kept (:func:`lit_clip.tools.levels.eight_bits`).
    """
    if isinstance(image, Tensor):  # bands
        return image
    check_count(image, 3)
    return eight_bits(image).convert("RGB")


def windowed(image: Image.Image, config: Preprocessing) -> Any:
    """Scale deep levels to 8 bits by the model's window, the first step of all preprocessing; check the bands.

    Return a PIL image, or uint8 ``[C, H, W]`` for a model that reads other bands than red, green and blue.
    """
    if config.bands != 3:
        return torch.from_numpy(eight_bit_bands(image, config.bands, config.window).copy()).permute(2, 0, 1)
    if config.window and image.mode == "RGB" and max(getattr(image, "tag_v2", {}).get(BITS, (8,))) > 8:
        image = tiff_bands(image, 3)  # of 16 bits, of which Pillow has read the highest 8
    check_count(image, 3)
    return eight_bits(image, window=config.window)


def with_warning(image: Image.Image | Array, config: Preprocessing) -> Image.Image:
    """Return an image; warn if it has more than 8 bits a level and neither model nor file has a window."""
    if isinstance(image, Array):
        try:
            image = banded(image, "an array [height, width, bands]")
        except ValueError as error:
            raise InputError(f"preprocess: {error}") from error
    levels = levels_of(image) if config.window is None else None
    if levels is not None and not levels.windowed and (levels.bits or 16) > 8:
        warnings.warn(
            "preprocess: levels of more than 8 bits, of which the highest 8 are read: 12 bits in a file of 16 are "
            "nearly black; set model.preprocessing.window, such as [0, 4095], or train with data.window",
            stacklevel=3,
        )
    return image


def _covering(image: Any, crop: tuple[int, int], interpolation: InterpolationMode) -> Any:
    """Resize to the smallest size with the same aspect ratio that covers the crop."""
    height, width = TF.get_size(image)
    ratio = min(height / crop[0], width / crop[1])
    return TF.resize(image, [round(height / ratio), round(width / ratio)], interpolation)


def resize_size(config: Preprocessing) -> int | tuple[int, int]:
    """Return the size before the centre crop: the shorter side for a square, or height and width."""
    height, width = (math.floor(side / config.crop_pct) for side in height_width(config.image_size))
    return height if isinstance(config.image_size, int) and config.resize_mode == "shortest" else (height, width)


def resize_steps(config: Preprocessing) -> list[v2.Transform]:
    """Return the evaluation transforms that resize an image of any size to the model's."""
    interpolation, size = InterpolationMode(config.interpolation), resize_size(config)
    if config.resize_mode == "squash" or isinstance(size, int):
        resize: v2.Transform = v2.Resize(size, interpolation)
    else:
        resize = v2.Lambda(partial(_covering, crop=size, interpolation=interpolation))
    if config.resize_mode == "squash" and config.crop_pct == 1:
        return [resize]
    return [resize, v2.CenterCrop(height_width(config.image_size))]


def pixels(config: Preprocessing) -> v2.Compose:
    """Return the evaluation transform up to the pixels: PIL image -> uint8 of the shape ``config.shape``."""
    first = v2.Lambda(partial(windowed, config=config))  # resizing forgets the range of deep levels
    if config.max_patches is not None:
        from lit_clip.models.patches import patch_sequence

        return v2.Compose([first, v2.Lambda(to_rgb), v2.Lambda(partial(patch_sequence, config=config))])
    # RGB conversion comes last, as in the peers: resizing a palette image picks entries and does not mix colours.
    return v2.Compose([first, *resize_steps(config), v2.Lambda(to_rgb), v2.PILToTensor()])


def image_transform(config: Preprocessing) -> v2.Compose:
    """Return the paper's evaluation transform: PIL image -> float of the shape ``config.shape``, normalised.

    It can be pickled for data workers (``model.preprocess`` would pickle the model too).
    """
    return v2.Compose([pixels(config), v2.Lambda(partial(normalize, config=config))])


def normalize(images: Tensor, config: Preprocessing, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 ``[..., *config.shape]`` -> ``dtype``, normalised in float32 by the model's mean and standard deviation."""
    divisors = [255 * std for std in config.std]
    offsets = [-mean / std for mean, std in zip(config.mean, config.std, strict=True)]
    # Filled on the images' device: torchvision copies the constants there, and each copy waits for the device.
    full = partial(torch.full, (1, 1), dtype=torch.float32, device=images.device)
    divisor, offset = torch.stack([full(x) for x in divisors + offsets]).chunk(2)  # [C, 1, 1]
    result = torch.empty(images.shape, dtype=dtype, device=images.device)
    if config.max_patches is None:
        return torch.addcdiv(offset, images, divisor, out=result)  # one pass over the pixels
    pixels, values = (x.unflatten(-1, (-1, 3)) for x in (images, result))  # NaFlex: [..., 1 + N, PP, 3]
    torch.addcdiv(offset.flatten(), pixels, divisor.flatten(), out=values)
    result[..., 0, :] = images[..., 0, :]  # the grid's size
    return result
