"""One parallel pass over a source of pairs, which keeps about 50 bytes for each pair and no image."""

import functools
import io
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from lit_clip.errors import BadSample
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.console import progress
from lit_clip.tools.hashing import hash64
from lit_clip.tools.images import decoding_at_least, open_image
from lit_clip.tools.workers import loader
from ..near_duplicates import look_of
from ..pairs.source import LISTED, EncodedPair, PairSource
from .generic_captions import says_nothing

CHUNK = 32  # pairs that a data worker reads at once
DECODED = 72  # least pixels a side of a decoded image: eight for each of the hash's 9 columns
ORIENTATION = 0x0112  # EXIF tag; 1 is upright

READABLE, PLAIN, ROTATED, ANIMATED, TRANSPARENT = 1, 2, 4, 8, 16  # bits of ``state``
SAYS_NOTHING, TOO_LONG = 1, 2  # bits of a caption's ``flags``
IMAGE = np.dtype(
    [
        ("key", "u8"),  # hash of the image's key
        ("file", "u8"),  # hash of its bytes
        ("bits", "u8"),  # this and colour: see near_duplicates.Look
        ("colour", "u4"),
        ("width", "u4"),
        ("height", "u4"),
        ("bytes", "u4"),
        ("captions", "u4"),  # their number
        ("format", "u1"),  # index in formats()
        ("mode", "u1"),  # index in Image.MODES; its length: another mode
        ("state", "u1"),  # 0: cannot be used
    ]
)


@functools.cache
def formats() -> list[str]:
    """Return the formats that Pillow reads, sorted."""
    Image.init()
    return sorted(Image.OPEN)


def _hash(content: str | bytes) -> int:
    return int.from_bytes(hash64(content), "little")


def caption_hash(caption: str) -> int:
    """Hash a caption so that letter case and white space make no difference."""
    return _hash(" ".join(caption.lower().split()))


@dataclass
class ScannedChunk:
    """Findings on consecutive pairs."""

    images: np.ndarray  # IMAGE [N]; all zeros for a pair that cannot be used
    captions: np.ndarray  # caption_hash of each caption of the usable pairs, in order, uint64 [M]
    tokens: np.ndarray  # length of each caption before truncation, int64 [M]
    flags: np.ndarray  # of each caption, uint8 [M]
    problems: list[tuple[str, str, str]]  # position, reason and full message for each pair that cannot be used


class _Chunks(Dataset[ScannedChunk]):
    """The pairs of a source in chunks of ``CHUNK``."""

    def __init__(self, source: PairSource, tokenizer: TextTokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, number: int) -> ScannedChunk:
        rows = range(number * CHUNK, min((number + 1) * CHUNK, len(self.source)))
        images = np.zeros(len(rows), dtype=IMAGE)
        captions: list[str] = []
        problems = []
        # Pillow's warnings about odd files would flood the terminal; a file that cannot be used is an error.
        with warnings.catch_warnings(action="ignore"):
            for place, row in enumerate(rows):
                try:
                    stored = self.source.read(row)
                    images[place] = _image(stored)
                    captions.extend(stored.captions)
                except BadSample as error:
                    problems.append((error.where, error.reason, str(error)))
        hashes = np.array([caption_hash(caption) for caption in captions], dtype=np.uint64)
        tokens = np.array([self.tokenizer.count(caption) for caption in captions], dtype=np.int64)
        flags = SAYS_NOTHING * np.array([says_nothing(caption) for caption in captions], dtype=np.uint8)
        flags |= TOO_LONG * (tokens > self.tokenizer.context_length).astype(np.uint8)
        return ScannedChunk(images, hashes, tokens, flags, problems)


def _image(stored: EncodedPair) -> tuple[int, ...]:
    """Return the ``IMAGE`` of a pair."""
    with decoding_at_least(lambda width, height: (min(width, DECODED), min(height, DECODED))):
        look = look_of(open_image(io.BytesIO(stored.image), stored.where))
    with Image.open(io.BytesIO(stored.image)) as image:  # reopened for its header: decoding changes size and mode
        state = READABLE | PLAIN * look.plain | ROTATED * _is_rotated(image)
        state |= ANIMATED * bool(getattr(image, "is_animated", False) and image.format != "MPO")
        mode = Image.MODES.index(image.mode) if image.mode in Image.MODES else len(Image.MODES)
        kind = formats().index(str(image.format))
        sizes = (*image.size, len(stored.image), len(stored.captions))
        state |= TRANSPARENT * _shows_through(image)  # which shrinks it
    key, file = _hash(stored.key), _hash(stored.image)
    return (key, file, look.bits, look.colour, *sizes, kind, mode, state)


def _shows_through(image: Image.Image) -> bool:
    """Whether a pixel of an open image is less than half opaque."""
    if not image.has_transparency_data:
        return False
    image.thumbnail((DECODED, DECODED))
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 128)


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) not in (0, 1)
    except Exception:  # EXIF is often malformed, and the pixels do not depend on it
        return False


@dataclass
class ScanFindings:
    """Findings on all pairs, see :class:`ScannedChunk`."""

    images: np.ndarray
    captions: np.ndarray
    flags: np.ndarray
    token_counts: np.ndarray  # number of captions by length in tokens, int64 [longest + 1]
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # the first LISTED of them

    @property
    def usable(self) -> np.ndarray:
        """Rows that can be used, ascending."""
        return np.flatnonzero(self.images["state"])

    @property
    def distinct(self) -> np.ndarray:
        """The first row of each image; rows of the same key are the same image."""
        usable = self.usable
        return usable[np.sort(np.unique(self.images["key"][usable], return_index=True)[1])]

    @property
    def caption_rows(self) -> np.ndarray:
        """The row of each caption, ``[M]``."""
        return np.repeat(np.arange(len(self.images)), self.images["captions"])


def inspect_source(source: PairSource, tokenizer: TextTokenizer, problems: TextIO, num_workers: int) -> ScanFindings:
    """Read every pair once; write a line of JSON to ``problems`` for each pair that cannot be used."""
    none = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
    found = ScanFindings(np.zeros(len(source), dtype=IMAGE), *none, np.zeros(1, np.int64))
    chunks: Any = _Chunks(source, tokenizer)
    captions, flags, done = [], [], 0
    with progress("inspecting", len(source)) as advance:
        for part in loader(chunks, num_workers):
            found.images[done : done + len(part.images)] = part.images
            captions.append(part.captions)
            flags.append(part.flags)
            counts = np.bincount(part.tokens, minlength=len(found.token_counts))
            counts[: len(found.token_counts)] += found.token_counts
            found.token_counts = counts
            for where, reason, line in part.problems:
                problems.write(json.dumps({"where": where, "reason": reason, "error": line}) + "\n")
                found.reasons[reason] += 1
            found.problems.extend(part.problems[: LISTED - len(found.problems)])
            done += len(part.images)
            advance(len(part.images))
    found.captions, found.flags = np.concatenate([none[0], *captions]), np.concatenate([none[1], *flags])
    return found
