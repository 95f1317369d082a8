"""What the findings of a pass come to, in words and figures."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from datamodules.inspection.scan import ANIMATED, PLAIN, TURNED, ScanFindings, formats
from datamodules.loading.sampling import EvaluationBatchSampler, GlobalBatchSampler
from datamodules.near_duplicates import Groups, equal_groups, look_alikes
from datamodules.pairs.source import LeftOut
from lit_clip.errors import InputError

KILO = 1000


class SummaryLine(NamedTuple):
    """A figure and what it is of.

    Attributes:
        name: of the figure.
        value: the figure.
        wrong: whether somebody should do something about it.
    """

    name: str
    value: str
    wrong: bool = False


class Section(NamedTuple):
    """Lines that belong together."""

    title: str
    lines: list[SummaryLine]


class Repeats(NamedTuple):
    """What is there more than once; positions are rows, those of captions are positions among the captions.

    Attributes:
        files: images of different names whose files are equal.
        looks: images of different files that look the same.
        captions: equal captions.
        pairs: pairs of an equal file and an equal caption that another pair is too.
    """

    files: Groups
    looks: Groups
    captions: Groups
    pairs: int


def find_repeats(findings: ScanFindings) -> Repeats:
    """Compare all images and all captions by their hashes."""
    images, rows = findings.images, findings.distinct
    files = _of_rows(equal_groups(images["file"][rows]), rows)
    each = rows[np.sort(np.unique(images["file"][rows], return_index=True)[1])]
    each = each[images["state"][each] & PLAIN == 0]
    looks = _of_rows(look_alikes(images["bits"][each], images["colour"][each]), each)
    pairs = images["file"][findings.caption_rows] ^ (findings.captions * np.uint64(0x9E3779B97F4A7C15))
    return Repeats(files, looks, equal_groups(findings.captions), len(pairs) - len(np.unique(pairs)))


def _of_rows(groups: Groups, rows: np.ndarray) -> Groups:
    return groups._replace(largest=[rows[group] for group in groups.largest])


def summarize(
    findings: ScanFindings, left_out: LeftOut, repeats: Repeats, context_length: int, world_size: int, batch_size: int
) -> list[Section]:
    """All figures.

    Args:
        findings: of the pass.
        left_out: rows that were none when the source was opened.
        repeats: see :func:`find_repeats`.
        context_length: tokens that the model reads.
        world_size: processes that train.
        batch_size: pairs a step on each of them.
    """
    sections = [Section("pairs", _pair_lines(findings, left_out, repeats))]
    if len(findings.usable):
        sections.append(Section("images", _image_lines(findings, repeats)))
        sections.append(Section("captions", _caption_lines(findings, repeats, context_length)))
    of_each = "one process" if world_size == 1 else f"each of {world_size} processes"
    title = f"batches of {batch_size} on {of_each}"
    unusable = len(findings.images) - len(findings.usable)
    sections.append(Section(title, _batch_lines(len(findings.images), unusable, world_size, batch_size)))
    return sections


def share(part: int, whole: int) -> str:
    """A number and what percentage that is."""
    if not whole or part in (0, whole):
        return f"{part:,}"
    return f"{part:,} ({part / whole:.1%})" if part / whole >= 0.001 else f"{part:,} (under 0.1%)"


def _pair_lines(findings: ScanFindings, left_out: LeftOut, repeats: Repeats) -> list[SummaryLine]:
    read, usable, dropped = len(findings.images), len(findings.usable), left_out.counts.total()
    lines = [
        SummaryLine("rows or samples found", f"{read + dropped:,}"),
        SummaryLine("usable", share(usable, read + dropped)),
    ]
    lines += [SummaryLine(f"left out: {reason}", f"{count:,}", True) for reason, count in left_out.counts.most_common()]
    lines += [
        SummaryLine(f"cannot be used: {reason}", f"{count:,}", True) for reason, count in findings.reasons.most_common()
    ]
    lines.append(
        SummaryLine("the same image and caption as another pair", share(repeats.pairs, usable), repeats.pairs > 0)
    )
    return lines


def _image_lines(findings: ScanFindings, repeats: Repeats) -> list[SummaryLine]:
    images = findings.images[findings.distinct]
    number = len(images)
    kinds = {str(formats()[kind]): count for kind, count in _counts(images["format"]).items()}
    modes = {(*Image.MODES, "other")[mode]: count for mode, count in _counts(images["mode"]).items()}
    lines = [
        SummaryLine("images", f"{number:,}, with {len(findings.captions):,} captions"),
        SummaryLine("formats", _listed(kinds, number)),
        SummaryLine("colour modes", _listed(modes, number)),
        SummaryLine("bytes", f"{_bytes(images['bytes'].sum())}, {_bytes(images['bytes'].mean())} each"),
        *_size_lines(images),
    ]
    states = (
        ("turned by a camera's flag (models see them unturned)", TURNED),
        ("animated (models see the first frame)", ANIMATED),
        ("one plain colour", PLAIN),
    )
    for name, bit in states:
        count = int((images["state"] & bit > 0).sum())
        lines += [SummaryLine(name, share(count, number), True)] if count else []
    lines.append(_repeated("the same file as another image", repeats.files, number))
    lines.append(_repeated("another file, but the same look (64-bit difference hash)", repeats.looks, number))
    return lines


def _size_lines(images: np.ndarray) -> list[SummaryLine]:
    width, height = images["width"], images["height"]
    area = width.astype(np.int64) * height
    lines = []
    for name, place in (("smallest", 0), ("median", len(area) // 2), ("largest", len(area) - 1)):
        row = np.argpartition(area, place)[place]
        lines.append(SummaryLine(f"{name}, width x height", f"{width[row]} x {height[row]}"))
    small = int((np.minimum(width, height) < 224).sum())
    lines.append(SummaryLine("shorter side under 224 pixels", share(small, len(images))))
    return lines


def _repeated(name: str, groups: Groups, whole: int) -> SummaryLine:
    in_groups = f" in {groups.number:,} {'group' if groups.number == 1 else 'groups'}" if groups.number else ""
    return SummaryLine(name, share(groups.surplus, whole) + in_groups, groups.number > 0)


def _caption_lines(findings: ScanFindings, repeats: Repeats, context_length: int) -> list[SummaryLine]:
    counts = findings.token_counts
    lengths, number = np.arange(len(counts)), int(counts.sum())
    cut = int(counts[context_length + 1 :].sum())
    lost = int((counts * (lengths - context_length).clip(0)).sum())
    median, most = (int(np.searchsorted(counts.cumsum(), number * part)) for part in (0.5, 0.95))
    lines = [
        SummaryLine("captions", f"{number:,}"),
        SummaryLine(
            "tokens, start and end included",
            f"mean {(counts * lengths).sum() / number:.1f}, median {median}, 95% at most {most}, longest {lengths[-1]}",
        ),
        SummaryLine(f"cut at {context_length} tokens", share(cut, number), cut > 0),
    ]
    if cut:
        lines.append(SummaryLine("tokens lost of a caption that is cut", f"{lost / cut:.1f} on average", True))
    lines.append(_repeated("the same as another caption", repeats.captions, number))
    return lines


def _batch_lines(pairs: int, unusable: int, world_size: int, batch_size: int) -> list[SummaryLine]:
    """Of all pairs: training that skips what cannot be used leaves its places in the batches empty."""
    lines = [SummaryLine("pairs, with those that cannot be used", f"{pairs:,}")] if unusable else []
    steps, none = 0, ""
    try:
        steps = len(GlobalBatchSampler(pairs, batch_size, 0, world_size, 0))
    except InputError:
        fits = pairs // world_size
        less = f"--batch_size {fits} or less, or fewer processes" if fits else "fewer processes"
        none = f": a step takes {batch_size * world_size:,} pairs; nothing would be learnt; try {less}"
    left = pairs - steps * batch_size * world_size
    validation = len(EvaluationBatchSampler(pairs, batch_size, 0, world_size))
    return [
        *lines,
        SummaryLine("training steps an epoch", f"{steps:,}{none}", steps == 0),
        SummaryLine("pairs that sit out an epoch, others each time", share(left, pairs)),
        SummaryLine("validation batches", f"{validation:,}"),
    ]


def _counts(values: np.ndarray) -> dict[int, int]:
    return dict(Counter(dict(enumerate(np.bincount(values).tolist()))).most_common())


def _listed(counts: Mapping[str, int], whole: int) -> str:
    return ", ".join(f"{name} {share(count, whole)}" for name, count in counts.items() if count)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < KILO:
            return f"{number:.3g} {unit}"
        number /= KILO
    return f"{number:.3g} TB"
