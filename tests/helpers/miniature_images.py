"""Rows that miniatures of data sets are expected to have, and images that encode a number, in files or in arrays."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.helpers.coloured_sets import colour

SIDES = (28, 32, 48, 96)  # pixel sizes of the images in arrays


class Row(NamedTuple):
    """An expected row: its key, its label, and the number that its image encodes."""

    key: str
    label: int
    number: int


Rows = dict[str, list[Row]]


def pixels(number: int, side: int, channels: int) -> np.ndarray:
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.RandomState(number).randint(0, 256, shape, dtype=np.uint8)


def encodes(image: Image.Image, number: int) -> bool:
    if image.height in SIDES:
        return np.array_equal(np.asarray(image), pixels(number, image.width, len(image.getbands())))
    return image.convert("RGB").getpixel((1, 1)) == colour(number)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_mat(path: Path, **values: Any) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values)


def structs(*rows: dict[str, Any]) -> np.ndarray:
    """Return a struct array as MATLAB has it, with a row for each mapping; lists become cells."""
    array = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for place, row in enumerate(rows):
        values = (np.array([value], dtype=object) if isinstance(value, list) else value for value in row.values())
        array[0, place] = tuple(values)
    return array
