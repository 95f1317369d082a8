"""Augmentation of training images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from lit_clip.errors import require
from lit_clip.models.config import Preprocessing, Size, height_width
from lit_clip.models.preprocess import to_rgb
from lit_clip.tools.images import LeastSize, fraction, full_size

Interpolation = Literal["bicubic", "bilinear"]

REDUCING_GAP = 2.0  # Pillow first averages whole pixels, down to this many times the final size, then filters


class RandomSquareCrop:
    """Crop a square from a random place of the image and resize it with Pillow.

    torchvision's RandomResizedCrop takes ``scale`` as a share of the whole image. No square covers nine tenths of a
    photograph, so it would always fall back on the centre crop.

    The crop has whole pixels of the image decoded at the smallest sufficient fraction of its size; an image decoded at
    full size is cropped at the same place.

    Args:
        size: of the result in pixels: side, or height and width (for a rectangle of that shape).
        scale: smallest and largest area of the crop, as a share of the largest square that fits.
        interpolation: of the resizing.
        decode_margin: see :class:`Augmentation`.
    """

    def __init__(
        self, size: Size, scale: tuple[float, float], interpolation: Interpolation, decode_margin: float = 1.0
    ) -> None:
        self.size, self.scale, self.decode_margin = height_width(size), scale, decode_margin
        self.interpolation: Interpolation = interpolation

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image, self.make_params([image]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.scale
        share, y, x = torch.rand(3).tolist()
        return {"side": (low + (high - low) * share) ** 0.5, "x": x, "y": y}

    def box(self, image: Image.Image, params: dict[str, Any]) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the crop in the decoded image."""
        *size, divided = full_size(image)
        step = fraction((size[0], size[1]), self.least_size(*size))  # in pixels of the file
        assert step % divided == 0, "the image was decoded for another crop"
        (height, width), columns, rows = self.size, size[0] // step, size[1] // step
        largest = min(columns / width, rows / height) * params["side"]
        across, down = max(1, round(width * largest)), max(1, round(height * largest))
        left, top = round(params["x"] * (columns - across)), round(params["y"] * (rows - down))
        pixels = step // divided
        return left * pixels, top * pixels, (left + across) * pixels, (top + down) * pixels

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Any:
        height, width = self.size
        gap = None if inpt.mode.startswith(("I;", "1", "P")) else REDUCING_GAP  # Pillow cannot average those
        return inpt.resize((width, height), Image.Resampling[self.interpolation.upper()], self.box(inpt, params), gap)

    def least_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height at which the smallest crop has ``decode_margin`` times the result's side."""
        rows, columns = self.size
        share = self.decode_margin / (min(width / columns, height / rows) * self.scale[0] ** 0.5)
        return (width, height) if share >= 1 else (math.ceil(width * share), math.ceil(height * share))


class FastSquareCrop(RandomSquareCrop):
    """The same crop as uint8 RGB ``[3, H, W]``, resized by torch: equal to within rounding, in a third of the time."""

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Tensor:
        left, top, right, bottom = box = self.box(inpt, params)
        height, width = self.size
        averaged = min((right - left) / width, (bottom - top) / height) >= 2 * REDUCING_GAP  # Pillow is fast at this
        if inpt.mode != "RGB" or averaged:
            return TF.pil_to_tensor(to_rgb(super().transform(inpt, params)))  # after resizing, as in evaluation
        pixels = torch.from_numpy(np.array(inpt.crop(box))).permute(2, 0, 1)
        return F.interpolate(pixels[None], self.size, mode=self.interpolation, antialias=True)[0]


@dataclass
class Augmentation:
    """Augmentation of training images. The paper uses a random square crop (section 2.4), and nothing else.

    Attributes:
        crop_scale: smallest and largest area of a crop, as a share of the largest square that fits (the paper gives
            none; open_clip's default is 0.9 to 1 of the whole image, squashed to a square).
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        grayscale: probability of converting an image to grey.
        decode_margin: JPEGs are decoded at a half, a quarter or an eighth of their width if the smallest crop is then
            at least this many times as wide as the result. 1 is fastest; at 2 hardly a pixel differs.
        exact: decode JPEGs at full size and resize with Pillow, as other packages do; two to four times slower.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    color_jitter: float = 0.0
    grayscale: float = 0.0
    decode_margin: float = 1.0
    exact: bool = False

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"augmentation.crop_scale: {[low, high]} must be ascending, above 0 and at most 1",
        )
        require(self.color_jitter >= 0, f"augmentation.color_jitter: {self.color_jitter} must be at least 0")
        require(self.decode_margin >= 1, f"augmentation.decode_margin: {self.decode_margin} must be at least 1")
        require(0 <= self.grayscale <= 1, f"augmentation.grayscale: {self.grayscale} must be between 0 and 1")

    def crop(self, preprocessing: Preprocessing) -> RandomSquareCrop:
        """Return the first step of :meth:`transform`."""
        size, interpolation = preprocessing.image_size, preprocessing.interpolation
        kind = RandomSquareCrop if self.exact else FastSquareCrop
        return kind(size, self.crop_scale, interpolation, self.decode_margin)

    def least_size(self, preprocessing: Preprocessing) -> LeastSize | None:
        """Return the size at which :meth:`transform` needs an image; None: its full size."""
        return None if self.exact else self.crop(preprocessing).least_size

    def transform(self, preprocessing: Preprocessing) -> v2.Compose:
        """Return the transform: PIL image -> uint8 ``[3, S, S]``, random by torch's generator."""
        steps: list[Callable[..., Any]] = [self.crop(preprocessing)]
        if self.exact:
            steps.append(v2.Lambda(to_rgb))  # after resizing, as in evaluation
        if self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.grayscale:
            steps.append(v2.RandomGrayscale(self.grayscale))
        return v2.Compose([*steps, v2.PILToTensor()] if self.exact else steps)
