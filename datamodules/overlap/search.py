"""Reading two sets of images for their overlap: features and looks of the one, then the nearest of the other.

Shapes: Q images of the evaluation set (an item may have several, the frames of a video), B images of a batch of the
training set, D embedding dimension.
"""

import io
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.look_index import LookIndex, Looks
from datamodules.near_duplicates import Look, look_of
from datamodules.pairs.source import LISTED, PairSource
from lit_clip.errors import BadSample, InputError, require
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.overlap import NearestImages, nearer, nowhere
from lit_clip.models.clip import CLIP
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import progress
from lit_clip.tools.images import open_image
from lit_clip.tools.workers import loader

SECONDS_BETWEEN_SAVES = 60  # of work that a killed run can lose


class Readable(Protocol):
    """Images by row, with a name for the user."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(self, row: int) -> tuple[str, list[Image.Image]]:
        """How the user knows a row, and its images.

        Raises:
            InputError: it cannot be read.
        """
        ...


class SetRows:
    """The items of an evaluation set."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> tuple[str, list[Image.Image]]:
        name = self.images.key(row)
        try:
            found = self.images.images(row)
        except BadSample:
            raise
        except Exception as error:  # decoders answer a broken file with whatever they trip over
            raise BadSample(name, "cannot be read", str(error).partition("\n")[0]) from error
        require(bool(found), f"{name}: has no image")
        return name, found


class SourceRows:
    """The images of a training set, without their captions."""

    def __init__(self, source: PairSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, row: int) -> tuple[str, list[Image.Image]]:
        stored = self.source.read(row)
        return stored.where, [open_image(io.BytesIO(stored.image), stored.where)]


class Seen(NamedTuple):
    """Some consecutive rows.

    Attributes:
        images: uint8 ``[B, 3, H, W]``, or None if none could be read.
        looks: of each of those.
        rows: of each of those.
        names: likewise.
        bad: reason and the whole line of each row that could not be read.
        last: the row after these.
    """

    images: Tensor | None
    looks: list[Look]
    rows: list[int]
    names: list[str]
    bad: list[tuple[str, str]]
    last: int


class RowBatches(Dataset[Seen]):
    """One item is one batch, from row ``first`` on, decoded and cropped."""

    def __init__(self, data: Readable, preprocessing: Preprocessing, batch_size: int, first: int = 0) -> None:
        require(batch_size >= 1, f"--batch_size {batch_size} must be at least 1")
        self.data, self.batch_size, self.first = data, batch_size, first
        self.transform = pixels(preprocessing)

    def __len__(self) -> int:
        return -(-(len(self.data) - self.first) // self.batch_size)

    def __getitem__(self, number: int) -> Seen:
        start = self.first + number * self.batch_size
        stop = min(start + self.batch_size, len(self.data))
        pixels: list[Tensor] = []
        seen = Seen(None, [], [], [], [], stop)
        with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd files would flood the terminal
            for row in range(start, stop):
                try:
                    name, images = self.data.read(row)
                except InputError as error:
                    reason = error.reason if isinstance(error, BadSample) else "cannot be read"
                    seen.bad.append((reason, str(error)))
                    continue
                for image in images:
                    pixels.append(self.transform(image))
                    seen.looks.append(look_of(image))
                    seen.rows.append(row)
                    seen.names.append(name)
        return seen._replace(images=torch.stack(pixels)) if pixels else seen


@torch.no_grad()
def encoded(
    model: CLIP, batches: RowBatches, batch_size: int, num_workers: int, title: str
) -> Iterator[tuple[Seen, Tensor]]:
    """Every batch with its unit features, float32 ``[B, D]`` on the model's device; ``batch_size`` at once."""
    with progress(title, len(batches.data)) as advance:
        done = batches.first
        advance(done)
        dataset: Any = batches
        for seen in loader(dataset, num_workers):
            features = torch.empty(0, model.config.embed_dim, device=model.device)
            if seen.images is not None:
                parts = seen.images.split(batch_size)
                unit = [model.encode_image(model.normalize(part.to(model.device)), normalize=True) for part in parts]
                features = torch.cat(unit).float()
            yield seen, features
            advance(seen.last - done)
            done = seen.last


@dataclass
class Queries:
    """The images of an evaluation set that could be read.

    Attributes:
        features: float32 ``[Q, D]``, of unit length.
        looks: of each.
        items: int64 ``[Q]``, the item that each belongs to, rising.
        bad: the line of each item that could not be read.
    """

    features: Tensor
    looks: Looks
    items: np.ndarray
    bad: list[str]

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        columns = {"bits": self.looks.bits, "colours": self.looks.colours, "plain": self.looks.plain}
        _save(path, {"bad": self.bad}, features=self.features.numpy(), items=self.items, **columns)

    @classmethod
    def load(cls, path: Path) -> "Queries | None":
        """What :meth:`save` wrote; None if that is not there or not readable."""
        found = _load(path, "bad", "features", "items", "bits", "colours", "plain")
        if found is None:
            return None
        said, arrays = found
        looks = Looks(arrays["bits"], arrays["colours"], arrays["plain"])
        return cls(torch.from_numpy(arrays["features"]), looks, arrays["items"], said["bad"])

    @classmethod
    def compute(cls, model: CLIP, images: ImageSet, batch_size: int, num_workers: int, title: str) -> "Queries":
        """Read and encode a set.

        Raises:
            InputError: nothing of it can be read, or the model gives no numbers.
        """
        rows = 1 if images.several else batch_size
        batches = RowBatches(SetRows(images), model.preprocessing, rows)
        features, looks, items, bad = [torch.empty(0, model.config.embed_dim)], [], [], []
        for seen, batch_features in encoded(model, batches, batch_size, num_workers, title):
            features.append(batch_features.cpu())
            looks += seen.looks
            items += seen.rows
            bad += [line for _, line in seen.bad]
        require(bool(items), f"{title}: none of {len(images)} images can be used; {bad[0] if bad else 'it is empty'}")
        joined = torch.cat(features)
        require(
            bool(joined.isfinite().all()), f"{title}: the model gives features that are no numbers; its weights are"
        )
        return cls(joined, Looks.of(looks), np.array(items, np.int64), bad)


def joined(queries: Sequence[Queries]) -> Queries:
    """Several sets as one, so that the training set is read once for all."""
    looks = [each.looks for each in queries]
    columns = (np.concatenate([getattr(look, name) for look in looks]) for name in ("bits", "colours", "plain"))
    items = np.concatenate([each.items for each in queries])
    return Queries(torch.cat([each.features for each in queries]), Looks(*columns), items, [])


@dataclass
class NearestFound:
    """The nearest training image of each image of an evaluation set, as far as the training set has been read.

    Attributes:
        nearest: by features, on the model's device.
        names: of the nearest, how the user knows it.
        look_rows: the first training image of the same look, int64 ``[Q]``; -1: none.
        look_names: likewise.
        done: training rows that have been read.
        reasons: those that could not be read, by reason.
        bad: the line of the first ``LISTED`` of them.
    """

    nearest: NearestImages
    names: list[str]
    look_rows: np.ndarray
    look_names: list[str]
    done: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    @classmethod
    def nothing(cls, size: int, device: torch.device) -> "NearestFound":
        """What is found of ``size`` images before any is read."""
        return cls(nowhere(size, device), [""] * size, np.full(size, -1), [""] * size)

    def add(self, queries: Tensor, index: LookIndex, seen: Seen, features: Tensor) -> None:
        """Look at a batch of training images."""
        if seen.rows:
            after = nearer(self.nearest, queries, features, torch.tensor(seen.rows, device=features.device))
            names = dict(zip(seen.rows, seen.names, strict=True))
            for query in (after.row != self.nearest.row).nonzero()[:, 0].tolist():
                self.names[query] = names[int(after.row[query])]
            self.nearest = after  # after the names: an interrupted search comes to this batch again
            self._add_looks(index, seen)
        for reason, line in seen.bad:
            self.reasons[reason] += 1
            if len(self.bad) < LISTED:
                self.bad.append(line)
        self.done = seen.last

    def _add_looks(self, index: LookIndex, seen: Seen) -> None:
        ours, others = index.like(Looks.of(seen.looks))
        for query, other in sorted(zip(ours.tolist(), others.tolist(), strict=True)):
            if self.look_rows[query] < 0:
                self.look_names[query], self.look_rows[query] = seen.names[other], seen.rows[other]

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        said = {"names": self.names, "look_names": self.look_names, "bad": self.bad}
        said |= {"done": self.done, "reasons": dict(self.reasons)}
        arrays = {"similarity": self.nearest.similarity.cpu().numpy(), "row": self.nearest.row.cpu().numpy()}
        _save(path, said, look_rows=self.look_rows, **arrays)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "NearestFound | None":
        """What :meth:`save` wrote; None if that is not there or not readable."""
        found = _load(path, "names", "look_names", "bad", "done", "reasons", "similarity", "row", "look_rows")
        if found is None:
            return None
        said, arrays = found
        nearest = NearestImages(*(torch.from_numpy(arrays[name]).to(device) for name in NearestImages._fields))
        reasons = Counter(said["reasons"])
        look = (arrays["look_rows"], said["look_names"])
        return cls(nearest, said["names"], *look, said["done"], reasons, said["bad"])


def search(
    model: CLIP, queries: Queries, source: PairSource, path: Path, batch_size: int, num_workers: int
) -> NearestFound:
    """Read the whole training set once, or what an interrupted search has left of it.

    Args:
        model: where it is to compute.
        queries: of the evaluation sets.
        source: the training set.
        path: where to keep what is found so far.
        batch_size: images encoded at once.
        num_workers: processes that decode.

    Raises:
        InputError: not a single training image can be read.
    """
    found = NearestFound.load(path, model.device) or NearestFound.nothing(len(queries.items), model.device)
    if found.done >= len(source):
        return found
    features, index = queries.features.to(model.device), LookIndex(queries.looks)
    batches = RowBatches(SourceRows(source), model.preprocessing, batch_size, found.done)
    saved = time.monotonic()
    try:
        for seen, batch_features in encoded(model, batches, batch_size, num_workers, "training images"):
            found.add(features, index, seen, batch_features)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                found.save(path)
                saved = time.monotonic()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is found is kept; the same command goes on from there") from None
    finally:
        found.save(path)
    first = found.bad[0] if found.bad else ""
    require(bool((found.nearest.row >= 0).any()), f"none of {len(source)} training images can be read; {first}")
    return found


def _save(path: Path, said: dict[str, Any], **arrays: Any) -> None:
    text = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)  # an array of str would pad them all
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, said=text, **arrays)


def _load(path: Path, *wanted: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What :func:`_save` wrote; None: not there, not readable, or something is wanting."""
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        said = json.loads(arrays.pop("said").tobytes())
        return (said, arrays) if said.keys() | arrays.keys() == set(wanted) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
