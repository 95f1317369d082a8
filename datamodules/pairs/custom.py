"""Base class for your own source of pairs."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import InputError, require
from ..loading.bad_samples import check_caption
from .source import PairSource, Row, opening_files


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

    def row(self, index: int) -> Row:
        where = self.where(index)
        with opening_files(where, "file"):
            captions, negatives, extra = self._texts(index, where), self.negatives(index), self._extra(index, where)
            return Row(
                partial(self.image, index), captions, self.key(index), self.group(index), where, negatives, extra
            )

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
