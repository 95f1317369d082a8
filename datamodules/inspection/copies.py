"""Find copies among the pairs of a scan, and write its findings as lines of a table.

Copies are those of images and captions, of images alone, and of validation images. Images are the same if their files
are equal. They are near copies if their hashes (:mod:`datamodules.near_duplicates`) differ in few bits and no cell of
8 x 8 differs much in colour, as it does in photographs of two shirts on one ground. Of several copies the largest
stands for all, of equally large ones the first.

Shapes: N rows, M captions, F different files.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from lit_clip.errors import BadSample
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.console import progress
from lit_clip.tools.images import decoding_at_least, open_image
from lit_clip.tools.levels import NO_RANGE
from lit_clip.tools.workers import Mapped, loader
from ..near_duplicates import LOOK, NEAR_BITS, LookIndex, look_labels
from ..pairs.decisions import DROP, KEEP
from ..pairs.findings import Finding
from ..pairs.source import PairSource
from .scan import DECODED, PLAIN, SAYS_NOTHING, TOO_LONG, ScanFindings

CELLS = 8  # a side of the images that are compared
CANDIDATE_BITS = 4  # by which two hashes may differ
LEVELS = 20  # of 255 that a cell may differ: JPEGs at quality 20 and half the size differ by 17, other shirts by 27
MOST = 4096  # images that each is compared with; bounds the work if many look alike and are not copies
COMPARED = 65_536  # rows that are compared with validation images at once


class PairCopies(NamedTuple):
    """For each caption, another row with the same image or a similar-looking one."""

    row: np.ndarray  # int64 [M]; -1: none
    same_image: np.ndarray  # or a near copy; otherwise it only looks like it, bool [M]
    same_caption: np.ndarray  # and the row has the same caption, bool [M]


class ValidationCopies(NamedTuple):
    """For each row, the validation image that is the same or looks similar."""

    row: np.ndarray  # of the validation data, int64 [N]; -1: none
    same_file: np.ndarray  # bool [N]


def find_copies(found: ScanFindings, source: PairSource, num_workers: int) -> PairCopies:
    """Compare all pairs of a scan; read again the images that look the same."""
    images, usable, rows = found.images, found.usable, found.caption_rows
    looks, labels = _labels(found, source, num_workers)
    same, like = (_best(found, each)[each[rows]] for each in (labels, looks)) if len(usable) else (rows, rows)
    order = np.lexsort((_smallness(found)[rows], found.captions["hash"], labels[rows]))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(labels[rows[order]]) != 0) | (np.diff(found.captions["hash"][order].view(np.int64)) != 0)
    of_pair = np.empty_like(rows)
    of_pair[order] = rows[order[np.flatnonzero(new)[np.cumsum(new) - 1]]]
    same_caption = of_pair != rows
    same_image = same_caption | (images["key"][same] != images["key"][rows])
    alike = labels[like] != labels[rows]
    of = np.where(same_caption, of_pair, np.where(same_image, same, np.where(alike, like, -1)))
    return PairCopies(of, same_image, same_caption)


def _smallness(found: ScanFindings) -> np.ndarray:
    return -(found.images["width"].astype(np.int64) * found.images["height"])


def _best(found: ScanFindings, labels: np.ndarray) -> np.ndarray:
    """Return one row for each label, ``[labels]``: the row of the largest image."""
    usable = found.usable
    order = usable[np.lexsort((_smallness(found)[usable], labels[usable]))]
    return order[np.unique(labels[order], return_index=True)[1]]


def _labels(found: ScanFindings, source: PairSource, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the looks of all images, and the images that are copies of each other, int64 ``[N]``; unusable ones are 0.

    Images with one look that differ in their pixels are no copies.
    """
    images, usable = found.images, found.usable
    _, first, numbers = np.unique(images["file"][usable], return_index=True, return_inverse=True)
    files = usable[first]  # the first row of each file, [F]
    shaped = images["state"][files] & PLAIN == 0
    look = np.arange(len(files))
    look[shaped] = len(files) + look_labels(images[files[shaped]], CANDIDATE_BITS)
    look = np.unique(look, return_inverse=True)[1]
    original = files.copy()  # row that stands for each file
    places = np.flatnonzero(np.bincount(look)[look] > 1)
    places = places[np.lexsort((files[places], _smallness(found)[files[places]], look[places]))]
    small = _small_images(source, files[places], num_workers)
    start = 0
    for stop in [*(np.flatnonzero(np.diff(look[places])) + 1).tolist(), len(places)]:
        members = _first_alike(small[start:stop])
        original[places[start:stop]] = files[places[start + members]]
        start = stop
    looks, labels = np.zeros((2, len(images)), dtype=np.int64)
    looks[usable], labels[usable] = look[numbers], np.unique(original, return_inverse=True)[1][numbers]
    return looks, labels


def _first_alike(small: np.ndarray) -> np.ndarray:
    """Return for each image the place of the first image that it copies, itself if none, int64 ``[n]``."""
    found, firsts = np.arange(len(small)), []
    for place, image in enumerate(small):
        others = firsts[-MOST:]
        differing = np.abs(small[others] - image).max(axis=1) if others and image[0] >= 0 else np.zeros(0)
        if len(differing) and differing.min() <= LEVELS:
            found[place] = others[int(differing.argmin())]
        elif image[0] >= 0:
            firsts.append(place)
    return found


def _small(source: PairSource, row: int) -> bytes:
    """Return a row's image at ``CELLS`` x ``CELLS``, int16 ``[CELLS * CELLS * 3]``; -1 if it cannot be read.

    As bytes: a data worker sends an array through shared memory, and each that is kept would keep a file open.
    """
    try:
        stored = source.read(row)
        with (
            warnings.catch_warnings(action="ignore"),
            decoding_at_least(lambda width, height: (min(width, DECODED), min(height, DECODED))),
        ):
            image = open_image(io.BytesIO(stored.image), stored.where).convert("RGB")
    except BadSample:  # readable a moment ago
        return np.full(CELLS * CELLS * 3, -1, dtype=np.int16).tobytes()
    return np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.int16).tobytes()


def _small_images(source: PairSource, rows: np.ndarray, num_workers: int) -> np.ndarray:
    read: Mapped[bytes] = Mapped(partial(_small, source), rows.tolist())
    images: list[bytes] = []
    with progress("comparing copies", len(rows), enabled=len(rows) > 0) as advance:
        for image in loader(read, num_workers):
            images.append(image)
            advance(1)
    return np.frombuffer(b"".join(images), dtype=np.int16).reshape(len(rows), CELLS * CELLS * 3)


def find_validation_copies(found: ScanFindings, validation: ScanFindings) -> ValidationCopies:
    """Compare the images of a scan with the validation images."""
    rows, same_file = np.full(len(found.images), -1), np.zeros(len(found.images), dtype=bool)
    others = validation.usable
    if not len(others):
        return ValidationCopies(rows, same_file)
    index = LookIndex(_looks(validation.images[others]))
    for start in range(0, len(rows), COMPARED):
        here = start + np.flatnonzero(found.images["state"][start : start + COMPARED])
        theirs, ours = index.like(_looks(found.images[here]))
        first = np.lexsort((theirs, ours))
        ours, place = np.unique(ours[first], return_index=True)
        rows[here[ours]] = others[theirs[first][place]]
    files, first = np.unique(validation.images["file"][others], return_index=True)
    place = np.searchsorted(files, found.images["file"]).clip(max=len(files) - 1)
    same_file = (found.images["state"] > 0) & (files[place] == found.images["file"])
    rows[same_file] = others[first[place[same_file]]]
    return ValidationCopies(rows, same_file)


def _looks(images: np.ndarray) -> np.ndarray:
    looks = np.zeros(len(images), LOOK)
    looks["bits"], looks["colour"], looks["plain"] = images["bits"], images["colour"], images["state"] & PLAIN > 0
    return looks


def scan_lines(
    source: PairSource,
    found: ScanFindings,
    copies: PairCopies,
    validation: tuple[PairSource, ValidationCopies] | None,
    tokenizer: TextTokenizer,
) -> Iterator[Finding]:
    """Yield lines for rows left out when the source was opened, then lines for other rows in order."""
    for where, reason in source.left_out.listed:
        yield Finding(DROP, reason, where)
    remarkable = (copies.row >= 0) | (found.captions["flags"] > 0)
    listed = (found.images["state"] == 0) | (found.images["state"] & PLAIN > 0)
    listed[found.caption_rows[remarkable]] = True
    if validation is not None:
        listed |= validation[1].row >= 0
    problems = iter(found.problems)
    ends = np.cumsum(found.images["captions"], dtype=np.int64)
    for row in np.flatnonzero(listed).tolist():
        if not found.images["state"][row]:
            _, reason, problem = next(problems)
            key = None
            with suppress(BadSample):
                key = source.key(row)
            line = Finding.of_row(row, key)
            line.add(reason, KEEP if reason == NO_RANGE else DROP, problem)  # train by a window
            yield line
        elif validation is not None and validation[1].row[row] >= 0:
            others, copied = validation
            line = Finding.of_row(row, source.key(row))
            line.add("copy of a validation image" if copied.same_file[row] else "looks like a validation image", DROP)
            line.copy_of = others.key(int(copied.row[row]))
            yield line
        else:
            place = range(int(ends[row] - found.images["captions"][row]), int(ends[row]))
            yield from _of_pairs(source, row, found, place, copies, tokenizer)


def _of_pairs(
    source: PairSource, row: int, found: ScanFindings, place: range, copies: PairCopies, tokenizer: TextTokenizer
) -> Iterator[Finding]:
    """Yield a line for each distinct caption of a row with a finding."""
    key, captions = source.key(row), source.captions(row)
    distinct = dict(zip(captions, place, strict=False))
    for caption, number in distinct.items():
        line, other = Finding.of_pair(row, key, caption, len(distinct)), int(copies.row[number])
        if other >= 0:
            same_image, same_caption = bool(copies.same_image[number]), bool(copies.same_caption[number])
            _add_copy(line, found.images[row], found.images[other], same_image, same_caption)
            line.copy_of, line.copy_of_row = source.key(other) if line.finding else "", other if same_image else None
        if found.images[row]["state"] & PLAIN:
            line.add("a single colour", KEEP)
        if found.captions["flags"][number] & SAYS_NOTHING:
            line.add("caption says nothing", DROP)
        if found.captions["flags"][number] & TOO_LONG:
            read = f"{tokenizer.count(caption)} tokens, of which {tokenizer.context_length} are read"
            line.add("caption too long", KEEP, read)
        if line.finding:
            yield line


def _add_copy(line: Finding, ours: np.void, theirs: np.void, same_image: bool, same_caption: bool) -> None:
    """Add that an image is a copy of another row's or looks like it; a copy with another caption is kept."""
    detail = ""
    if ours["file"] != theirs["file"]:
        sizes = [f"{each['width']} x {each['height']}" for each in (ours, theirs)]
        differing = int(ours["bits"] ^ theirs["bits"]).bit_count()
        detail = f"{differing} of 64 bits of the hash differ; {sizes[0]} pixels, the other {sizes[1]}"
        if not same_image and differing > NEAR_BITS:
            return
    finding = f"{'near ' if detail else ''}copy{'' if same_caption else ' with another caption'}"
    line.add(finding if same_image else "looks like another image", DROP if same_caption else KEEP, detail)
