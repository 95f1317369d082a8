"""Models and batches of the measurements."""

from collections.abc import Iterator

import torch
from peers import captions, lengths_of
from train_step import Pairs

from gpu.setting import Setting
from lit_clip import CLIP
from lit_clip.models.config import height_width

TINY = "ViT-nano-16-32"


def named(setting: Setting, model: str) -> str:
    """Return the model to measure in place of ``model``."""
    return TINY if setting.tiny else model


def texts_of(count: int, long: bool = False) -> list[str]:
    """Make captions of about 14 tokens, or long ones that fill the context."""
    short = captions(count)
    return [" ".join(short[(i + j) % count] for j in range(9)) for i in range(count)] if long else short


def uint8_pairs(setting: Setting, model: CLIP, batch: int, count: int, long: bool = False) -> list[Pairs]:
    """Return some batches on the device, of random uint8 images and of different captions."""
    return list(_uint8_pairs(setting, model, batch, count, long))


def _uint8_pairs(setting: Setting, model: CLIP, batch: int, count: int, long: bool) -> Iterator[Pairs]:
    size, texts = height_width(model.preprocessing.image_size), texts_of(count * batch, long)
    generator = torch.Generator(setting.device).manual_seed(0)
    for number in range(count):
        tokens = model.tokenize(texts[number::count])
        images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=setting.device, generator=generator)
        trimmed = model.tokenizer.trim(tokens).to(setting.device)
        yield Pairs(images, tokens.to(setting.device), trimmed, lengths_of(model, tokens))
