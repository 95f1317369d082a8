"""What tasks record of each place of a set's images: computed once by any number of processes, and kept on disk."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lit_clip import distributed
from lit_clip.embedding.encode import compute
from lit_clip.embedding.encoding_task import remaining
from lit_clip.embedding.parts import Parts, json_array, json_value, load_arrays, save_arrays
from lit_clip.embedding.reading import UnreadableRow
from lit_clip.errors import require
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.places import PlaceRecords, PlaceTask
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import Task
from lit_clip.tools.hashing import hex_digest

METHOD = "places 1"  # part of the cache key: increase the number when what is recorded changes


class PlaceStore:
    """Records of image sets, beside the features of a store."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def compute(self, images: ImageSet, name: Task, task: PlaceTask, texts: str, title: str) -> PlaceRecords | None:
        """Return the records of a task, computed unless they are there; for all ranks, None on others than the first.

        ``texts`` is a hash of the texts that the images are compared with.
        """
        key = hex_digest([METHOD, name, self.store.path(images).name, texts, *task.settings])
        path, rows = self.store.folder / f"{key}.npz", len(images)
        first = distributed.rank_and_world()[0] == 0
        known = self._read(path) if first else None
        missing = first and (known is None or bool(known.skipped and self.store.settings.on_error == "error"))
        if not distributed.maximum(int(missing)):
            return known

        def work(parts: Parts) -> list[UnreadableRow] | None:
            done = {int(row) for arrays in parts.read(_rows) for row in arrays}
            batches = remaining(rows, 1, done.__contains__)
            return compute(self.store.model, task, batches, parts, self.store.settings, title)

        parts = Parts(path, f"{self.store.settings_text} {key}")
        self.store.share(parts, work, partial(self._join, parts, images), title)
        return self._read(path) if first else None

    def _read(self, path: Path) -> PlaceRecords | None:
        return load_arrays(path, self.store.settings_text, _records)

    def _join(self, parts: Parts, images: ImageSet, unreadable: Sequence[UnreadableRow]) -> None:
        """Write the records of all parts to one file."""
        require(len(unreadable) < len(images), f"none of {len(images)} images could be read")
        found = list(parts.read(dict))
        skipped = [(images.key(bad.row), bad.message) for bad in unreadable]
        values = np.concatenate([arrays["values"] for arrays in found])
        rows = np.sort(np.concatenate([arrays["rows"] for arrays in found]))
        missing = len(images) - len(unreadable) - len(rows)
        require(missing == 0, f"{parts.output}: records are gone; another run with the same cache has ended meanwhile")
        order = values[:, 0].argsort(kind="stable")
        arrays = {"rows": rows, "values": values[order], "skipped": json_array(skipped)}
        save_arrays(parts.output, self.store.settings_text, arrays)
        parts.remove()


def _rows(arrays: Mapping[str, np.ndarray]) -> list[int]:
    return arrays["rows"].tolist()


def _records(arrays: Mapping[str, np.ndarray]) -> PlaceRecords:
    skipped = [(str(key), str(reason)) for key, reason in json_value(arrays["skipped"])]
    return PlaceRecords(arrays["values"], arrays["rows"].tolist(), skipped)
