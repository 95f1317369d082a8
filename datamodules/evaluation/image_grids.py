"""Grids of labelled images: the place of each class is known without annotations."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lit_clip.errors import require
from lit_clip.evaluation.data import Box, Boxed, ImageSet, LabelledImages, Masked
from lit_clip.models.preprocess import to_rgb
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.parts import instantiate


class ImageGrids(ImageSet, Masked, Boxed):
    """Images of different classes in a grid, each cropped to a square and encoded at the model's image size.

    An image is in one grid at most.

    Args:
        images: ``class_path`` and ``init_args`` of labelled images.
        root: their ``root``, if they have one; in a suite below the data root.
        rows: of a grid.
        columns: of a grid.
        side: of an image in pixels.
        seed: of the order in which images are drawn.
    """

    def __init__(
        self,
        images: dict[str, Any],
        root: str | None = None,
        rows: int = 1,
        columns: int = 2,
        side: int = 224,
        seed: int = 0,
    ) -> None:
        require(min(rows, columns, side) >= 1, f"rows {rows}, columns {columns} and side {side} must be at least 1")
        arguments = {**images.get("init_args", {}), **({"root": root} if root else {})}
        self.source = instantiate(LabelledImages, {"class_path": images.get("class_path"), "init_args": arguments})
        self.rows, self.columns, self.side = rows, columns, side
        self.class_names, self.annotation_paths = self.source.class_names, self.source.annotation_paths
        self._labels = self.source.labels()
        self.grids = _grids(self._labels, rows * columns, seed)
        require(bool(self.grids), f"images: too few for a grid of {rows} x {columns} different classes")

    def __len__(self) -> int:
        return len(self.grids)

    def images(self, index: int) -> list[Image.Image]:
        cells = self.boxes(index)
        width, height = (max(int(box[edge]) for _, box in cells) for edge in (2, 3))
        grid = Image.new("RGB", (width, height))
        for row, (_, (left, top, _, _)) in zip(self.grids[index], cells, strict=True):
            image = to_rgb(self.source.images(row)[0])
            grid.paste(ImageOps.fit(image, (self.side, self.side)), (int(left), int(top)))
        return [grid]

    def boxes(self, index: int) -> list[tuple[int, Box]]:
        found: list[tuple[int, Box]] = []
        for place, row in enumerate(self.grids[index]):
            left, top = place % self.columns * self.side, place // self.columns * self.side
            found.append((self._labels[row], (left, top, left + self.side, top + self.side)))
        return found

    def mask(self, index: int) -> np.ndarray:
        labels = np.array([label for label, _ in self.boxes(index)], dtype=np.int16).reshape(-1, self.columns)
        return labels.repeat(self.side, axis=0).repeat(self.side, axis=1)

    def short_side(self, image_size: int) -> int:
        return min(self.rows, self.columns) * image_size

    def image_paths(self) -> Sequence[Path]:
        return self.source.image_paths()

    def check(self) -> None:
        self.source.check()

    def key(self, index: int) -> str:
        return " | ".join(self.source.key(row) for row in self.grids[index])

    def stamp(self) -> str:
        return hex_digest([self.source.stamp(), self.grids, self.columns, self.side])

    def truth_stamp(self) -> str:
        return hex_digest([self._labels, self.grids])


def _grids(labels: Sequence[int], cells: int, seed: int) -> list[list[int]]:
    """Draw grids of rows with different labels, each row once, until too few labels are left."""
    waiting = random.Random(seed).sample(range(len(labels)), len(labels))
    grids: list[list[int]] = []
    while waiting:
        chosen: dict[int, int] = {}
        for row in waiting:
            chosen.setdefault(labels[row], row)
            if len(chosen) == cells:
                break
        else:
            return grids
        grids.append(list(chosen.values()))
        waiting = [row for row in waiting if row not in chosen.values()]
    return grids
