"""The findings of an inspection as one HTML file: figures, histograms, images and lists."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_clip.errors import BadSample
from lit_clip.tools.html import stored_thumbnail, write_page
from ..near_duplicates import Groups
from ..pairs.related_rows import caption_hash
from ..pairs.source import PairSource
from .scan import ScanFindings
from .summary import DuplicateGroups, SummarySection

TEMPLATE = Path(__file__).parent / "templates" / "inspect.html"
SAMPLES = 24
OF_GROUP = 4  # images of a group that are shown
CHARACTERS = 200  # of a caption
BARS = 40


def write_inspection(
    path: Path,
    title: str,
    source: PairSource,
    findings: ScanFindings,
    duplicates: DuplicateGroups,
    sections: Sequence[SummarySection],
    context_length: int,
    table: tuple[str, str] | None,
) -> None:
    """Write the page of a scan.

    ``context_length`` is the number of tokens that the model reads of a caption, ``table`` the name of the table
    of findings beside the page and the command that trains on the rest; None without findings.
    """
    usable = findings.usable
    samples = usable[np.unique(np.linspace(0, len(usable) - 1, SAMPLES).astype(int))] if len(usable) else []
    wrong = [(where, line) for where, _, line in findings.problems] + source.left_out.listed
    with warnings.catch_warnings(action="ignore"):  # from Pillow, as in the scan
        write_page(
            path,
            TEMPLATE,
            title=title,
            sections=sections,
            findings=table,
            histograms=list(_histograms(findings, context_length)),
            samples=_shown(source, samples),
            groups=[
                ("the same file", duplicates.files.number, _groups(duplicates.files, source)),
                ("other files of the same look", duplicates.looks.number, _groups(duplicates.looks, source)),
            ],
            captions=list(_captions(duplicates.captions, source, findings)),
            problems=[(where, line.removeprefix(f"{where}: ")) for where, line in wrong],
            problem_count=findings.reasons.total() + source.left_out.counts.total(),
        )


def _histograms(findings: ScanFindings, context_length: int) -> Iterator[dict[str, Any]]:
    images = findings.images[findings.distinct]
    if not len(images):
        return
    lengths = findings.token_counts
    width = -(-(context_length + 1) // (BARS // 2))  # tokens per bar; half of the bars are for truncated captions
    truncated = context_length + 1 + width * np.arange(BARS // 2)
    truncated = truncated[: np.searchsorted(truncated, len(lengths)) + 1]
    edges = np.concatenate([np.arange(1, context_length + 1, width), truncated])
    counts = [int(lengths[start:stop].sum()) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    counts[-1] += int(lengths[edges[-1] :].sum())
    title = f"captions by number of tokens; orange: truncated at {context_length}"
    yield _histogram(title, edges.tolist(), counts, context_length + 1)
    sides = np.minimum(images["width"], images["height"])
    edges = np.unique(np.geomspace(sides.min(), sides.max() + 1, 25).round().astype(int))
    yield _histogram("images by shorter side, pixels", edges.tolist(), np.histogram(sides, edges)[0].tolist())


def _histogram(title: str, edges: list[int], counts: list[int], marked_from: float = float("inf")) -> dict[str, Any]:
    """Values for the ``histogram`` macro; bar ``i`` counts integers from ``edges[i]`` to below ``edges[i + 1]``."""
    tallest = max(1, *counts)
    bars = []
    for first, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        label = f"{first}" if first == end - 1 else f"{first} to {end - 1}"
        bars.append((count / tallest, f"{label}: {count:,}", first >= marked_from))
    ticks = [(place / len(bars), edges[place]) for place in range(0, len(bars), -(-len(bars) // 10))]
    return {"title": f"{title}; the tallest bar: {tallest:,}", "bars": bars, "ticks": ticks}


def _shown(source: PairSource, rows: Iterable[int]) -> list[dict[str, Any]]:
    """Thumbnails of pairs, with their captions and names."""
    pairs = []
    for row in rows:
        try:
            stored = source.read(int(row))
            image = stored_thumbnail(stored.image, stored.where)
        except BadSample as error:  # readable a moment ago
            pairs.append({"image": None, "captions": [str(error)], "names": []})
        else:
            captions = [_shortened(caption) for caption in stored.captions]
            pairs.append({"image": image, "captions": captions, "names": [stored.where, stored.key]})
    return pairs


def _shortened(caption: str) -> str:
    return caption if len(caption) <= CHARACTERS else f"{caption[:CHARACTERS]}..."


def _groups(groups: Groups, source: PairSource) -> list[tuple[list[dict[str, Any]], int]]:
    """The first pairs of the largest groups, and the number of the others."""
    return [(_shown(source, rows[:OF_GROUP]), len(rows[OF_GROUP:])) for rows in groups.largest]


def _captions(groups: Groups, source: PairSource, findings: ScanFindings) -> Iterator[tuple[str, str]]:
    """The most frequent captions and their counts."""
    rows = findings.caption_rows
    for positions in groups.largest:
        wanted = int(findings.captions[positions[0]])
        try:
            captions = source.captions(int(rows[positions[0]]))
        except BadSample as error:
            captions = [str(error)]
        text = next((caption for caption in captions if caption_hash(caption) == wanted), captions[0])
        yield _shortened(text), f"{len(positions):,}"
