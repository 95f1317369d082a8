"""A folder with a subfolder of images for each class, captioned with prompt templates (FLYP, Goyal et al. 2023)."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lit_clip.errors import InputError, require
from lit_clip.evaluation.prompts import Prompts, prompts_of
from lit_clip.tools.images import SUFFIXES
from lit_clip.tools.reading import reading
from ..loading.bad_samples import as_unicode, is_unicode
from .columns import Cells, ColumnPairs
from .folder import walk_images
from .source import SourceOptions


def open_class_folders(folder: Path, options: SourceOptions) -> "ClassPairs":
    """Open a folder of classes; templates and class names are those of :func:`prompts_of`."""
    options.refuse_split(folder)
    options.refuse_columns(folder)
    with reading(folder, "folder"):
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    require(bool(classes), f"{folder}: no subfolders; put each class's images into a subfolder of its own")
    class_names: Any = options.classes.names  # lists are invariant
    prompts = prompts_of(class_names, options.classes.templates, [name.replace("_", " ") for name in classes])
    return ClassPairs(folder, classes, prompts)


class ClassPairs(ColumnPairs):
    """Images in one subfolder for each class; the captions are the prompts of the class, which is the pair's group."""

    def __init__(self, folder: Path, classes: list[str], prompts: Prompts) -> None:
        super().__init__(folder, folder)
        self.classes, self.texts = classes, prompts.texts
        names, counts = [], []
        for name in classes:
            require(
                is_unicode(name), f"{folder}: the name of {as_unicode(name)}, its class, is not UTF-8 text; rename it"
            )
            below = []
            for image, _ in walk_images(folder / name):
                if is_unicode(image):
                    below.append(f"{name}/{image}")
                else:
                    self._left_out.add(f"{folder / name}: {as_unicode(image)}", "its name is not UTF-8")
            if not below:
                require(
                    not self._left_out.counts, f"{folder / name}: no usable images of this class ({self._left_out})"
                )
                raise InputError(f"{folder / name}: no images of this class ({', '.join(sorted(SUFFIXES))})")
            names.append(pa.array(below, pa.string()))
            counts.append(len(below))
        self._names, self._stops = pa.chunked_array(names), np.cumsum(counts)

    def __len__(self) -> int:
        return len(self._names)

    def image_names(self) -> pa.ChunkedArray | None:
        return self._names

    def cells(self, index: int) -> Cells:
        name, label = self._names[index].as_py(), int(np.searchsorted(self._stops, index, side="right"))
        return Cells(name, self.texts[label], self.classes[label], f"{self.path}: {name}", "")
