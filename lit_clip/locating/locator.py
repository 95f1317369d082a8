"""Find texts in images, and report absent texts."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lit_clip.embedding.reading import check_finite
from lit_clip.errors import InputError, require
from lit_clip.evaluation.prompts import paper_class_names
from lit_clip.locating.regions import Region, background_level, find_regions
from lit_clip.models.clip import CLIP
from lit_clip.models.heat_maps import map_of, place_cosines
from lit_clip.models.running import evaluation_mode
from lit_clip.tools.images import image_for_model

FALSE_ALARMS = 0.05
SIDE = 256  # pixels of a map's longer side: many times finer than any encoder's places


class Located(NamedTuple):
    """Results for an image."""

    maps: Tensor  # cosine of each of N texts, float32 [N, H, W], of at most 256 pixels a side
    level: float  # cosine that background texts reach in this image
    regions: list[Region]  # of each text


class Locator:
    """Find texts in images by :meth:`lit_clip.CLIP.locate`, and report which of them an image does not show.

    Args:
        model: any CLIP that has features of places.
        texts: what to find; at each place they compete with each other.
        background: texts of other things, of the form of ``texts``, with whose cosines in the same image a text is
            compared; None: the names of CIFAR-100's classes. Equal ones count once, and those in ``texts`` do not.
        false_alarms: share of images in which a text of a thing that is not there may be seen, if the background texts
            are of its kind.
        scale: of the images; 2 finds smaller things.
    """

    def __init__(
        self,
        model: CLIP,
        texts: Sequence[str],
        background: Sequence[str] | None = None,
        false_alarms: float = FALSE_ALARMS,
        scale: float = 1,
    ) -> None:
        require(bool(texts), "texts: none given; say what to find")
        self.model = model
        self.texts = list(texts)
        self.false_alarms = false_alarms
        self.scale = scale
        given = default_background() if background is None else background
        others = other_texts(given, texts)
        require(0 < false_alarms < 1, f"false_alarms: {false_alarms} must be above 0 and below 1")
        least = math.ceil(1 / false_alarms - 1e-9) - 1
        different = "" if len(others) == len(given) else " that differ from each other and from those to find"
        if len(others) < least:
            needed = f"false alarms of {false_alarms:g} need at least {least}; add some, or allow more"
            raise InputError(f"background: {len(others)} texts{different}, and {needed}")
        self._features = text_features(model, [*self.texts, *others])

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> Located:
        """Find the texts in an image or an image file."""
        opened = image if isinstance(image, Image.Image) else image_for_model(Path(image))
        cosines = place_cosines(self.model, opened, self._features, self.scale)
        check_finite(cosines, "image")
        count, ratio = len(self.texts), min(1, SIDE / max(opened.size))
        maps = map_of(cosines[:count], [max(1, round(side * ratio)) for side in (opened.height, opened.width)])
        level = background_level(cosines[count:].amax(dim=(1, 2)), self.false_alarms)
        return Located(maps, level, find_regions(cosines[:count], maps, level))


def default_background() -> list[str]:
    """Return texts about other things, with which a text is compared."""
    return [f"a {name}" for name in paper_class_names("CIFAR100")]


def other_texts(background: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return the background texts that differ from each other and from ``texts``, ignoring case and spaces."""
    words = {" ".join(text.lower().split()): text for text in background}
    for text in texts:
        words.pop(" ".join(text.lower().split()), None)
    return list(words.values())


@torch.inference_mode()
def text_features(model: CLIP, texts: Sequence[str]) -> Tensor:
    """Return the unit features of texts, float32 ``[N, D]``, in batches; a file name is treated as text."""
    parts = [
        model.tokenizer.trim(model.tokenize(list(texts[start : start + 64]))) for start in range(0, len(texts), 64)
    ]
    with evaluation_mode(model):
        features = [model.encode_text(tokens.to(model.device), normalize=True).float() for tokens in parts]
    return torch.cat(features).cpu()
