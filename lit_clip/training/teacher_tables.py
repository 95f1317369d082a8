"""A teacher that is not loaded: tables of its features of images, by key, and of captions, by text."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.errors import BadSample, InputError, require
from lit_clip.losses.loss import Pairs
from lit_clip.models.layers import Tower
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import shortened

SCALE = 100.0  # inverse temperature of most published models, for tables that do not name theirs


class TeacherTable(NamedTuple):
    """A parquet file with the columns ``feature`` and ``key``, or ``caption`` for features of captions."""

    path: str
    tower: Tower
    rows: dict[str, int]  # by key or caption
    features: Tensor  # float32 [N, D], of any length
    scale: float

    @classmethod
    def read(cls, path: str) -> "TeacherTable":
        """Read and check a file."""
        import pyarrow.parquet as pq

        with reading(path, "table of features", "model.loss", "write it with lit-clip embed"):
            file: Any = pq.ParquetFile(path)
            if file.metadata.num_rows > Path(path).stat().st_size:  # a row takes more than a byte
                raise ValueError(f"it claims {file.metadata.num_rows} rows")
            column = "caption" if "caption" in file.schema_arrow.names else "key"
            table = file.read(columns=[column, "feature"])
            table.validate(full=True)
            lists = table["feature"].combine_chunks()
            if lists.null_count or len(np.unique(lists.value_lengths())) != 1:
                raise ValueError("its rows have different numbers of features")
            numbers = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            features = torch.from_numpy(numbers.reshape(len(lists), -1))
            rows = {name: row for row, name in enumerate(table[column].to_pylist())}
            scale = float((file.schema_arrow.metadata or {}).get(b"logit_scale", SCALE))
        lengths = features.norm(dim=1)
        wrong = (~((lengths > 0) & lengths.isfinite())).nonzero()[:, 0].tolist()
        require(not wrong, f"model.loss: {path}: features of row {wrong[:1]} are 0 or not finite; leave the row out")
        return cls(path, "text" if column == "caption" else "image", rows, features, scale)

    def of(self, names: list[str]) -> Tensor:
        """Return the features ``[n, D]`` of keys or captions; raise :class:`InputError` for unknown ones."""
        if absent := [name for name in names if name not in self.rows]:
            kind = "captions" if self.tower == "text" else "keys"
            lacks = f"lacks {len(absent)} of {len(names)} {kind}, such as {shortened(absent[0])}"
            raise InputError(f"model.loss: {self.path}: {lacks}; encode all training pairs")
        return self.features[[self.rows[name] for name in names]]


class TeacherTables:
    """Features of any teacher: from a table of images, a table of captions, or one of each."""

    def __init__(self, paths: list[str]) -> None:
        self.tables: dict[Tower, TeacherTable] = {table.tower: table for table in map(TeacherTable.read, paths)}
        one = len(self.tables) == len(paths)
        require(one, f"model.loss: {' and '.join(paths)}: give one table of images and one of captions")
        self.scale = torch.tensor(max(table.scale for table in self.tables.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherTables":
        return self

    def dim(self, tower: Tower) -> int:
        """Return the number of channels; 0 without a table."""
        return self.tables[tower].features.shape[1] if tower in self.tables else 0

    def of_pairs(self, pairs: Pairs, tower: Tower) -> Tensor:
        """Return the features ``[B, D]`` of this rank's pairs."""
        image_of = pairs.batch.image_of
        several = "model.loss: a table of images has one of each pair; set data.images.per_thing to one or all"
        require(tower == "text" or image_of is None or image_of.ndim == 1, several)
        names = pairs.batch.keys if tower == "image" else pairs.batch.captions
        require(len(names) == len(pairs.image), "model.loss: a table of captions needs batches with captions")
        return self.tables[tower].of([*names]).to(pairs.image.device)

    def check(self, data: Any) -> None:
        """Raise :class:`InputError` unless the tables have each training image and caption of ``data``."""
        source: Any = getattr(data, "train_source", None) or ()

        def listed(tower: Tower) -> Iterator[str]:
            for row in range(len(source)):
                with suppress(BadSample):  # loading it will raise or skip it
                    yield from [source.key(row)] if tower == "image" else source.captions(row)

        for tower, table in self.tables.items():
            if tower == "image" or getattr(data, "lists_captions", False):
                table.of([*dict.fromkeys(listed(tower))])
