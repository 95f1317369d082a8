"""Findings of an inspection: a summary of names and values, and an HTML page with histograms, images and lists."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lit_clip.errors import BadSample
from lit_clip.tools.console import size_in_bytes
from lit_clip.tools.html import stored_thumbnail, write_page
from lit_clip.tools.images import formats
from ..near_duplicates import Groups, equal_groups, look_labels
from ..pairs.decisions import DROP
from ..pairs.findings import Counts
from ..pairs.related_rows import caption_hash
from ..pairs.source import LISTED, PairSource
from .scan import ANIMATED, CONVERTED, DEEP, PLAIN, ROTATED, TRANSPARENT, ScanFindings

MIXED = np.uint64(0x9E3779B97F4A7C15)  # the product of one of two hashes with it, and the other: a hash of both
TEMPLATE = Path(__file__).parent / "templates" / "inspect.html"
SAMPLES = 24
OF_GROUP = 4  # images of a group that are shown
CHARACTERS = 200  # of a caption
BARS = 40


class Line(NamedTuple):
    """A line of the summary; ``wrong`` marks a problem in the data."""

    name: str
    value: str
    wrong: bool = False


Summary = dict[str, list[Line]]  # the lines below each heading


class DuplicateGroups(NamedTuple):
    """Duplicates among images and captions."""

    files: Groups  # rows of images with different keys and equal files
    looks: Groups  # rows of images with different files that look the same
    captions: Groups  # positions, among all captions, of equal captions
    pairs: int  # beyond the first with the same file and caption


class Inspection(NamedTuple):
    """What is known about data after reading them once."""

    name: str
    source: PairSource
    findings: ScanFindings
    duplicates: DuplicateGroups
    context_length: int  # tokens that the model reads of a caption


def find_duplicates(findings: ScanFindings, things: np.ndarray | None = None) -> DuplicateGroups:
    """Find duplicates by comparing the hashes of all images and captions.

    Captions of rows with one number in ``things``, ``[N]``, are the same thing's, so equal ones count once.
    """
    images, rows = findings.images, findings.distinct
    files = _of_rows(equal_groups(images["file"][rows]), rows)
    first_rows = rows[np.sort(np.unique(images["file"][rows], return_index=True)[1])]  # of each file
    first_rows = first_rows[images["state"][first_rows] & PLAIN == 0]
    looks = _of_rows(equal_groups(look_labels(images[first_rows])), first_rows)
    pairs = images["file"][findings.caption_rows] ^ (findings.captions["hash"] * MIXED)
    captions = equal_groups(findings.captions["hash"])
    if things is not None:
        of_thing = findings.captions["hash"] ^ (things[findings.caption_rows].astype(np.uint64) * MIXED)
        first = np.sort(np.unique(of_thing, return_index=True)[1])
        captions = _of_rows(equal_groups(findings.captions["hash"][first]), first)
    return DuplicateGroups(files, looks, captions, len(pairs) - len(np.unique(pairs)))


def _of_rows(groups: Groups, rows: np.ndarray) -> Groups:
    return groups._replace(largest=[rows[group] for group in groups.largest])


def summarize(inspection: Inspection, counts: Counts) -> Summary:
    """Summarise pairs, images, captions, and the ``counts`` of the table of findings."""
    findings, duplicates, left_out = inspection.findings, inspection.duplicates, inspection.source.left_out
    usable, found = len(findings.usable), len(findings.images) + left_out.counts.total()
    lines = [Line("rows or samples found", f"{found:,}"), Line("usable", share(usable, found))]
    lines += [Line(f"left out: {reason}", f"{count:,}", True) for reason, count in left_out.counts.most_common()]
    lines += [Line(f"unusable: {reason}", f"{count:,}", True) for reason, count in findings.reasons.most_common()]
    repeated = share(duplicates.pairs, usable)
    summary = {"pairs": [*lines, Line("same image and caption as another pair", repeated, duplicates.pairs > 0)]}
    if usable:
        summary["images"] = _image_lines(findings, duplicates)
        summary["captions"] = _caption_lines(findings, duplicates, inspection.context_length)
    if counts:
        ordered = sorted(counts.items(), key=lambda item: (item[0][1], -item[1], item[0]))
        lines = [
            Line(f"{finding}: {decision}", f"{count:,}", decision == DROP) for (finding, decision), count in ordered
        ]
        summary["findings, with the decisions that the table proposes"] = lines
    return summary


def share(part: int, whole: int) -> str:
    """Return a count and its percentage as text."""
    if not whole or part in (0, whole):
        return f"{part:,}"
    return f"{part:,} ({part / whole:.1%})" if part / whole >= 0.001 else f"{part:,} (under 0.1%)"


def _image_lines(findings: ScanFindings, duplicates: DuplicateGroups) -> list[Line]:
    images = findings.images[findings.distinct]
    number = len(images)
    kinds = {str(formats()[kind]): count for kind, count in _counts(images["format"]).items()}
    modes = {(*Image.MODES, "other")[mode]: count for mode, count in _counts(images["mode"]).items()}
    lines = [
        Line("images", f"{number:,}, with {len(findings.captions):,} captions"),
        Line("formats", _listed(kinds, number)),
        Line("colour modes", _listed(modes, number)),
        Line("bytes", f"{size_in_bytes(images['bytes'].sum())}, {size_in_bytes(images['bytes'].mean())} each"),
    ]
    area = images["width"].astype(np.int64) * images["height"]
    for name, place in (("smallest", 0), ("median", number // 2), ("largest", number - 1)):
        row = np.argpartition(area, place)[place]
        lines.append(Line(f"{name}, width x height", f"{images['width'][row]} x {images['height'][row]}"))
    small = int((np.minimum(images["width"], images["height"]) < 224).sum())
    lines.append(Line("shorter side under 224 pixels", share(small, number)))
    states = (
        ("more than 8 bits a level (models see the highest 8)", DEEP),
        ("four or more bands, as CMYK (models see them converted to RGB)", CONVERTED),
        ("with an EXIF rotation (models see them unrotated)", ROTATED),
        ("animated (models see the first frame)", ANIMATED),
        ("transparent (models see what lies underneath, often black; draw them on white)", TRANSPARENT),
        ("a single colour", PLAIN),
    )
    for name, bit in states:
        count = int((images["state"] & bit > 0).sum())
        lines += [Line(name, share(count, number), True)] if count else []
    lines.append(_duplicate_line("same file as another image", duplicates.files, number))
    lines.append(_duplicate_line("other file that looks the same (64-bit difference hash)", duplicates.looks, number))
    return lines


def _duplicate_line(name: str, groups: Groups, whole: int) -> Line:
    in_groups = f" in {groups.number:,} {'group' if groups.number == 1 else 'groups'}" if groups.number else ""
    return Line(name, share(groups.surplus, whole) + in_groups, groups.number > 0)


def _caption_lines(findings: ScanFindings, duplicates: DuplicateGroups, context_length: int) -> list[Line]:
    counts = np.bincount(findings.captions["tokens"])
    lengths, number = np.arange(len(counts)), int(counts.sum())
    cut = int(counts[context_length + 1 :].sum())
    lost = int((counts * (lengths - context_length).clip(0)).sum())
    median, most = (int(np.searchsorted(counts.cumsum(), number * part)) for part in (0.5, 0.95))
    sizes = f"mean {(counts * lengths).sum() / number:.1f}, median {median}, 95% at most {most}, longest {lengths[-1]}"
    lines = [
        Line("captions", f"{number:,}"),
        Line("tokens, start and end included", sizes),
        Line(f"truncated at {context_length} tokens", share(cut, number), cut > 0),
    ]
    if cut:
        lines.append(Line("tokens lost per truncated caption", f"{lost / cut:.1f} on average", True))
    lines.append(_duplicate_line("same as another caption", duplicates.captions, number))
    if duplicates.captions.number:
        as_right = "--model.loss Contrastive --model.loss.duplicates positives"
        lines.append(Line("to count them as right in training", as_right))
    return lines


def _counts(values: np.ndarray) -> dict[int, int]:
    return dict(Counter(dict(enumerate(np.bincount(values).tolist()))).most_common())


def _listed(counts: Mapping[str, int], whole: int) -> str:
    return ", ".join(f"{name} {share(count, whole)}" for name, count in counts.items() if count)


def write_inspection(path: Path, inspection: Inspection, summary: Summary, table: tuple[str, str] | None) -> None:
    """Write the HTML page of a scan.

    ``table`` is the name of the table of findings beside the page and the command that trains on the rest; None without
    findings.
    """
    source, findings, duplicates = inspection.source, inspection.findings, inspection.duplicates
    usable = findings.usable
    samples = usable[np.unique(np.linspace(0, len(usable) - 1, SAMPLES).astype(int))] if len(usable) else []
    wrong = [(where, line) for where, _, line in findings.problems[:LISTED]] + source.left_out.listed
    with warnings.catch_warnings(action="ignore"):  # from Pillow, as in the scan
        write_page(
            path,
            TEMPLATE,
            title=inspection.name,
            sections=summary,
            findings=table,
            histograms=list(_histograms(findings, inspection.context_length)),
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
    lengths = np.bincount(findings.captions["tokens"])
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
    """Return values for the ``histogram`` macro; bar ``i`` counts integers in ``[edges[i], edges[i + 1])``."""
    tallest = max(1, *counts)
    bars = []
    for first, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        label = f"{first}" if first == end - 1 else f"{first} to {end - 1}"
        bars.append((count / tallest, f"{label}: {count:,}", first >= marked_from))
    ticks = [(place / len(bars), edges[place]) for place in range(0, len(bars), -(-len(bars) // 10))]
    return {"title": f"{title}; the tallest bar: {tallest:,}", "bars": bars, "ticks": ticks}


def _shown(source: PairSource, rows: Iterable[int]) -> list[dict[str, Any]]:
    """Return thumbnails of pairs, with their captions and names."""
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
    """Return the first pairs of the largest groups, and the number of other groups."""
    return [(_shown(source, rows[:OF_GROUP]), len(rows[OF_GROUP:])) for rows in groups.largest]


def _captions(groups: Groups, source: PairSource, findings: ScanFindings) -> Iterator[tuple[str, str]]:
    """Return the most frequent captions and their counts."""
    rows = findings.caption_rows
    for positions in groups.largest:
        wanted = int(findings.captions["hash"][positions[0]])
        try:
            captions = source.captions(int(rows[positions[0]]))
        except BadSample as error:
            captions = [str(error)]
        text = next((caption for caption in captions if caption_hash(caption) == wanted), captions[0])
        yield _shortened(text), f"{len(positions):,}"
