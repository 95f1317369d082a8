"""Images that encode a number, and the rows that miniatures of data sets are expected to have.

An image encodes its number in its width if it is a file, in its pixels if it is in an array.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDES = (28, 32, 48, 96)  # pixel sizes of the images in arrays


class Row(NamedTuple):
    """An expected row: its key, its class name, and the number that its image encodes."""

    key: str
    name: str
    number: int


Rows = dict[str, list[Row]]


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(number).randint(0, 256, (6, 8 + number, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def pixels(number: int, side: int, channels: int) -> np.ndarray:
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.RandomState(number).randint(0, 256, shape, dtype=np.uint8)


def encodes(image: Image.Image, number: int) -> bool:
    if image.height in SIDES:
        return np.array_equal(np.asarray(image), pixels(number, image.width, len(image.getbands())))
    return image.size == (8 + number, 6)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_mat(path: Path, **values: Any) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values)


def paint_rows(root: Path, rows: Rows) -> Rows:
    for rows_of_split in rows.values():
        for row in rows_of_split:
            paint(root / row.key, row.number)
    return rows
