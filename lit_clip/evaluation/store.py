"""Image features of a set: computed once by any number of processes, kept on disk, and never mixed up.

Shapes: N images that could be read, W features before the projection, D after it.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
import torch

from lit_clip import distributed
from lit_clip.embedding.batch_size import BatchSize, image_batch_size
from lit_clip.embedding.encode import Precision, UnreadableError, encode, start_processes
from lit_clip.embedding.feature_files import FeatureParts
from lit_clip.embedding.image_files import Item
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.set_encoding import SetEncoder
from lit_clip.models.clip import CLIP
from lit_clip.tools.images import Bad, OnError
from lit_clip.weights.fingerprint import fingerprint

ARRAYS = ("before", "after")


class SetFeatures(NamedTuple):
    """What was computed of a set, read from disk as it is needed.

    Attributes:
        before: float32 ``[N, W]``, before the projection.
        after: float32 ``[N, D]``, of unit length; of several images their mean.
        rows: the images that could be read, ascending.
        skipped: key and reason of the others.
    """

    before: np.ndarray
    after: np.ndarray
    rows: list[int]
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class Settings:
    """How features are computed; all but ``precision`` changes nothing but the time it takes."""

    batch_size: BatchSize = 64
    num_workers: int = 4
    devices: int = 1
    accelerator: str = "auto"
    precision: Precision = "32-true"
    on_error: OnError = "error"


class FeatureStore:
    """A model's image features, in a folder.

    Args:
        model: whose; its weights must not change.
        folder: is made if it is not there.
        settings: how to compute.
    """

    def __init__(self, model: CLIP, folder: Path, settings: Settings) -> None:
        self.model, self.folder, self.settings = model, folder, settings
        self.fingerprint = fingerprint(model)
        self._paths: WeakKeyDictionary[ImageSet, Path] = WeakKeyDictionary()

    def start(self) -> torch.device:
        """Start the other processes, or join them; return this one's device."""
        settings = self.settings
        return start_processes(settings.devices, settings.accelerator, settings.precision).strategy.root_device

    def _batch_size(self) -> int:
        """As asked for, or tried out once; all ranks must ask."""
        settings = self.settings
        if settings.batch_size != "auto":
            return settings.batch_size
        trainer = start_processes(settings.devices, settings.accelerator, settings.precision)
        found = image_batch_size(self.model, trainer, settings.num_workers)
        self.settings = replace(settings, batch_size=found)
        return found

    def path(self, images: ImageSet) -> Path:
        """The folder of a set's features: another one once the model, the images or the arithmetic are others."""
        if images not in self._paths:  # a stamp may be of a million files
            kind = f"{type(images).__module__}.{type(images).__qualname__}"
            try:
                said = (self.fingerprint.model, self.settings.precision, kind, images.stamp(), len(images))
            except OSError as error:
                raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
            self._paths[images] = self.folder / sha256(repr(said).encode()).hexdigest()[:32]
        return self._paths[images]

    def compute(self, images: ImageSet, title: str) -> None:
        """See to it that :meth:`read` finds the features; all ranks must ask, in the same order.

        Raises:
            InputError: on every rank, an image that cannot be read unless ``on_error`` is ``skip``, or no image.
        """
        require(len(images) > 0, f"{title}: the set is empty")
        path = self.path(images)
        if not distributed.maximum(int(not self._finished(path, len(images)))):
            return
        error = None
        try:
            bad = self._encode(images, path, title)
            if bad is not None and distributed.rank_and_world()[0] == 0:
                self._keep(path, images, bad)
        except InputError as raised:
            error = raised
        if distributed.maximum(int(error is not None)):  # and none goes on before the arrays are there
            raise error or InputError(f"{title}: another process says why")

    def _parts(self, path: Path) -> FeatureParts:
        return FeatureParts(path, f"{self.fingerprint.model} {self.settings.precision}")

    def _encode(self, images: ImageSet, path: Path, title: str) -> list[Bad] | None:
        """Make parts of all that is not there yet; see :func:`lit_clip.embedding.encode.encode`.

        Raises:
            RuntimeError: from an error of this rank alone, while the others are in the middle of it.
        """
        settings, batch_size = self.settings, self._batch_size()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return encode(
                self.model,
                [Item(str(row)) for row in range(len(images))],
                self._parts(path),
                {},
                batch_size=1 if images.several else batch_size,
                num_workers=settings.num_workers,
                on_error=settings.on_error,
                devices=settings.devices,
                accelerator=settings.accelerator,
                precision=settings.precision,
                encoder=partial(SetEncoder, images, batch_size),
                title=title,
            )
        except UnreadableError:
            raise
        except (InputError, OSError) as error:
            ours = error if isinstance(error, InputError) else _not_written(path.parent, error)
            if distributed.rank_and_world()[1] > 1:  # to go on with the next set would be to wait for each other
                raise RuntimeError("a process has to leave the others") from ours
            raise ours from error

    def _finished(self, path: Path, size: int) -> bool:
        """Whether all is there, and whatever could not be read may stay out."""
        kept = self._kept(path, size)
        return kept is not None and (not kept.skipped or self.settings.on_error == "skip")

    def _kept(self, path: Path, size: int) -> SetFeatures | None:
        """What is there of ``size`` images; None: nothing, or what somebody has damaged, which is made anew."""
        try:
            found = json.loads((path / "skipped.json").read_text(encoding="utf-8"))
            skipped = {int(row): (str(key), str(reason)) for row, key, reason in found}
            before, after = (np.lib.format.open_memmap(path / f"{name}.npy", mode="r") for name in ARRAYS)
        except (OSError, ValueError, TypeError):
            return None
        rows = [row for row in range(size) if row not in skipped]
        fits = all(
            array.ndim == 2 and array.dtype == np.float32 and len(array) == len(rows) for array in (before, after)
        )
        whole = fits and after.shape[1] == self.model.config.embed_dim
        return SetFeatures(before, after, rows, list(skipped.values())) if whole else None

    def _keep(self, path: Path, images: ImageSet, bad: Sequence[Bad]) -> None:
        """Turn finished parts into arrays."""
        skipped = sorted((int(item.key), images.key(int(item.key)), item.reason) for item in bad)
        try:
            self._join(path, self._parts(path), len(images), skipped)
        except OSError as error:
            if not self._finished(path, len(images)):  # another run has not been quicker
                raise _not_written(path, error) from error

    def _join(self, path: Path, parts: FeatureParts, size: int, skipped: list[tuple[int, str, str]]) -> None:
        """The arrays get their names when they are whole."""
        require(len(skipped) < size, f"none of {size} images could be read; {skipped[0][2] if skipped else ''}")
        rows = sorted(set(range(size)) - {row for row, _, _ in skipped})
        place = {row: number for number, row in enumerate(rows)}
        draft = path.with_name(f".{path.name}.{uuid4().hex[:8]}.draft")
        draft.mkdir()
        arrays: dict[str, np.ndarray] = {}
        filled = np.zeros(len(rows), dtype=bool)
        for table in parts.tables():
            for name, values in zip(ARRAYS, self._divided(table.features), strict=True):
                if name not in arrays:
                    shape = (len(rows), values.shape[1])
                    arrays[name] = np.lib.format.open_memmap(draft / f"{name}.npy", "w+", np.float32, shape)
                numbers = [place[int(key)] for key, _, _ in table.identities]
                arrays[name][numbers] = values
                filled[numbers] = True
        if bool(filled.all()) and not self._finished(path, size):
            for array in arrays.values():
                array.flush()  # pyright: ignore[reportAttributeAccessIssue]  # a memmap, which open_memmap does not say
            (draft / "skipped.json").write_text(json.dumps(skipped), encoding="utf-8")
            with suppress(OSError):  # of another run that was quicker
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
                draft.rename(path)
        for left in path.parent.glob(f".{path.name}.*.draft"):  # by runs that have been killed too
            shutil.rmtree(left, ignore_errors=True)
        parts.remove()
        if not self._kept(path, size):
            raise InputError(f"{path}: features are gone; another run with the same cache has ended meanwhile")

    def _divided(self, features: np.ndarray) -> Iterator[np.ndarray]:
        embed_dim = self.model.config.embed_dim
        yield features[:, :-embed_dim]
        yield features[:, -embed_dim:]

    def read(self, images: ImageSet) -> SetFeatures:
        """What :meth:`compute` has left."""
        path = self.path(images)
        kept = self._kept(path, len(images))
        if kept is None:
            raise InputError(f"{path}: features are gone; run the command again")
        return kept


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{error.filename or path}: cannot be written ({error.strerror or error})")
