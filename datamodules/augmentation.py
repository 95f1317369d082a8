"""What happens to a picture in training."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms import v2

from lit_clip.config import Preprocessing, Size, height_width
from lit_clip.errors import require
from lit_clip.preprocess import to_rgb

Interpolation = Literal["bicubic", "bilinear"]

REDUCING_GAP = 2.0  # Pillow averages whole pixels until the filter has this many times the result's to work on


class RandomSquareCrop(v2.Transform):
    """A square from a random place of the picture, resized.

    torchvision's RandomResizedCrop measures ``scale`` by the whole picture: nine tenths of a photograph's area fit into
    no square, and it then falls back on the centre, always.

    Args:
        size: of the result, pixels: of its side, or height and width (then a rectangle of that shape).
        scale: smallest and largest area of the crop, as a share of the largest square's.
        interpolation: of the resizing.
        decode_margin: see :class:`Augmentation`.
    """

    def __init__(
        self, size: Size, scale: tuple[float, float], interpolation: Interpolation, decode_margin: float = 1.0
    ) -> None:
        super().__init__()
        self.size, self.scale, self.decode_margin = height_width(size), scale, decode_margin
        self.filter = Image.Resampling[interpolation.upper()]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.scale
        share, y, x = torch.rand(3).tolist()
        return {"side": (low + (high - low) * share) ** 0.5, "x": x, "y": y}

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Image.Image:
        # In fractions of the picture, not in whole pixels: one that was decoded smaller is cropped at the same place.
        height, width = self.size
        largest = min(inpt.width / width, inpt.height / height) * params["side"]
        left, top = params["x"] * (inpt.width - width * largest), params["y"] * (inpt.height - height * largest)
        right, bottom = min(left + width * largest, inpt.width), min(top + height * largest, inpt.height)
        gap = None if inpt.mode.startswith(("I;", "1", "P")) else REDUCING_GAP  # Pillow cannot average those
        return inpt.resize((width, height), self.filter, (left, top, right, bottom), gap)

    def least_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height at which the smallest crop of a picture has ``decode_margin`` times the result's pixels."""
        rows, columns = self.size
        share = self.decode_margin / (min(width / columns, height / rows) * self.scale[0] ** 0.5)
        return (width, height) if share >= 1 else (math.ceil(width * share), math.ceil(height * share))


@dataclass
class Augmentation:
    """The paper's augmentation is a random square crop of the resized image (section 2.4) and nothing else.

    Attributes:
        crop_scale: smallest and largest share of the picture's largest square that a crop covers (the paper states
            none; open_clip's default is 0.9 to 1 of the whole picture, squashed to a square).
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        grayscale: probability of losing all colour.
        decode_margin: JPEGs are decoded at a half, a quarter or an eighth of their width if the smallest crop then
            still has at least this many times the result's pixels a side: 1 is fastest, at 2 hardly a pixel differs.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    color_jitter: float = 0.0
    grayscale: float = 0.0
    decode_margin: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"augmentation.crop_scale: {[low, high]} must rise, above 0 and at most 1")
        require(self.color_jitter >= 0, f"augmentation.color_jitter: {self.color_jitter} must be at least 0")
        require(self.decode_margin >= 1, f"augmentation.decode_margin: {self.decode_margin} must be at least 1")
        require(0 <= self.grayscale <= 1, f"augmentation.grayscale: {self.grayscale} is no probability")

    def crop(self, preprocessing: Preprocessing) -> RandomSquareCrop:
        """The first step of :meth:`transform`."""
        size, interpolation = preprocessing.image_size, preprocessing.interpolation
        return RandomSquareCrop(size, self.crop_scale, interpolation, self.decode_margin)

    def transform(self, preprocessing: Preprocessing) -> v2.Compose:
        """PIL image -> uint8 ``[3, S, S]``, random by torch's generator."""
        steps: list[v2.Transform] = [
            self.crop(preprocessing),
            v2.Lambda(to_rgb),  # after the resizing, as in evaluation
        ]
        if self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.grayscale:
            steps.append(v2.RandomGrayscale(self.grayscale))
        return v2.Compose([*steps, v2.PILToTensor()])
