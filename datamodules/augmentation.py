"""What happens to a picture in training."""

from dataclasses import dataclass

from torchvision.transforms import InterpolationMode, v2

from lit_clip.config import Preprocessing
from lit_clip.preprocess import to_rgb


@dataclass
class Augmentation:
    """The paper's augmentation is a random square crop of the resized image (section 2.4) and nothing else.

    Attributes:
        crop_scale: smallest and largest share of the picture's area in the crop (open_clip's default; the paper
            states none).
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        grayscale: probability of losing all colour.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def transform(self, preprocessing: Preprocessing) -> v2.Compose:
        """PIL image -> uint8 ``[3, S, S]``, random by torch's generator."""
        steps: list[v2.Transform] = [
            v2.Lambda(to_rgb),
            v2.RandomResizedCrop(
                preprocessing.image_size,
                scale=self.crop_scale,
                ratio=(1.0, 1.0),
                interpolation=InterpolationMode(preprocessing.interpolation),
            ),
        ]
        if self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.grayscale:
            steps.append(v2.RandomGrayscale(self.grayscale))
        return v2.Compose([*steps, v2.PILToTensor()])
