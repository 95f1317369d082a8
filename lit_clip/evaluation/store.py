"""Store a set's image features and place records on disk; any number of processes compute them once.

Shapes: N images that could be read, W features before the projection, D after it.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from lit_clip import distributed
from lit_clip.embedding.encode import EncodingSettings, UnreadableError, encode
from lit_clip.embedding.feature_files import FeatureTable
from lit_clip.embedding.image_files import image_file
from lit_clip.embedding.parts import Parts, json_array, json_value, load_arrays, save_arrays
from lit_clip.embedding.reading import UnreadableRow
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, JudgedDocuments, PartOf
from lit_clip.evaluation.places import PlaceRecords, PlaceTask
from lit_clip.evaluation.set_encoding import SetFeatures, set_task
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import make_folder, not_written, remove, remove_drafts, replacing_folder
from lit_clip.tools.console import stderr
from lit_clip.tools.hashing import hex_digest, sha256_of_file, stable_hash
from lit_clip.tools.reading import check_is_file, read_json, reading

ARRAYS = ("before", "after")
PLACES = "places 1"  # part of the cache key: increase the number when what is recorded changes


def _hashes_of_files(images: ImageSet) -> np.ndarray:
    """Hash each item's file, int64 ``[N]``; 0 if the item is not a whole file's image.

    A class that decodes images itself shows something else than the files of the class that it inherits from.
    """
    kinds = type(images).__mro__
    below = kinds[: next(place for place, kind in enumerate(kinds) if "whole_file" in vars(kind))]
    own = any({"image", "images", "__getitem__"} & vars(kind).keys() for kind in below)
    paths = (None if own else images.whole_file(row) for row in range(len(images)))
    files = (path and image_file(str(path.absolute()), path).identity for path in paths)
    return np.array([stable_hash(repr(file)) if file else 0 for file in files], dtype=np.int64)


class FeatureStore:
    """Features of image sets, in a folder, from a model with fixed weights.

    An image file of several sets is encoded for the first of them.
    """

    def __init__(self, model: CLIP, folder: Path, settings: EncodingSettings) -> None:
        self.model, self.folder, self.settings = model, folder, settings
        self.fingerprint = fingerprint(model)
        self.settings_text = f"{self.fingerprint.model} {settings.precision}"
        self._paths: WeakKeyDictionary[ImageSet, Path] = WeakKeyDictionary()
        self._whole: set[Path] = set()  # whose checksums this process has compared
        self._hashes: dict[Path, np.ndarray] = {}  # of the files of this run's sets, in the order of their features

    def path(self, images: ImageSet) -> Path:
        """Return the folder of a set's features; it changes with the model, the images and the precision."""
        if images not in self._paths:  # a stamp may be of a million files
            kind = f"{type(images).__module__}.{type(images).__qualname__}"
            try:
                key = hex_digest([self.fingerprint.model, self.settings.precision, kind, images.stamp(), len(images)])
            except OSError as error:
                raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
            self._paths[images] = self.folder / key
        return self._paths[images]

    def features(self, images: ImageSet, title: str) -> SetFeatures:
        """Return a set's features, computed unless stored; all ranks call this in the same order."""
        self.compute(images, title)
        return self.read(images)

    def compute(self, images: ImageSet, title: str) -> None:
        """Compute the features for :meth:`read`, unless stored; all ranks call this in the same order."""
        if not len(images) and isinstance(images, JudgedDocuments):
            return
        require(len(images) > 0, f"{title}: the set is empty")
        if isinstance(images, PartOf):
            self.compute(images.whole, title)
            return
        path, first = self.path(images), distributed.rank_and_world()[0] == 0
        hashes = _hashes_of_files(images) if first else np.zeros(0)
        if distributed.maximum(int(not self._finished(path, len(images)))):
            task = set_task(self.model, images, title)

            def encode_set(parts: Parts) -> list[UnreadableRow] | None:
                if first:
                    self._take_over(hashes, parts, title)
                distributed.maximum(0)  # wait for it
                return encode(self.model, task, parts, self.settings)

            self._share(Parts(path, self.settings_text), encode_set, partial(self._join, path, images), title)
        if first:
            self._hashes[path] = hashes[self.read(images).rows]

    def _take_over(self, hashes: np.ndarray, parts: Parts, title: str) -> None:
        """Add to ``parts`` the features of image files that another set of this run contains."""
        for path, others in self._hashes.items():
            shared, rows, places = np.intersect1d(hashes, others, return_indices=True)
            rows, places = rows[shared != 0], places[shared != 0]
            if len(rows):
                both = [np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)[places] for name in ARRAYS]
                identities = [(str(row), 0, 0) for row in rows.tolist()]
                parts.add(FeatureTable(identities, np.concatenate(both, axis=1)).arrays(), int(rows[0]))
                stderr().print(f"{title}: {len(rows):,} of {len(hashes):,} images are encoded already, for another set")

    def places(self, images: ImageSet, task: PlaceTask, texts: str, title: str) -> PlaceRecords | None:
        """Return a task's records, computed unless stored; all ranks call this, and only the first gets them.

        ``texts`` are the task and the texts that the images are compared with.
        """
        key = hex_digest([PLACES, texts, self.path(images).name, *task.settings])
        path, first = self.folder / f"{key}.npz", distributed.rank_and_world()[0] == 0
        known = load_arrays(path, self.settings_text, _records) if first else None
        missing = first and (known is None or bool(known.skipped and self.settings.on_error == "error"))
        if not distributed.maximum(int(missing)):
            return known

        def record(parts: Parts) -> list[UnreadableRow] | None:
            return encode(self.model, replace(task, title=title), parts, self.settings)

        parts = Parts(path, f"{self.settings_text} {key}")
        self._share(parts, record, partial(_join_records, parts, images, self.settings_text), title)
        return load_arrays(path, self.settings_text, _records) if first else None

    def _share(
        self,
        parts: Parts,
        work: Callable[[Parts], list[UnreadableRow] | None],
        join: Callable[[Sequence[UnreadableRow]], None],
        title: str,
    ) -> None:
        """Make parts on all ranks and join them on the first; an error on one rank ends the work on all."""
        error = unreadable = None
        try:
            make_folder(parts.output.parent)
            unreadable = work(parts)
        except UnreadableError as raised:  # all ranks have ended
            error = raised
        except (InputError, OSError) as raised:
            error = raised if isinstance(raised, InputError) else not_written(parts.output.parent, raised)
            if distributed.rank_and_world()[1] > 1:  # the next set would make the ranks wait for each other
                raise RuntimeError("a process has to leave the others") from error
        try:
            if unreadable is not None:
                join(unreadable)
        except InputError as raised:
            error = raised
        if distributed.maximum(int(error is not None)):  # a barrier, too: the arrays are there afterwards
            raise error or InputError(f"{title}: see the error of another process")

    def _finished(self, path: Path, size: int) -> bool:
        """Return whether all features are stored, except for unreadable images that may be skipped."""
        stored = self._stored(path, size)
        return stored is not None and (not stored.skipped or self.settings.on_error == "skip")

    def _stored(self, path: Path, size: int) -> SetFeatures | None:
        """Read the features of a set of ``size`` images; None if they are missing or damaged."""
        try:
            with reading(path, "folder of features"):
                content = read_json(path / "content.json")
                skipped = {int(row): (str(key), str(reason)) for row, key, reason in content["skipped"]}
                for name in ARRAYS:
                    check_is_file(path / f"{name}.npy")
                    if path not in self._whole and content[name] != sha256_of_file(path / f"{name}.npy"):
                        raise ValueError(f"{name}.npy has other values")
                self._whole.add(path)
                before, after = (np.lib.format.open_memmap(path / f"{name}.npy", mode="r") for name in ARRAYS)
        except InputError:
            return None
        rows = [row for row in range(size) if row not in skipped]
        whole = after.shape[1:] == (self.model.config.embed_dim,) and all(
            array.ndim == 2 and array.dtype == np.float32 and len(array) == len(rows) for array in (before, after)
        )
        return SetFeatures(before, after, rows, list(skipped.values())) if whole else None

    def _join(self, path: Path, images: ImageSet, unreadable: Sequence[UnreadableRow]) -> None:
        size, parts = len(images), Parts(path, self.settings_text)
        skipped = [(bad.row, without_secrets(images.key(bad.row)), bad.message) for bad in unreadable]
        require(len(skipped) < size, f"none of {size} images could be read; {skipped[0][2] if skipped else ''}")
        try:
            with replacing_folder(path) as draft:
                self._write_arrays(draft, parts, sorted(set(range(size)) - {row for row, _, _ in skipped}))
                content = {name: sha256_of_file(draft / f"{name}.npy") for name in ARRAYS}
                (draft / "content.json").write_text(json.dumps({**content, "skipped": skipped}), encoding="utf-8")
                if not self._finished(path, size):  # another run may have been quicker
                    remove(path)
        except InputError:
            if not self._finished(path, size):
                raise
        remove_drafts(path)
        parts.remove()

    def _write_arrays(self, folder: Path, parts: Parts, rows: Sequence[int]) -> None:
        place = {row: number for number, row in enumerate(rows)}
        arrays: list[Any] = []
        filled = np.zeros(len(rows), dtype=bool)
        for table in parts.read(FeatureTable.of):
            columns = np.split(table.features, [-self.model.config.embed_dim], axis=1)
            numbers = [place[int(key)] for key, _, _ in table.identities]
            filled[numbers] = True
            for name, values in zip(ARRAYS[len(arrays) :], columns, strict=False):
                file, shape = folder / f"{name}.npy", (len(rows), values.shape[1])
                arrays.append(np.lib.format.open_memmap(file, "w+", np.float32, shape))
                if hasattr(os, "posix_fallocate"):  # not on macOS; without it a full disk ends the process
                    with file.open("r+b") as opened:
                        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            for array, values in zip(arrays, columns, strict=True):
                array[numbers] = values
        message = "features are gone; another run with the same cache has ended meanwhile"
        require(bool(filled.all()), f"{self.folder}: {message}")
        for array in arrays:
            array.flush()

    def read(self, images: ImageSet) -> SetFeatures:
        """Return the features that :meth:`compute` stored."""
        if isinstance(images, PartOf):
            return _part(images, self.read(images.whole))
        if not len(images):  # documents of texts alone
            nothing = np.empty((0, self.model.config.embed_dim), np.float32)
            return SetFeatures(nothing, nothing, [], [])
        path = self.path(images)
        stored = self._stored(path, len(images))
        if stored is None:
            raise InputError(f"{path}: features are gone; run the command again")
        return stored


def _part(images: PartOf, whole: SetFeatures) -> SetFeatures:
    place = {row: number for number, row in enumerate(whole.rows)}
    rows = [row for row, row_of_whole in enumerate(images.rows) if row_of_whole in place]
    numbers = [place[images.rows[row]] for row in rows]
    own = {images.whole.key(row) for row in images.rows} if whole.skipped else set()
    skipped = [(key, reason) for key, reason in whole.skipped if key in own]
    return SetFeatures(whole.before[numbers], whole.after[numbers], rows, skipped)


def _join_records(parts: Parts, images: ImageSet, settings: str, unreadable: Sequence[UnreadableRow]) -> None:
    """Write the records of all parts to one file."""
    require(len(unreadable) < len(images), f"none of {len(images)} images could be read")
    found = list(parts.read(dict))
    values = np.concatenate([arrays["values"] for arrays in found])
    rows = np.sort(np.concatenate([arrays["rows"] for arrays in found]))
    whole = len(rows) + len(unreadable) == len(images)
    require(whole, f"{parts.output}: records are gone; another run with the same cache has ended meanwhile")
    skipped = json_array([(images.key(bad.row), bad.message) for bad in unreadable])
    order = values[:, 0].argsort(kind="stable")
    save_arrays(parts.output, settings, {"rows": rows, "values": values[order], "skipped": skipped})
    parts.remove()


def _records(arrays: Mapping[str, np.ndarray]) -> PlaceRecords:
    skipped = [(str(key), str(reason)) for key, reason in json_value(arrays["skipped"])]
    return PlaceRecords(arrays["values"], arrays["rows"].tolist(), skipped)
