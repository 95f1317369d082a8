"""Sets in tar files whose images have metadata, as DataComp stores WILDS, Dollar Street and GeoDE."""

import io

import numpy as np

from datamodules.evaluation.webdataset import WebDataset, scan_tar
from lit_clip.errors import InputError
from lit_clip.evaluation.data import Grouped
from lit_clip.tools.reading import reading


class WebDatasetGroups(WebDataset, Grouped):
    """A ``wds`` classification set with metadata: a ``.npy`` file beside each ``.cls`` file has one number per column.

    Args:
        root: the folder of the set.
        columns: the attributes in the first columns, which define groups; further columns are ignored.
        split: its subfolder.

    Raises:
        MissingData: see :class:`datamodules.evaluation.WebDataset`.
    """

    def __init__(self, root: str, columns: list[str], split: str = "test") -> None:
        super().__init__(root, split)
        metadata: dict[str, bytes | None] = {}
        for number, path in enumerate(self.tars):
            metadata |= {f"{path.stem}/{key}": it.target for key, it in scan_tar(path, number, "npy").items()}
        rows = [self._numbers(index, metadata.get(key), len(columns)) for index, key in enumerate(self.keys)]
        self._groups = {name: [str(row[column]) for row in rows] for column, name in enumerate(columns)}

    def _numbers(self, index: int, content: bytes | None, columns: int) -> list[int]:
        if content is None:
            raise InputError(f"{self.where(index)}: no .npy file of metadata; get the set again")
        with reading(f"{self.where(index)}: its .npy", "array of numbers", hint="get the set again"):
            row = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            numbers = [float(value) for value in row[:columns]] if row.ndim == 1 and row.dtype.kind in "iuf" else []
        if len(numbers) < columns or not all(number.is_integer() for number in numbers):
            raise InputError(
                f"{self.where(index)}: its .npy must start with {columns} whole numbers; get the set again"
            )
        return [int(number) for number in numbers]

    def groups(self) -> dict[str, list[str]]:
        return {name: list(values) for name, values in self._groups.items()}
