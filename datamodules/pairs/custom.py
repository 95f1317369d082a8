"""Base class for your own source of pairs."""

import io
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.images import FIX_HINT, image_for_model
from lit_clip.tools.levels import eight_bits, keep_levels
from ..loading.bad_samples import check_caption
from .source import EncodedPair, Pair, PairSource, PairText


class CustomPairs(PairSource):
    """Your own pairs: a subclass returns their number, and the image and captions of each row.

    Rows are numbered from 0 to ``len(self) - 1``. Data workers are sent a copy, so files and connections are opened in
    the methods, not in the constructor. An ``OSError`` in a method makes the row a bad sample (``on_error``); any other
    exception ends the run. What a method draws from the global generators of torch, numpy and Python depends on seed,
    epoch and row alone in training.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def image(self, index: int) -> Image.Image | str | Path | bytes:
        """Return the image of a row: a PIL image of any mode, or the path or the content of an image file.

        From a path or a content JPEGs are decoded at the fraction of their size that training needs.
        """

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """Return at least one caption of a row; training draws one each time, validation takes the first."""

    def key(self, index: int) -> str:
        """Return the name of a row's image, the same in every run; rows with the same key have the same image."""
        return str(index)

    def group(self, index: int) -> str:
        """Return the duplicate group of a row; empty for none."""
        return ""

    def negatives(self, index: int) -> list[str]:
        """Return similar captions that do not fit the image; training draws one each time."""
        return []

    def extra(self, index: int) -> Mapping[str, Any]:
        """Return what your own loss needs for a row: numbers (float32) or tensors of one shape, by name."""
        return {}

    def where(self, index: int) -> str:
        """Return the name of a row for messages."""
        return f"{type(self).__name__} row {index}"

    def load(self, index: int, rng: random.Random | None) -> Pair:
        where, text = self.where(index), self.text(index, rng)
        with _opening_files(where):
            return Pair(keep_levels(self._image(self.image(index), where), where), *text)

    def text(self, index: int, rng: random.Random | None) -> PairText:
        where = self.where(index)
        with _opening_files(where):
            texts, extra = self._texts(index, where), self._extra(index, where)
        caption = texts[0] if rng is None else rng.choice(texts)
        negatives = self.negatives(index) if rng else []
        negative = rng.choice(negatives) if rng and negatives else ""
        return PairText(caption, self.key(index), self.group(index), negative, extra)

    def read(self, index: int) -> EncodedPair:
        """Return a pair as stored; a PIL image is stored as PNG."""
        where = self.where(index)
        with _opening_files(where):
            texts, content = self._texts(index, where), self.image(index)
            if isinstance(content, str | Path):
                content = Path(content).read_bytes()
            elif not isinstance(content, bytes):
                file = io.BytesIO()
                image = self._image(content, where)
                plain = image.mode == "I;16" and not hasattr(image, "tag_v2")  # a PNG holds it as it is
                (image if plain else eight_bits(image, where)).save(file, "PNG")
                content = file.getvalue()
        return EncodedPair(content, texts, self.key(index), self.group(index), where)

    def check(self) -> None:
        """Load the first row, so that a source that breaks the contract fails before the run starts."""
        require(len(self) > 0, f"{type(self).__name__}: has no rows")
        self.load(0, None)

    def image_names(self) -> list[str]:
        return [self.key(row) for row in range(len(self))]

    def _texts(self, index: int, where: str) -> list[str]:
        captions = self.captions(index)
        require(isinstance(captions, list), f"{where}: captions() returned a {type(captions).__name__}, not a list")
        return [check_caption(caption, where) for caption in captions or [None]]

    def _extra(self, index: int, where: str) -> dict[str, Tensor]:
        extra = self.extra(index)
        require(isinstance(extra, Mapping), f"{where}: extra() returned a {type(extra).__name__}, not a mapping")
        try:
            number = partial(torch.as_tensor, dtype=torch.float32)
            return {name: each if isinstance(each, Tensor) else number(each) for name, each in extra.items()}
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"{where}: extra() must have numbers or tensors ({error})") from error

    def _image(self, image: Image.Image | str | Path | bytes, where: str) -> Image.Image:
        if isinstance(image, str | Path | bytes):
            return image_for_model(io.BytesIO(image) if isinstance(image, bytes) else Path(image), where)
        kind = type(image).__name__
        require(isinstance(image, Image.Image), f"{where}: image() returned a {kind}, not a PIL image, path or bytes")
        image.load()  # Pillow opens files lazily
        return image


@contextmanager
def _opening_files(where: str) -> Iterator[None]:
    """Turn an ``OSError`` of a row's method into a bad sample."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadSample(where, "missing image", f"no such file: {error.filename}") from error
    except OSError as error:
        raise BadSample(where, "broken image", f"cannot read its image ({error}){FIX_HINT}") from error
