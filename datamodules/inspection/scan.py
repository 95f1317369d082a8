"""Read a source of pairs once, in parallel; keep about 70 bytes for each pair and no image.

An interrupted pass is resumed, and several jobs can share one (:class:`lit_clip.embedding.parts.Parts`).
"""

import io
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from lit_clip.embedding.encode import remaining
from lit_clip.embedding.parts import Arrays, Parts, json_array, json_value
from lit_clip.errors import BadSample, require
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.console import progress
from lit_clip.tools.images import Unseen, decoding_at_least, formats, is_rotated, open_image, unseen
from lit_clip.tools.workers import Mapped, loader
from ..near_duplicates import look_of
from ..pairs.related_rows import caption_hash, number_of
from ..pairs.source import PairSource, Row

WORDS = frozenset(
    (
        *("a", "an", "the", "of", "this", "is", "my", "no", "not", "available", "none", "null", "nan", "na"),
        *("image", "images", "img", "photo", "photos", "photograph", "picture", "pictures", "pic", "pics"),
        *("untitled", "unnamed", "unknown", "caption", "alt", "description", "placeholder", "thumbnail", "thumb"),
        *("dsc", "dscn", "dscf", "pict", "pxl", "mvimg", "screenshot"),  # what cameras and phones call files
        *("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff"),
    )
)
CHUNK = 32  # pairs that a data worker reads at once
DECODED = 72  # least pixels a side of a decoded image: eight for each of the hash's 9 columns
READABLE, PLAIN, ROTATED, ANIMATED, TRANSPARENT, DEEP, CONVERTED = (1 << bit for bit in range(7))  # of ``state``
SAYS_NOTHING, TOO_LONG = 1, 2  # bits of a caption's ``flags``
IMAGE = np.dtype(
    [
        ("row", "i8"),  # of the source
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
        ("state", "u1"),  # 0: cannot be used, and all others but the row are 0
    ]
)
CAPTION = np.dtype([("hash", "u8"), ("tokens", "i8"), ("flags", "u1")])  # caption_hash; tokens before truncation


def says_nothing(caption: str) -> bool:
    """Return whether a caption is only punctuation, or only (English) words and numbers that would fit any image.

    ``A photo.``, ``IMG_0123.jpg`` and ``???`` say nothing; ``7`` and ``a red photo`` do say something.
    """
    words = re.findall(r"[^\W\d_]+", caption.casefold())
    if words:
        return WORDS.issuperset(words)
    return all(unicodedata.category(character)[0] in "PZC" for character in caption)


@dataclass
class ScanFindings:
    """Findings on N pairs with M captions: of a batch, of a part, or of a whole source."""

    images: np.ndarray  # IMAGE [N], by row
    captions: np.ndarray  # CAPTION [M], of the usable pairs, in order
    problems: list[tuple[str, str, str]]  # position, reason and full message for each pair that cannot be used

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the usable rows, ascending."""
        return np.flatnonzero(self.images["state"])

    @property
    def distinct(self) -> np.ndarray:
        """The first row of each image; rows with the same key have the same image."""
        usable = self.usable
        return usable[np.sort(np.unique(self.images["key"][usable], return_index=True)[1])]

    @property
    def caption_rows(self) -> np.ndarray:
        """The row of each caption, ``[M]``."""
        return np.repeat(np.arange(len(self.images)), self.images["captions"])

    @property
    def reasons(self) -> Counter[str]:
        """Counts of the reasons why pairs cannot be used."""
        return Counter(reason for _, reason, _ in self.problems)

    @classmethod
    def of(cls, arrays: Arrays) -> "ScanFindings":
        """Return the findings of a finished part."""
        problems = [(where, reason, line) for where, reason, line in json_value(arrays["problems"])]
        return cls(arrays["images"], arrays["captions"], problems)

    @classmethod
    def joined(cls, chunks: Sequence["ScanFindings"]) -> "ScanFindings":
        """Return the findings of several chunks, at least one, sorted by row."""
        images = np.concatenate([chunk.images for chunk in chunks])
        captions = np.concatenate([chunk.captions for chunk in chunks])
        problems = [problem for chunk in chunks for problem in chunk.problems]
        of_caption = np.argsort(np.repeat(images["row"], images["captions"]), kind="stable")
        of_problem = np.argsort(images["row"][images["state"] == 0]).tolist()  # each unusable pair has one
        problems = [problems[place] for place in of_problem]
        return cls(images[np.argsort(images["row"])], captions[of_caption], problems)


def _read(source: PairSource, tokenizer: TextTokenizer, rows: Sequence[int]) -> ScanFindings:
    images, texts, problems = np.zeros(len(rows), dtype=IMAGE), list[str](), []
    images["row"] = rows
    # Pillow's warnings about odd files would flood the terminal; a file that cannot be used is an error.
    with warnings.catch_warnings(action="ignore"):
        for place, row in enumerate(rows):
            try:
                stored = source.read(row)
                images[place] = (row, *_image(stored))
                texts.extend(stored.captions)
            except BadSample as error:
                problems.append((error.where, error.reason, str(error)))
    captions = np.zeros(len(texts), dtype=CAPTION)
    captions["hash"] = [caption_hash(text) for text in texts]
    captions["tokens"] = [tokenizer.count(text) for text in texts]
    captions["flags"] = [SAYS_NOTHING * says_nothing(text) for text in texts]
    captions["flags"] |= TOO_LONG * (captions["tokens"] > tokenizer.context_length).astype(np.uint8)
    return ScanFindings(images, captions, problems)


def _image(stored: Row) -> tuple[int, ...]:
    """Return a pair's fields of ``IMAGE`` after the row."""
    with decoding_at_least(lambda width, height: (min(width, DECODED), min(height, DECODED))):
        decoded = open_image(io.BytesIO(stored.image), stored.where)
    look, lost = look_of(decoded), unseen(io.BytesIO(stored.image), stored.where)
    with Image.open(io.BytesIO(stored.image)) as image:  # reopened for its header: decoding changes size and mode
        state = READABLE | PLAIN * look.plain | ROTATED * (Unseen.ROTATED in lost or is_rotated(decoded))
        state |= ANIMATED * (Unseen.ANIMATED in lost) | DEEP * (Unseen.DEEP in lost)
        state |= CONVERTED * (Unseen.CONVERTED in lost)
        mode = Image.MODES.index(image.mode) if image.mode in Image.MODES else len(Image.MODES)
        kind = formats().index(str(image.format))
        sizes = (*image.size, len(stored.image), len(stored.captions))
        state |= TRANSPARENT * _shows_through(image)  # which shrinks it
    key, file = number_of(stored.key), number_of(stored.image)
    return (key, file, look.bits, look.colour, *sizes, kind, mode, state)


def _shows_through(image: Image.Image) -> bool:
    """Return whether a pixel of an open image is less than half opaque."""
    if not image.has_transparency_data:
        return False
    image.thumbnail((DECODED, DECODED))
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 128)


def scan(source: PairSource, tokenizer: TextTokenizer, num_workers: int, parts: Parts) -> None:
    """Write into ``parts`` the findings on this share's pairs that are not there yet."""
    done = _finished(parts, len(source))[1]
    batches = remaining(len(source), CHUNK, done.__getitem__, parts.share)
    read: Mapped[ScanFindings] = Mapped(partial(_read, source, tokenizer), batches)
    parts.start()

    def arrays(chunks: Sequence[ScanFindings]) -> Arrays:
        found = ScanFindings.joined(chunks)
        return {**vars(found), "problems": json_array(found.problems)}

    with parts.written(arrays) as keep, progress("inspecting", sum(map(len, batches))) as advance:
        for chunk in loader(read, num_workers):
            keep(chunk, int(chunk.images["row"][0]))
            advance(len(chunk.images))


def _finished(parts: Parts, rows: int) -> tuple[list[ScanFindings], np.ndarray]:
    """Return the parts that share no row with an earlier one, and which of N rows they have, bool ``[N]``."""
    found, done = list[ScanFindings](), np.zeros(rows, dtype=bool)
    for part in parts.read(ScanFindings.of):
        if not done[part.images["row"]].any():  # two runs at once may both have read a chunk
            done[part.images["row"]] = True
            found.append(part)
    return found, done


def inspect_source(source: PairSource, tokenizer: TextTokenizer, num_workers: int, parts: Parts) -> ScanFindings:
    """Read every pair once."""
    scan(source, tokenizer, num_workers, parts)
    found, done = _finished(parts, len(source))
    lost = int(np.count_nonzero(~done))
    require(lost == 0, f"the findings on {lost} rows are gone: another run has ended meanwhile; run this one again")
    return ScanFindings.joined(found)
