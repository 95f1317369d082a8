"""One pass over a source of pairs, in parallel, that keeps some 50 bytes a pair and no image."""

import functools
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from datamodules.near_duplicates import look_of
from datamodules.pairs.source import LISTED, EncodedPair, PairSource
from lit_clip.errors import BadSample
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.console import progress
from lit_clip.tools.hashing import hash64
from lit_clip.tools.images import decoding_at_least, open_image
from lit_clip.tools.workers import loader

CHUNK = 32  # pairs that a process is asked for at once
DECODED = 72  # pixels a side that decoding may leave of an image: eight for each place that is compared
ORIENTATION = 0x0112  # EXIF's tag of how a camera was held; 1 is upright

READABLE, PLAIN, TURNED, ANIMATED = 1, 2, 4, 8  # bits of ``state``
IMAGE = np.dtype(
    [
        ("key", "u8"),  # a hash of what identifies the image
        ("file", "u8"),  # of its bytes
        ("bits", "u8"),  # see look_alikes.Look
        ("colour", "u4"),
        ("width", "u4"),
        ("height", "u4"),
        ("bytes", "u4"),
        ("captions", "u4"),  # how many
        ("format", "u1"),  # in formats()
        ("mode", "u1"),  # in Image.MODES
        ("state", "u1"),
    ]
)


@functools.cache
def formats() -> list[str]:
    """The formats that Pillow reads, sorted."""
    Image.init()
    return sorted(Image.OPEN)


def digest(content: str | bytes) -> int:
    """See :func:`lit_clip.tools.hashing.hash64`, as a number."""
    return int.from_bytes(hash64(content), "little")


def caption_digest(caption: str) -> int:
    """Equal for captions that differ in letter case and white space alone."""
    return digest(" ".join(caption.lower().split()))


@dataclass
class ScannedChunk:
    """What is found of some consecutive pairs.

    Attributes:
        images: ``IMAGE`` ``[N]``; of one that cannot be used nothing but zeros.
        captions: :func:`caption_digest` of each caption of the usable pairs, in order, uint64 ``[M]``.
        tokens: of each caption, before it is cut, int64 ``[M]``.
        problems: where, reason and the whole line of each pair that cannot be used.
    """

    images: np.ndarray
    captions: np.ndarray
    tokens: np.ndarray
    problems: list[tuple[str, str, str]]


class _Chunks(Dataset[ScannedChunk]):
    """The pairs of a source, ``CHUNK`` at a time."""

    def __init__(self, source: PairSource, tokenizer: TextTokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, number: int) -> ScannedChunk:
        rows = range(number * CHUNK, min((number + 1) * CHUNK, len(self.source)))
        images = np.zeros(len(rows), dtype=IMAGE)
        captions: list[str] = []
        problems = []
        # Pillow's remarks on odd files would flood the terminal; what cannot be used is an error.
        with warnings.catch_warnings(action="ignore"):
            for place, row in enumerate(rows):
                try:
                    stored = self.source.read(row)
                    images[place] = _image(stored)
                    captions.extend(stored.captions)
                except BadSample as error:
                    problems.append((error.where, error.reason, str(error)))
        hashes = np.array([caption_digest(caption) for caption in captions], dtype=np.uint64)
        tokens = np.array([self.tokenizer.count(caption) for caption in captions], dtype=np.int64)
        return ScannedChunk(images, hashes, tokens, problems)


def _image(stored: EncodedPair) -> tuple[int, ...]:
    """The ``IMAGE`` of a pair.

    Raises:
        BadSample: it cannot be decoded.
    """
    with decoding_at_least(lambda width, height: (min(width, DECODED), min(height, DECODED))):
        look = look_of(open_image(io.BytesIO(stored.image), stored.where))
    with Image.open(io.BytesIO(stored.image)) as image:  # its header, which the decoder changes
        state = READABLE | PLAIN * look.plain | TURNED * _is_turned(image)
        state |= ANIMATED * bool(getattr(image, "is_animated", False) and image.format != "MPO")
        mode = Image.MODES.index(image.mode) if image.mode in Image.MODES else len(Image.MODES)
        kind = formats().index(str(image.format))
        sizes = (*image.size, len(stored.image), len(stored.captions))
    key, file = digest(stored.key), digest(stored.image)
    return (key, file, look.bits, look.colour, *sizes, kind, mode, state)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) not in (0, 1)
    except Exception:  # EXIF is written by any program in any way; the pixels are there all the same
        return False


@dataclass
class ScanFindings:
    """What a pass has found.

    Attributes:
        images: of each pair in turn, ``IMAGE`` ``[N]``.
        captions: of the usable pairs in turn, see :class:`ScannedChunk`, uint64 ``[M]``.
        token_counts: number of captions of each length in tokens, int64 ``[longest + 1]``.
        reasons: pairs that cannot be used, by reason.
        problems: where, reason and the whole line of the first ``LISTED`` of them.
    """

    images: np.ndarray
    captions: np.ndarray
    token_counts: np.ndarray
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def usable(self) -> np.ndarray:
        """Rows that can be used, rising."""
        return np.flatnonzero(self.images["state"])

    @property
    def distinct(self) -> np.ndarray:
        """The first row of each image: those of one key are one."""
        usable = self.usable
        return usable[np.sort(np.unique(self.images["key"][usable], return_index=True)[1])]

    @property
    def caption_rows(self) -> np.ndarray:
        """The row of each caption, ``[M]``."""
        return np.repeat(np.arange(len(self.images)), self.images["captions"])


def inspect_source(source: PairSource, tokenizer: TextTokenizer, problems: TextIO, num_workers: int) -> ScanFindings:
    """Read every pair once.

    Args:
        source: the pairs.
        tokenizer: of the captions.
        problems: gets a line of JSON for each pair that cannot be used.
        num_workers: processes.
    """
    found = ScanFindings(np.zeros(len(source), dtype=IMAGE), np.zeros(0, np.uint64), np.zeros(1, np.int64))
    captions, done = [], 0
    with progress("inspecting", len(source)) as advance:
        for part in _passed(source, tokenizer, num_workers):
            found.images[done : done + len(part.images)] = part.images
            captions.append(part.captions)
            found.token_counts = _added(found.token_counts, np.bincount(part.tokens))
            for where, reason, line in part.problems:
                problems.write(json.dumps({"where": where, "reason": reason, "error": line}) + "\n")
                found.reasons[reason] += 1
            found.problems.extend(part.problems[: LISTED - len(found.problems)])
            done += len(part.images)
            advance(len(part.images))
    found.captions = np.concatenate([found.captions, *captions])
    return found


def _passed(source: PairSource, tokenizer: TextTokenizer, num_workers: int) -> Iterator[ScannedChunk]:
    parts: Any = _Chunks(source, tokenizer)
    yield from loader(parts, num_workers)


def _added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two histograms of any lengths."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other.astype(one.dtype), one)
    longer[: len(shorter)] += shorter
    return longer
