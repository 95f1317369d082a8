"""Store what is computed of a set's images on disk; any number of processes compute it once.

Shapes: N images that could be read, W features before the projection, D after it, K records of m numbers.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from lit_clip import distributed
from lit_clip.embedding.encode import EncodingSettings, UnreadableError, encode
from lit_clip.embedding.feature_files import FeatureTable
from lit_clip.embedding.image_files import image_file
from lit_clip.embedding.parts import Parts
from lit_clip.embedding.reading import UnreadableRow
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, JudgedDocuments, PartOf
from lit_clip.evaluation.places import PlaceTask
from lit_clip.evaluation.set_encoding import SetFeatures, SetValues, set_task
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import make_folder, not_written, remove, remove_drafts, replacing_folder
from lit_clip.tools.console import stderr
from lit_clip.tools.hashing import hex_digest, sha256_of_file, stable_hash
from lit_clip.tools.reading import check_is_file, read_json, reading
from lit_clip.tools.untrusted import Count, convert

VALUES, CONTENT = "values.npy", "content.json"  # the files of a folder
PLACES = "places 1"  # part of the cache key: increase the number when what is recorded changes
Work = Callable[[Parts], list[UnreadableRow] | None]  # make this rank's parts; see encode
GONE = "another run with the same cache has ended meanwhile, and what it stored is gone"


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


class Kind(NamedTuple):
    """What is stored of a set: how its parts are joined in a file, in the order of the rows, and how it is known."""

    write: Callable[[Path, Parts, Sequence[int]], None]
    fits: Callable[[np.ndarray, Sequence[int]], bool]


class FeatureStore:
    """Features and place records of image sets, in a folder each, from a model with fixed weights.

    An image file of several sets is encoded for the first of them.
    """

    def __init__(self, model: CLIP, folder: Path, settings: EncodingSettings) -> None:
        self.model, self.folder, self.settings = model, folder, settings
        self.fingerprint = fingerprint(model)
        self.settings_text = f"{self.fingerprint.model} {settings.precision}"
        self._paths: WeakKeyDictionary[ImageSet, Path] = WeakKeyDictionary()
        self._whole: set[Path] = set()  # whose digests this process has compared
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
        width = self.model.config.embed_dim
        if not len(images) and isinstance(images, JudgedDocuments):  # of texts alone
            nothing = np.empty((0, width), np.float32)
            return SetFeatures(nothing, nothing, [], [])
        require(len(images) > 0, f"{title}: the set is empty")
        if isinstance(images, PartOf):
            return _part(images, self.features(images.whole, title))
        path, first = self.path(images), distributed.rank_and_world()[0] == 0
        hashes = _hashes_of_files(images) if first else np.zeros(0)

        def encode_set(parts: Parts) -> list[UnreadableRow] | None:
            if first:
                self._take_over(hashes, parts, title)
            distributed.maximum(0)  # wait for it
            return encode(self.model, set_task(self.model, images, title), parts, self.settings)

        def fits(values: np.ndarray, rows: Sequence[int]) -> bool:
            plain = values.dtype == np.float32 and values.ndim == 2
            return plain and len(values) == len(rows) and values.shape[1] > width

        stored = self._made(path, images, encode_set, Kind(_write_features, fits), title)
        if first:
            self._hashes[path] = hashes[stored.rows]
        return SetFeatures(stored.values[:, :-width], stored.values[:, -width:], stored.rows, stored.skipped)

    def _take_over(self, hashes: np.ndarray, parts: Parts, title: str) -> None:
        """Add to ``parts`` the features of image files that another set of this run contains."""
        for path, others in self._hashes.items():
            shared, rows, places = np.intersect1d(hashes, others, return_indices=True)
            rows, places = rows[shared != 0], places[shared != 0]
            if len(rows):
                features = np.load(path / VALUES, mmap_mode="r", allow_pickle=False)[places]
                parts.add(FeatureTable([(str(row), 0, 0) for row in rows.tolist()], features).arrays(), int(rows[0]))
                stderr().print(f"{title}: {len(rows):,} of {len(hashes):,} images are encoded already, for another set")

    def places(self, images: ImageSet, task: PlaceTask, texts: str, title: str) -> SetValues:
        """Return a task's records, computed unless stored; all ranks call this in the same order.

        ``texts`` are the task and the texts that the images are compared with.
        """
        path = self.folder / hex_digest([PLACES, texts, self.path(images).name, *task.settings])

        def record(parts: Parts) -> list[UnreadableRow] | None:
            return encode(self.model, replace(task, title=title), parts, self.settings)

        return self._made(path, images, record, Kind(_write_records, _are_records), title)

    def _made(self, path: Path, images: ImageSet, work: Work, kind: Kind, title: str) -> SetValues:
        """Return what a folder stores; unless it is there, all ranks make its parts and the first one joins them.

        An error on one rank ends the work on all.
        """
        if distributed.maximum(int(not self._finished(path, len(images), kind))):
            self._make(Parts(path, self.settings_text), images, work, kind, title)
        stored = self._stored(path, len(images), kind)
        if stored is None:
            raise InputError(f"{path}: {GONE}; run the command again")
        return stored

    def _make(self, parts: Parts, images: ImageSet, work: Work, kind: Kind, title: str) -> None:
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
                self._join(parts, images, unreadable, kind)
        except InputError as raised:
            error = raised
        if distributed.maximum(int(error is not None)):  # a barrier, too: the file is there afterwards
            raise error or InputError(f"{title}: see the error of another process")

    def _join(self, parts: Parts, images: ImageSet, unreadable: Sequence[UnreadableRow], kind: Kind) -> None:
        path, size = parts.output, len(images)
        skipped = [(bad.row, without_secrets(images.key(bad.row)), bad.message) for bad in unreadable]
        require(len(skipped) < size, f"none of {size} images could be read; {skipped[0][2] if skipped else ''}")
        try:
            with replacing_folder(path) as draft:
                kind.write(draft / VALUES, parts, sorted(set(range(size)) - {row for row, _, _ in skipped}))
                content = {"digest": _digest(draft / VALUES, skipped), "skipped": skipped}
                (draft / CONTENT).write_text(json.dumps(content), encoding="utf-8")
                if not self._finished(path, size, kind):  # another run may have been quicker
                    remove(path)
        except InputError:
            if not self._finished(path, size, kind):
                raise
        remove_drafts(path)
        parts.remove()

    def _finished(self, path: Path, size: int, kind: Kind) -> bool:
        """Return whether all images are stored, except for unreadable ones that may be skipped."""
        stored = self._stored(path, size, kind)
        return stored is not None and (not stored.skipped or self.settings.on_error == "skip")

    def _stored(self, path: Path, size: int, kind: Kind) -> SetValues | None:
        """Read what is stored of a set of ``size`` images; None if it is missing or damaged."""
        try:
            with reading(path, "folder of a set"):
                content = read_json(path / CONTENT)
                check_is_file(path / VALUES)
                if path not in self._whole and content["digest"] != _digest(path / VALUES, content["skipped"]):
                    raise ValueError("it has other values")
                self._whole.add(path)
                listed = convert(content["skipped"], list[tuple[Count, str, str]])
                skipped = {row: (key, message) for row, key, message in listed}
                rows = [row for row in range(size) if row not in skipped]
                values = np.lib.format.open_memmap(path / VALUES, mode="r")
                if not kind.fits(values, rows):
                    raise ValueError(f"it has {values.dtype} {list(values.shape)}")
        except InputError:
            return None
        return SetValues(values, rows, list(skipped.values()))


def _digest(file: Path, skipped: Sequence[Sequence[Any]]) -> str:
    return hex_digest([sha256_of_file(file), json.dumps(skipped)])


def _write_features(file: Path, parts: Parts, rows: Sequence[int]) -> None:
    """Write the features of all parts in the order of the rows, ``[N, W + D]``."""
    place = {row: number for number, row in enumerate(rows)}
    stored: Any = None
    filled = np.zeros(len(rows), dtype=bool)
    for table in parts.read(FeatureTable.of):
        if stored is None:
            stored = np.lib.format.open_memmap(file, "w+", np.float32, (len(rows), table.features.shape[1]))
            if hasattr(os, "posix_fallocate"):  # not on macOS; without it a full disk ends the process
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        numbers = [place[int(key)] for key, _, _ in table.identities]
        filled[numbers] = True
        stored[numbers] = table.features
    require(bool(filled.all()), f"{parts.output.parent}: {GONE}")
    stored.flush()


def _are_records(values: np.ndarray, rows: Sequence[int]) -> bool:
    plain = values.dtype == np.int64 and values.ndim == 2 and values.shape[1] > 1
    return plain and bool(np.isin(values[:, 0], rows).all())


def _write_records(file: Path, parts: Parts, rows: Sequence[int]) -> None:
    """Write the records of all parts in the order of the rows, ``[K, 1 + m]``."""
    found = list(parts.read(dict))
    require(sum(len(arrays["rows"]) for arrays in found) == len(rows), f"{parts.output.parent}: {GONE}")
    values = np.concatenate([arrays["values"] for arrays in found])
    np.save(file, values[values[:, 0].argsort(kind="stable")])


def _part(images: PartOf, whole: SetFeatures) -> SetFeatures:
    place = {row: number for number, row in enumerate(whole.rows)}
    rows = [row for row, row_of_whole in enumerate(images.rows) if row_of_whole in place]
    numbers = [place[images.rows[row]] for row in rows]
    own = {images.whole.key(row) for row in images.rows} if whole.skipped else set()
    skipped = [(key, reason) for key, reason in whole.skipped if key in own]
    return SetFeatures(whole.before[numbers], whole.after[numbers], rows, skipped)
