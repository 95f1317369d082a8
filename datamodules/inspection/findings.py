"""The findings of a scan as lines of a table: pairs that cannot be used, copies, and captions of little use."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

import numpy as np

from lit_clip.errors import BadSample
from lit_clip.models.tokenizer import TextTokenizer
from ..near_duplicates import NEAR_BITS
from ..pairs.decisions import DROP, KEEP
from ..pairs.findings import Finding
from ..pairs.source import PairSource
from .copies import PairCopies, ValidationCopies
from .scan import PLAIN, SAYS_NOTHING, TOO_LONG, ScanFindings


def scan_lines(
    source: PairSource,
    found: ScanFindings,
    problems: TextIO,
    copies: PairCopies,
    validation: tuple[PairSource, ValidationCopies] | None,
    tokenizer: TextTokenizer,
) -> Iterator[Finding]:
    """Yield the lines on rows left out when the source was opened, then those on rows in their order.

    ``problems`` has a line of JSON for each pair that cannot be used, as :func:`inspect_source` writes it.
    """
    for where, reason in source.left_out.listed:
        yield Finding(DROP, reason, where)
    remarkable = (copies.row >= 0) | (found.flags > 0)
    listed = (found.images["state"] == 0) | (found.images["state"] & PLAIN > 0)
    listed[found.caption_rows[remarkable]] = True
    if validation is not None:
        listed |= validation[1].row >= 0
    problems.seek(0)
    ends = np.cumsum(found.images["captions"], dtype=np.int64)
    for row in np.flatnonzero(listed).tolist():
        if not found.images["state"][row]:
            yield _unusable(source, row, json.loads(next(problems)))
        elif validation is not None and validation[1].row[row] >= 0:
            yield _of_validation(source, row, *validation)
        else:
            place = range(int(ends[row] - found.images["captions"][row]), int(ends[row]))
            yield from _of_pairs(source, row, found, place, copies, tokenizer)


def _unusable(source: PairSource, row: int, problem: dict[str, str]) -> Finding:
    key = None
    with suppress(BadSample):
        key = source.key(row)
    line = Finding.of_row(row, key)
    line.add(problem["reason"], DROP, problem["error"])
    return line


def _of_validation(source: PairSource, row: int, validation: PairSource, copies: ValidationCopies) -> Finding:
    line = Finding.of_row(row, source.key(row))
    line.add("copy of a validation image" if copies.same_file[row] else "looks like a validation image", DROP)
    line.copy_of = validation.key(int(copies.row[row]))
    return line


def _of_pairs(
    source: PairSource, row: int, found: ScanFindings, place: range, copies: PairCopies, tokenizer: TextTokenizer
) -> Iterator[Finding]:
    """Yield a line for each distinct caption of a row that there is a finding on."""
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
        if found.flags[number] & SAYS_NOTHING:
            line.add("caption says nothing", DROP)
        if found.flags[number] & TOO_LONG:
            read = f"{tokenizer.count(caption)} tokens, of which {tokenizer.context_length} are read"
            line.add("caption too long", KEEP, read)
        if line.finding:
            yield line


def _add_copy(line: Finding, ours: np.void, theirs: np.void, same_image: bool, same_caption: bool) -> None:
    """Add that an image is, or looks like, another row's; a copy with another caption adds something, and is kept."""
    detail = ""
    if ours["file"] != theirs["file"]:
        sizes = [f"{each['width']} x {each['height']}" for each in (ours, theirs)]
        differing = int(ours["bits"] ^ theirs["bits"]).bit_count()
        detail = f"{differing} of 64 bits of the hash differ; {sizes[0]} pixels, the other {sizes[1]}"
        if not same_image and differing > NEAR_BITS:
            return
    finding = f"{'near ' if detail else ''}copy{'' if same_caption else ' with another caption'}"
    line.add(finding if same_image else "looks like another image", DROP if same_caption else KEEP, detail)
