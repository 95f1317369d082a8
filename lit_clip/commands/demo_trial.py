"""Functions that the page of ``lit-clip demo`` calls on a model, and limits on their input."""

import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from lit_clip.commands.class_sources import class_probabilities
from lit_clip.commands.search import Searched, encode_queries, small_image
from lit_clip.errors import InputError, require
from lit_clip.evaluation.zero_shot import IMAGENET, check_templates, imagenet_templates, zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.tools.images import image_for_model, image_size
from lit_clip.tools.untrusted import shortened

SHOWN = 512  # pixels of the longer side of an image found; nothing larger leaves this machine
MOST_BYTES, MOST_PIXELS = 32 * 2**20, 64_000_000  # of an image that is uploaded
MOST_PROMPTS, LONGEST_PROMPT = 10_000, 1_000  # that a click encodes, and in characters
MOST_IMAGES = 200  # that a search shows
Source = Path | BinaryIO | None  # of an image: its bytes on the page


class Trial:
    """Functions of the page: a model, optional images to search, and the result of the model's ``with_head``."""

    def __init__(self, model: CLIP, searched: Searched | None = None, headed: Any = None) -> None:
        self.model, self.searched, self.headed = model, searched, headed
        # The next image mostly has the same classes.
        self._classifier = lru_cache(maxsize=8)(partial(zero_shot_classifier, model))

    def classify(self, image: Source = None, names: str = "", templates: str = "a photo of a {}.") -> dict[str, float]:
        """Return the probability of each class, as ``lit-clip classify`` does.

        Names are separated by commas or lines; templates are one a line, or ``imagenet``, the paper's 80.
        """
        opened = image_of(image)
        classes = list(dict.fromkeys(words(names.replace(",", "\n"))))
        prompts = imagenet_templates() if templates.strip() == IMAGENET else words(templates)
        least = 2 if self.model.logit_bias is None else 1
        require(len(classes) >= least, f"class names: {len(classes)}; type at least {least}, with commas between them")
        count, longest = len(classes) * len(prompts), max(map(len, classes))
        length = max((len(prompt) + prompt.count("{}") * longest for prompt in prompts), default=0)
        where = "class names and templates"
        require(count <= MOST_PROMPTS, f"{where}: {count:,} prompts; at most {MOST_PROMPTS:,}")
        require(length <= LONGEST_PROMPT, f"{where}: a prompt of {length:,} characters; at most {LONGEST_PROMPT:,}")
        check_templates(prompts, "prompt templates")
        features = self.model.encode([opened]).to(self.model.device)
        with torch.inference_mode():
            probabilities = class_probabilities(self.model, features, self._classifier(tuple(classes), tuple(prompts)))
        return dict(zip(classes, probabilities[0].tolist(), strict=True))

    def own_classes(self, image: Source = None) -> dict[str, float]:
        """Return the probability of each class of the head, as ``lit-clip classify --head`` does."""
        probabilities = self.headed.classify([image_of(image)])
        return dict(zip(self.headed.head.facts.names, probabilities[0].tolist(), strict=True))

    def search(self, text: str = "", count: int | str = 12) -> list[tuple[Image.Image, str]]:
        """Return small copies of the images that best match a text, with names and cosines; omit hidden images."""
        assert self.searched is not None
        require(bool(text.strip()), "nothing to search for: type a sentence")
        require(len(text) <= LONGEST_PROMPT, f"sentence: {len(text):,} characters; at most {LONGEST_PROMPT:,}")
        wanted = re.fullmatch(r"\d{1,3}", str(count))
        number = int(wanted[0]) if wanted else 0
        require(0 < number <= MOST_IMAGES, f"images: {shortened(count)}; must be a number from 1 to {MOST_IMAGES}")
        scores, rows = self.searched.nearest(encode_queries(self.model, [text], []), number)
        found = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            path = self.searched.files[row]
            if path and (image := small_image(path, SHOWN)):  # it may have been removed since the folder was encoded
                found.append((image, f"{score:.3f} {self.searched.names[row]}"))
        return found


def image_of(image: Source) -> Image.Image:
    """Open an image, and refuse one that is too large."""
    if image is None:
        raise InputError("no image: drop one, or click to choose a file")
    width, height = image_size(image, "the image")
    require(width * height <= MOST_PIXELS, f"the image: {width} x {height} pixels; at most {MOST_PIXELS:,}")
    return image_for_model(image, "the image")


def words(text: str) -> list[str]:
    """Return the non-empty lines of a text, with single spaces; a file that the text names is never read."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]
