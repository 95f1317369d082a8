"""HTML page of the overlap of evaluation sets: figures, and pairs of images for judging the threshold."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_clip.errors import InputError
from lit_clip.evaluation.overlap import Overlap
from lit_clip.tools.html import stored_thumbnail, thumbnail, write_page
from ..pairs.source import PairSource
from .search import OverlapPair, SetFindings

TEMPLATE = Path(__file__).parent / "templates" / "overlap.html"
SHOWN = 12  # pairs of a kind
BARS = 50


def write_overlap(
    path: Path, report: Mapping[str, Any], sets: Mapping[str, SetFindings], source: PairSource, command: str
) -> None:
    """Write the page from a JSON ``report`` and findings by set; ``source`` has the training images shown.

    ``command`` trains on the images that are in no set; empty if none is in one.
    """
    with warnings.catch_warnings(action="ignore"):  # from Pillow, as when the images were read
        galleries = {name: _galleries(findings, source) for name, findings in sets.items()}
    write_page(
        path,
        TEMPLATE,
        title=f"data overlap with {', '.join(report['train']['data'])}",
        report=report,
        command=command,
        overview=[_overview(name, sets[name], figures) for name, figures in report["sets"].items()],
        thresholds={
            name: [[f"{limit:g}", *_figures(overlap)] for limit, overlap in findings.tried]
            for name, findings in sets.items()
        },
        sets=sets,
        galleries=galleries,
        histograms={name: _histogram(findings) for name, findings in sets.items()},
        listed=SHOWN,
    )


def percent(value: float | None) -> str:
    """Return ``40.0 %`` for 0.4, and an empty text for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """Return ``+1.20`` percentage points for a difference of 0.012, and an empty text for None."""
    return "" if value is None else f"{100 * value:+.2f}"


def _figures(overlap: Overlap) -> list[str]:
    accuracies = [percent(value) for value in (overlap.accuracy_all, overlap.accuracy_clean, overlap.accuracy_overlap)]
    return [f"{overlap.overlap:,}", percent(overlap.contamination), *accuracies, points(overlap.difference)]


def _overview(name: str, findings: SetFindings, figures: Mapping[str, Any]) -> list[str]:
    overlap, p_value = findings.overlap, figures["p_value_bonferroni"]
    interval = "" if overlap.interval is None else " to ".join(percent(end) for end in overlap.interval)
    last = [interval, "" if p_value is None else f"{p_value:.2g}"]
    return [name, f"{findings.searched.threshold:g}", f"{overlap.images:,}", *_figures(overlap), *last]


def _histogram(findings: SetFindings) -> dict[str, Any]:
    """Return values for the ``histogram`` macro; heights are logarithmic, because few images are near."""
    similarity = np.array([pair.similarity for pair in findings.nearest])
    low = min(float(np.floor(similarity.min() * 20) / 20), findings.searched.threshold, 0.95)
    counts, edges = np.histogram(np.clip(similarity, low, 1), BARS, (low, 1))
    heights = np.log1p(counts) / np.log1p(max(1, counts.max()))
    texts = [f"{a:.3f} to {b:.3f}: {count:,}" for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    return {
        "bars": [(height, text, False) for height, text in zip(heights.tolist(), texts, strict=True)],
        "ticks": [(place / 5, f"{value:.2f}") for place, value in enumerate(np.linspace(low, 1, 6))],
        "line": (findings.searched.threshold - low) / (1 - low) if low < 1 else 1,
    }


def _galleries(findings: SetFindings, source: PairSource) -> dict[str, list[dict[str, Any]]]:
    """Return pairs for judging the threshold, under their headings."""
    similarity = np.array([pair.similarity for pair in findings.nearest])
    order = np.argsort(-similarity, kind="stable")
    above, below = (
        order[similarity[order] >= findings.searched.threshold],
        order[similarity[order] < findings.searched.threshold],
    )
    looks = [pair for place in below if (pair := findings.alike[place]) is not None]
    spread = order[np.unique(np.linspace(0, len(order) - 1, SHOWN).astype(int))]

    def nearest(places: np.ndarray) -> list[dict[str, Any]]:
        return [_shown(findings.nearest[at], bool(findings.seen[at]), findings, source) for at in places]

    return {
        f"the least similar from {findings.searched.threshold:g} on": nearest(above[::-1][:SHOWN]),
        f"the most similar below {findings.searched.threshold:g}": nearest(below[:SHOWN]),
        "from the most to the least similar": nearest(spread),
        f"below the threshold, but with the same look ({len(looks):,})": [
            _shown(pair, True, findings, source) for pair in looks[:SHOWN]
        ],
    }


def _shown(pair: OverlapPair, same: bool, findings: SetFindings, source: PairSource) -> dict[str, Any]:
    images: list[str | None] = [None, None]
    name = ""
    try:
        name = source.row(pair.row).where if pair.row >= 0 else ""
        images[0] = thumbnail(findings.images.images(pair.item)[pair.frame])
        if pair.row >= 0:
            stored = source.read(pair.row)
            images[1] = stored_thumbnail(stored.image, stored.where)
    except (InputError, IndexError):  # readable a moment ago
        pass
    label = "same look" if pair.similarity is None else f"{pair.similarity:.3f}"
    return {"images": images, "label": label, "names": [findings.images.key(pair.item), name], "same": same}
