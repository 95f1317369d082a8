"""A model that sees colours: an image encoder whose places are mean colours, and texts that name a colour.

The joint space has red, green, blue and a fourth direction. A text is what its first letter says, and a letter that
says nothing is a mixture of its own.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing
from lit_clip.models.external_config import CustomImageConfig, CustomTextConfig
from tests.helpers.own_encoders import Characters

PATCH = 8
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


class ColourImage(nn.Module):
    patch_size = PATCH

    def __init__(self, embed_dim: int, image_size: int = 32) -> None:
        super().__init__()
        self.image_size = image_size
        self.seen: list[tuple[int, ...]] = []  # shapes of the images given

    def patches(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return F.pad(F.avg_pool2d(images, PATCH), (0, 0, 0, 0, 0, 1), value=0.01)

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images.mean(dim=(2, 3)), (0, 1), value=0.01)


class ColourText(nn.Module):
    def __init__(self, embed_dim: int, context_length: int = 8) -> None:
        super().__init__()
        self.context_length = context_length
        self.tokenizer = Characters(context_length)
        table = torch.rand(256, 4, generator=torch.Generator().manual_seed(0)) * 0.1
        table[:, 3] = 1
        for place, letter in enumerate("rgb"):
            table[ord(letter)] = torch.eye(4)[place]
        self.register_buffer("table", table)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens[:, 0]]


def colour_model() -> CLIP:
    image, text = CustomImageConfig(ColourImage), CustomTextConfig(ColourText)
    preprocessing = Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return CLIP(CLIPConfig(4, image, text, preprocessing=preprocessing)).eval()


def beside(*colours: tuple[int, int, int], size: tuple[int, int] = (40, 60)) -> Image.Image:
    """Return plain images of a width and height beside each other."""
    whole = Image.new("RGB", (size[0] * len(colours), size[1]))
    for place, colour in enumerate(colours):
        whole.paste(colour, (place * size[0], 0, (place + 1) * size[0], size[1]))
    return whole
