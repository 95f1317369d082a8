"""Search a training set for images of evaluation sets: compute their features and looks, then find the nearest.

Shapes: Q images of the evaluation sets (an item may have several: the frames of a video), D embedding dimension.
"""

import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.embedding.parts import Arrays, json_array, json_value, load_arrays, save_arrays
from lit_clip.embedding.precision import Precision
from lit_clip.embedding.reading import EncoderBatch, check_finite, encoded_batches, image_features, in_batches
from lit_clip.errors import require
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.overlap import NearestImages, nearer, nearest_of_set, nowhere
from lit_clip.evaluation.set_encoding import SetRows
from lit_clip.models.clip import CLIP
from lit_clip.tools.images import image_for_model
from ..near_duplicates import Look, LookIndex, Looks, look_of
from ..pairs.batches import SourcePairs
from ..pairs.source import LISTED, PairSource

SECONDS_BETWEEN_SAVES = 60  # of work that a killed run can lose
LEAST_KEPT = 0.9  # similarity from which all training images are remembered, not only the nearest
LEAK = np.dtype([("row", "i8"), ("set", "i4"), ("query", "i4"), ("similarity", "f4")])  # NaN: the same look


class SourceRows(SourcePairs):
    """The images of a source of pairs, without captions."""

    def read(self, row: int) -> tuple[str, list[Image.Image]]:
        stored = self.source.read(row)
        return stored.where, [image_for_model(io.BytesIO(stored.image), stored.where)]


def _note(row: int, name: str, image: Image.Image) -> tuple[Look, str]:
    return look_of(image), name


@dataclass
class Queries:
    """The readable images of an evaluation set."""

    features: Tensor  # float32 [Q, D], of unit length
    looks: Looks
    items: np.ndarray  # int64 [Q], the item that each image belongs to, ascending
    bad: list[str]  # the line of each item that could not be read
    sizes: tuple[int, ...] = ()  # images of each set, if these are several sets' images

    @property
    def parts(self) -> Iterator[slice]:
        """Return the range of each set's images."""
        ends = np.cumsum(self.sizes or (len(self.items),)).tolist()
        return map(slice, [0, *ends], ends)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        arrays = {"features": self.features.numpy(), "items": self.items, "bad": json_array(self.bad)}
        save_arrays(path, "", {**arrays, **vars(self.looks)})

    @classmethod
    def load(cls, path: Path) -> "Queries | None":
        """Read the file of :meth:`save`; None if it is missing or damaged."""

        def make(found: Arrays) -> Queries:
            looks = Looks(found["bits"], found["colours"], found["plain"])
            return cls(torch.from_numpy(found["features"]), looks, found["items"], json_value(found["bad"]))

        return load_arrays(path, "", make)

    @classmethod
    def compute(
        cls,
        model: CLIP,
        images: ImageSet,
        title: str,
        batch_size: int,
        num_workers: int,
        precision: Precision = "32-true",
    ) -> "Queries":
        """Read and encode a set."""
        batches = in_batches(range(len(images)), 1 if images.several else batch_size)
        encode = image_features(model, precision)
        features = [torch.empty(0, model.config.embed_dim)]
        looks = []
        items = []
        bad = []
        for batch, encoded in encoded_batches(
            model, SetRows(images), batch_size, num_workers, encode=encode, batches=batches, note=_note, title=title
        ):
            features.append(encoded.cpu())
            looks += [look for look, _ in batch.notes]
            items += [row for row, count in zip(batch.rows, batch.counts, strict=True) for _ in range(count)]
            bad += [row.message for row in batch.unreadable]
        require(bool(items), f"{title}: none of {len(images)} images can be read; {bad[0] if bad else 'it is empty'}")
        joined = torch.cat(features)
        check_finite(joined, title)
        return cls(joined, Looks.of(looks), np.array(items, np.int64), bad)


def joined(queries: Sequence[Queries]) -> Queries:
    """Join several sets, so that the training set is read once for all of them."""
    looks = [each.looks for each in queries]
    columns = (np.concatenate(each) for each in zip(*(vars(look).values() for look in looks), strict=True))
    items = np.concatenate([each.items for each in queries])
    sizes = tuple(len(each.items) for each in queries)
    return Queries(torch.cat([each.features for each in queries]), Looks(*columns), items, [], sizes)


@dataclass
class NearestFound:
    """The nearest training image of each query, among the training images read so far."""

    nearest: NearestImages  # by features, on the model's device
    names: list[str]  # the user's names for the nearest images
    look_rows: np.ndarray  # the first training image with the same look, int64 [Q]; -1: none
    look_names: list[str]  # the user's names for these images
    done: int = 0  # training rows that have been read
    reasons: Counter[str] = field(default_factory=Counter)  # of unreadable ones
    bad: list[str] = field(default_factory=list)  # messages about the first LISTED of these
    leaks: list[np.ndarray] = field(default_factory=list)  # LEAK; an image that is in a set twice is there twice

    def add(self, queries: Queries, index: LookIndex, batch: EncoderBatch, features: Tensor, least: float) -> None:
        """Compare a batch of training images with the queries; record leaks of at least the similarity ``least``."""
        if batch.rows:
            unit = queries.features
            after = nearer(self.nearest, unit, features, torch.tensor(batch.rows, device=features.device))
            names = {row: name for row, (_, name) in zip(batch.rows, batch.notes, strict=True)}
            for query in (after.row != self.nearest.row).nonzero()[:, 0].tolist():
                self.names[query] = names[int(after.row[query])]
            self.nearest = after  # after the names: an interrupted search reads this batch again
            for number, part in enumerate(queries.parts):
                near = nearest_of_set(unit[part], features)
                seen = (near.similarity >= least).nonzero()[:, 0].tolist()
                columns = ((batch.rows[at], number, part.start + int(near.row[at]), near.similarity[at]) for at in seen)
                self.leaks.append(np.array(list(columns), LEAK))
            self._add_looks(index, batch, queries)
        for bad in batch.unreadable:
            self.reasons[bad.reason] += 1
            if len(self.bad) < LISTED:
                self.bad.append(bad.message)
        self.done += len(batch.rows) + len(batch.unreadable)

    def _add_looks(self, index: LookIndex, batch: EncoderBatch, all_queries: Queries) -> None:
        queries, images = index.like(Looks.of([look for look, _ in batch.notes]))
        of_set = np.repeat(np.arange(len(all_queries.sizes or (1,))), all_queries.sizes or (len(all_queries.items),))
        looks: dict[tuple[int, int], int] = {}  # the first query by image and set
        for query, image in sorted(zip(queries.tolist(), images.tolist(), strict=True)):
            looks.setdefault((batch.rows[image], int(of_set[query])), query)
            if self.look_rows[query] < 0:
                self.look_names[query], self.look_rows[query] = batch.notes[image][1], batch.rows[image]
        self.leaks.append(np.array([(*found, query, np.nan) for found, query in looks.items()], LEAK))

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        values = {name: getattr(self, name) for name in ("names", "look_names", "done", "reasons", "bad")}
        nearest = {name: column.cpu().numpy() for name, column in self.nearest._asdict().items()}
        arrays = {"leaks": np.concatenate([np.zeros(0, LEAK), *self.leaks]), "look_rows": self.look_rows}
        save_arrays(path, "", {**nearest, **arrays, "values": json_array(values)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "NearestFound | None":
        """Read the file of :meth:`save`; None if it is missing or damaged."""

        def make(found: Arrays) -> NearestFound:
            values = json_value(found["values"])
            nearest = NearestImages(*(torch.from_numpy(found[name]).to(device) for name in NearestImages._fields))
            counted = values | {"reasons": Counter(values["reasons"]), "leaks": [found["leaks"]]}
            return cls(nearest, look_rows=found["look_rows"], **counted)

        return load_arrays(path, "", make)


def search(
    model: CLIP,
    queries: Queries,
    source: PairSource,
    path: Path,
    batch_size: int,
    num_workers: int,
    precision: Precision = "32-true",
    least: float = LEAST_KEPT,
) -> NearestFound:
    """Find each query's nearest training image in one pass, or resume the search saved at ``path``.

    All training images that look like a query, or have at least the similarity ``least`` to one, are the leaks.
    """
    size, device = len(queries.items), model.device
    found = NearestFound.load(path, device)
    found = found or NearestFound(nowhere(size, device), [""] * size, np.full(size, -1), [""] * size)
    if found.done >= len(source):
        return found
    queries, index = replace(queries, features=queries.features.to(device)), LookIndex(queries.looks)
    batches = in_batches(range(found.done, len(source)), batch_size)
    encode, rows = image_features(model, precision), SourceRows(source)
    saved = time.monotonic()
    try:
        for batch, encoded in encoded_batches(
            model, rows, batch_size, num_workers, encode=encode, batches=batches, note=_note, title="training images"
        ):
            if batch.rows:  # the largest similarity of a batch with NaN is NaN, which would hide its other images
                check_finite(encoded, batch.notes[0][1])
            found.add(queries, index, batch, encoded, least)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                found.save(path)
                saved = time.monotonic()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was found is kept; run the same command again to resume") from None
    finally:
        found.save(path)
    first = found.bad[0] if found.bad else ""
    require(bool((found.nearest.row >= 0).any()), f"none of {len(source)} training images can be read; {first}")
    return found
