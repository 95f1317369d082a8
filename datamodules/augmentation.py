"""What happens to a picture in training."""

from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from lit_clip.config import Preprocessing, Size, height_width
from lit_clip.errors import require
from lit_clip.preprocess import to_rgb


class RandomSquareCrop(v2.Transform):
    """A square from a random place of the picture, resized.

    torchvision's RandomResizedCrop measures ``scale`` by the whole picture: nine tenths of a photograph's area fit into
    no square, and it then falls back on the centre, always.

    Args:
        size: of the result, pixels: of its side, or height and width (then a rectangle of that shape).
        scale: smallest and largest area of the crop, as a share of the largest square's.
        interpolation: of the resizing.
    """

    def __init__(self, size: Size, scale: tuple[float, float], interpolation: InterpolationMode) -> None:
        super().__init__()
        self.size, self.scale, self.interpolation = height_width(size), scale, interpolation

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = TF.get_size(flat_inputs[0])
        low, high = self.scale
        share, y, x = torch.rand(3).tolist()
        largest = min(height / self.size[0], width / self.size[1]) * (low + (high - low) * share) ** 0.5
        crop = [max(1, round(side * largest)) for side in self.size]
        top, left = round(y * (height - crop[0])), round(x * (width - crop[1]))
        return {"top": top, "left": left, "height": crop[0], "width": crop[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return TF.resized_crop(inpt, **params, size=list(self.size), interpolation=self.interpolation)


@dataclass
class Augmentation:
    """The paper's augmentation is a random square crop of the resized image (section 2.4) and nothing else.

    Attributes:
        crop_scale: smallest and largest share of the picture's largest square that a crop covers (the paper states
            none; open_clip's default is 0.9 to 1 of the whole picture, squashed to a square).
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        grayscale: probability of losing all colour.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"augmentation.crop_scale: {[low, high]} must rise, above 0 and at most 1")
        require(self.color_jitter >= 0, f"augmentation.color_jitter: {self.color_jitter} must be at least 0")
        require(0 <= self.grayscale <= 1, f"augmentation.grayscale: {self.grayscale} is no probability")

    def transform(self, preprocessing: Preprocessing) -> v2.Compose:
        """PIL image -> uint8 ``[3, S, S]``, random by torch's generator."""
        steps: list[v2.Transform] = [
            RandomSquareCrop(preprocessing.image_size, self.crop_scale, InterpolationMode(preprocessing.interpolation)),
            v2.Lambda(to_rgb),  # after the resizing, as in evaluation
        ]
        if self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.grayscale:
            steps.append(v2.RandomGrayscale(self.grayscale))
        return v2.Compose([*steps, v2.PILToTensor()])
