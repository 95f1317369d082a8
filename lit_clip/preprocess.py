"""From a picture to pixels: uint8 for the data loaders, normalised float for ``encode_image``."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from lit_clip.config import Preprocessing


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB; transparency is laid on white (Pillow alone would show whatever lies underneath)."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _steps(config: Preprocessing) -> list[v2.Transform]:
    interpolation = InterpolationMode(config.interpolation)
    if config.resize_mode == "squash":
        return [v2.Resize((config.image_size, config.image_size), interpolation)]
    return [v2.Resize(config.image_size, interpolation), v2.CenterCrop(config.image_size)]


def pixels(config: Preprocessing) -> v2.Compose:
    """The evaluation transform up to the pixels: PIL image -> uint8 ``[3, S, S]``."""
    return v2.Compose([v2.Lambda(to_rgb), *_steps(config), v2.PILToTensor()])


def image_transform(config: Preprocessing) -> v2.Compose:
    """The whole evaluation transform of the paper: PIL image -> float ``[3, S, S]``, normalised."""
    return v2.Compose([pixels(config), v2.Lambda(lambda image: normalize(image, config))])


def normalize(images: Tensor, config: Preprocessing) -> Tensor:
    """uint8 ``[..., 3, H, W]`` -> float32, normalised by the model's own mean and standard deviation."""
    return TF.normalize(images.to(torch.float32) / 255, list(config.mean), list(config.std))
