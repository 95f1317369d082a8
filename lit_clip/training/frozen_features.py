"""Encode every image and caption once through frozen layers or a teacher, and store the results in files.

A file belongs to one fingerprint: of the frozen weights, the preprocessing, the place where the frozen layers end, the
precision, and the images or captions themselves. Another fingerprint is another folder.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.distributed import barrier, rank_and_world
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import described
from lit_clip.models.finetuning import frozen_modules
from lit_clip.models.fingerprint import tensors_sha256
from lit_clip.models.frozen_prefix import FrozenPrefix, frozen_activations, sample_inputs
from lit_clip.models.layers import tower_parameters
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.hashing import hash64, hex_digest
from lit_clip.tools.stored_rows import ABSENT, StoredRows

LAYOUT = 1  # a new number makes old files be written again
VERSIONS, IMAGES = 4, 8_000  # of each image, and of all images, from which heads alone learn


def versions_of(images: int, versions: int) -> int:
    """Return how many stored versions of each image are used to train the heads alone."""
    return max(1, min(versions, VERSIONS, IMAGES // max(1, images)))


class Encoding(NamedTuple):
    """A model in evaluation mode, with a precision context for each batch, to compute frozen layers."""

    model: CLIP
    context: Callable[[], AbstractContextManager[Any]]
    precision: str
    batch_size: int

    def activations(self, prefix: FrozenPrefix, inputs: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Compute :func:`lit_clip.models.frozen_prefix.frozen_activations` in the run's precision."""
        with torch.no_grad(), self.context():
            return frozen_activations(self.model, prefix, inputs.to(self.model.device), lengths)


class Texts(NamedTuple):
    """Distinct captions: padded tokens, int64 ``[N, L]``, their lengths, and ascending hashes ``[N]``.

    The hashes are those of the tokens, or for a teacher of the texts.
    """

    tokens: Tensor
    lengths: np.ndarray
    hashes: np.ndarray


class ImageBatch(NamedTuple):
    """Images to encode, uint8 ``[B, 3, H, W]``, their rows in the file, and the rows of unreadable images."""

    rows: np.ndarray
    images: Tensor
    unusable: list[int]


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """Hash each text, int64 ``[N]``."""
    return np.frombuffer(b"".join(map(hash64, texts)), dtype=np.int64)


def token_hashes(tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Hash each text's tokens, int64 ``[N]``."""
    rows = tokens.numpy()
    found = [hash64(rows[row, :length].tobytes()) for row, length in enumerate(lengths)]
    return np.frombuffer(b"".join(found), dtype=np.int64)


class StoredTexts(NamedTuple):
    """A file of stored activations of captions."""

    hashes: np.ndarray  # of the tokens of each row, or for a teacher of the text, int64 ascending
    stored: StoredRows
    longest: int  # tokens of the longest caption; a row may also have entries for a class token and padding

    @property
    def nothing(self) -> Tensor:
        shape = self.stored.shape
        return torch.zeros(0, *[1] * (len(shape) - 1), shape[-1], dtype=self.stored.dtype)

    def of(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the activations of captions ``[N, ...]``."""
        rows, shape = self._rows(token_hashes(tokens, lengths)), self.stored.shape
        found = self.stored.read(rows, max(lengths) + shape[0] - self.longest if len(shape) == 2 else None)
        assert found is not None, "checked before training"
        return found

    def of_text(self, text: str) -> Tensor:
        """Return stored features of a caption by its text."""
        found = self.stored.read(self._rows(text_hashes([text])))
        assert found is not None, "checked before training"
        return found[0]

    def _rows(self, wanted: np.ndarray) -> np.ndarray:
        rows = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        if not np.array_equal(self.hashes[rows], wanted):
            raise InputError(
                "FrozenFeatures: a caption is not among those that the data list, so it was not encoded; train all of "
                "the text encoder, or remove the callback"
            )
        return rows


class StoredTeacher(NamedTuple):
    """Stored features of training images and captions by a teacher.

    ``texts`` is None for captions that are made up at random.
    """

    name: str | None
    images: StoredRows
    texts: StoredTexts | None


class StoredImages(NamedTuple):
    """Files with the encoded images, and the file row of each sample.

    ``stored`` are activations; None: none of the image encoder is frozen, and images are decoded.
    """

    rows: Any  # datamodules.pairs.stored_features.DistinctImageRows
    stored: StoredRows | None
    teachers: Sequence[StoredTeacher] = ()


def frozen_sha256(model: CLIP, prefix: FrozenPrefix, precision: str) -> str:
    """Return a digest of everything that a tower's frozen layers depend on, except their input."""
    parameters = tower_parameters(model, prefix.tower)
    tensors: dict[str, Tensor] = {name: value for name, value in parameters.items() if not value.requires_grad}
    for name, module in frozen_modules(model).items():
        if f"{name}.".startswith("visual.") == (prefix.tower == "image"):
            tensors |= {f"{name}.{key}": value for key, value in module.named_buffers()}
    settings = sorted(described(model.config).items())
    return hex_digest([LAYOUT, tensors_sha256(tensors), settings, tuple(prefix), precision])


def open_rows(
    encoding: Encoding, prefix: FrozenPrefix, folder: Path, rows: int, identity: str, longest: int = 0
) -> StoredRows:
    """Open or create the file of a tower's activations for images or captions of at most ``longest`` tokens."""
    inputs, lengths = sample_inputs(encoding.model, prefix.tower, 1)
    example = encoding.activations(prefix, inputs, lengths)
    shape = list(example.shape[1:])
    if prefix.tower == "text" and len(shape) > 1:
        shape[0] += longest - lengths[0]  # there may be a class token too
    key = hex_digest([frozen_sha256(encoding.model, prefix, encoding.precision), identity])
    return StoredRows.create(folder / f"{prefix.tower}-{key[:20]}", rows, shape, example.dtype)


def my_share(stored: StoredRows) -> np.ndarray:
    """Return this rank's share of the rows to encode, int64 ``[n]``: absent and damaged rows; a collective."""
    rank, world = rank_and_world()
    mine, damaged = np.arange(stored.rows)[rank::world], 0
    with progress("checking stored features", len(mine), rank == 0) as advance:
        for compared, found in stored.remove_damaged(mine):
            advance(compared)
            damaged += found
    if damaged:
        stderr().print(f"{stored.folder}: {damaged} of {len(mine)} stored rows are damaged and encoded again")
    barrier()  # all ranks have compared
    absent = np.flatnonzero(stored.state() == ABSENT)
    barrier()  # no rank may write before all know
    return absent[rank::world]


def store_images(
    encoding: Encoding, prefix: FrozenPrefix, stored: StoredRows, batches: Iterable[ImageBatch], total: int
) -> None:
    """Encode ``total`` images into a file."""
    with closing(stored), progress("encoding images", total, rank_and_world()[0] == 0) as advance:
        for batch in batches:
            if len(batch.rows):
                stored.write(batch.rows, encoding.activations(prefix, batch.images))
            stored.mark_unusable(batch.unusable)
            advance(len(batch.rows) + len(batch.unusable))


def store_texts(encoding: Encoding, prefix: FrozenPrefix, stored: StoredRows, texts: Texts, rows: np.ndarray) -> None:
    """Encode some rows of texts into a file, texts of equal length together, so that none is padded."""
    rows = rows[np.argsort(texts.lengths[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(texts.lengths[rows], prepend=-1))  # of each length
    with closing(stored), progress("encoding captions", len(rows), rank_and_world()[0] == 0) as advance:
        for group in np.split(rows, starts[1:]):
            for first in range(0, len(group), encoding.batch_size):
                some = group[first : first + encoding.batch_size]
                length = int(texts.lengths[some[0]])
                tokens = texts.tokens[torch.from_numpy(some), :length]
                stored.write(some, encoding.activations(prefix, tokens, [length] * len(some)))
                advance(len(some))
