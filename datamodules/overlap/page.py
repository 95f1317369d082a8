"""The overlap of evaluation sets as one HTML file that needs nothing else: figures, and pairs to judge by."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.overlap.findings import OverlapPair, SetFindings
from datamodules.pairs.source import PairSource
from lit_clip.errors import InputError
from lit_clip.evaluation.overlap import Overlap
from lit_clip.tools.atomic import replacing
from lit_clip.tools.html import page
from lit_clip.tools.images import decoding_at_least, open_image

SHOWN = 12  # pairs of a kind
THUMBNAIL = 160  # pixels of the longer side
BARS = 50
CHART = (640, 120)  # width and height of the histogram, without its labels

_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 }
td, th { padding: .2rem .6rem; text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere }
th { color: #555; font-weight: 500; border-bottom: 1px solid #ddd }
tr.chosen td { font-weight: 600; background: #fff3e2 }
tr.wrong td { color: #b03a00 }
p { max-width: 52rem }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .5rem }
figure.same { border-color: #d9822b; background: #fffaf3 }
figure div { display: flex; gap: 4px }
figure img, figure span.gone { width: calc(50% - 2px); height: 115px; object-fit: contain; background: #f2f2f2 }
figcaption { overflow-wrap: anywhere; font-size: .8rem; color: #666 }
figcaption b { color: #222 }
svg { width: 100%; max-width: 660px; height: auto; font: 12px system-ui, sans-serif }"""

_WHAT = """\
<p>For each image of an evaluation set the nearest training image was looked for, by the cosine similarity of the
model's image features and by a hash of the image. Images from the threshold on count as the overlap, the others are
clean. Judge the pairs: above the threshold they should be the same image, below it they should not. If they are not,
choose another threshold with --threshold and run the command again; nothing is read anew.</p>
<p>p: how probable at least as many right answers on the overlap would be if the model were right there as often as on
the clean images (one-sided binomial test), multiplied by the number of sets tested (Bonferroni). The interval of the
accuracy on the overlap is the exact one of 99.5 %.</p>"""


def write_page(path: Path, report: Mapping[str, Any], sets: Mapping[str, SetFindings], source: PairSource) -> None:
    """Write the page; thumbnails are inside it, nothing is fetched from anywhere.

    Args:
        path: of the page.
        report: the figures.
        sets: what was found of each set.
        source: of the training images that are shown.
    """
    train = report["train"]
    title = f"data overlap with {', '.join(train['data'])}"
    parts = [f"<h1>{escape(title)}</h1>", _WHAT, _overview(report)]
    with warnings.catch_warnings(action="ignore"):  # Pillow's, as when they were read
        for name, findings in sets.items():
            parts.append(_set(name, findings, source))
    parts.append(_problems("training images that could not be read", train["skipped_lines"], _total(train)))
    for name, findings in sets.items():
        parts.append(_problems(f"{name}: images that could not be read", findings.bad[:SHOWN], len(findings.bad)))
    with replacing(path) as temporary:
        temporary.write_text(page(title, _STYLE, "\n".join(parts)), encoding="utf-8", errors="replace")


def _total(train: Mapping[str, Any]) -> int:
    return sum(train["skipped"].values())


def percent(value: float | None) -> str:
    """A fraction for people; nothing if there is none."""
    return "" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of two fractions, likewise, in percentage points."""
    return "" if value is None else f"{100 * value:+.2f}"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows with a CSS class each."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for style, cells in rows:
        lines.append(f'<tr class="{style}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


_FIGURES = ("overlap", "of all", "accuracy: all", "on clean", "on overlap", "all - clean, points")


def _figures(overlap: Overlap) -> list[str]:
    accuracies = [percent(value) for value in (overlap.accuracy_all, overlap.accuracy_clean, overlap.accuracy_overlap)]
    share = percent(overlap.contamination)
    return [f"{overlap.overlap:,}", share, *accuracies, points(overlap.difference)]


def _overview(report: Mapping[str, Any]) -> str:
    rows = []
    for name, said in report["sets"].items():
        overlap = Overlap(**{key: said[key] for key in Overlap.__dataclass_fields__})
        interval = "" if overlap.interval is None else " to ".join(percent(end) for end in overlap.interval)
        p_value = said["p_value_bonferroni"]
        last = [interval, "" if p_value is None else f"{p_value:.2g}"]
        rows.append(("", [name, f"{said['threshold']:g}", f"{overlap.images:,}", *_figures(overlap), *last]))
    head = ("set", "threshold", "images", *_FIGURES, "interval on overlap", "p")
    train = report["train"]
    skipped = f", {_total(train):,} could not be read" if train["skipped"] else ""
    said = f"<p>{train['images']:,} training images{skipped}; model: {escape(report['model']['name'])}</p>"
    return f"{said}\n{_table(head, rows)}"


def _set(name: str, findings: SetFindings, source: PairSource) -> str:
    parts = [f"<h2>{escape(name)}</h2>"]
    similarity = np.array([pair.similarity for pair in findings.nearest])
    if findings.tried:
        rows = [
            ("chosen" if limit == findings.threshold else "", [f"{limit:g}", *_figures(overlap)])
            for limit, overlap in findings.tried
        ]
        parts += ["<h3>what other thresholds would say</h3>", _table(("threshold", *_FIGURES), rows)]
    parts.append(_histogram(similarity, findings.threshold))
    order = np.argsort(-similarity, kind="stable")
    above, below = order[similarity[order] >= findings.threshold], order[similarity[order] < findings.threshold]
    shown = {
        f"just above {findings.threshold:g}": above[::-1][:SHOWN],
        f"just below {findings.threshold:g}": below[:SHOWN],
        "from the most to the least similar": order[np.unique(np.linspace(0, len(order) - 1, SHOWN).astype(int))],
    }
    for title, places in shown.items():
        parts.append(
            _gallery(title, [(findings.nearest[at], bool(findings.seen[at])) for at in places], findings, source)
        )
    looks = [pair for at in below if (pair := findings.alike[at]) is not None]
    title = f"below the threshold, and yet of the same look ({len(looks):,})"
    parts.append(_gallery(title, [(pair, True) for pair in looks[:SHOWN]], findings, source))
    return "\n".join(parts)


def _histogram(similarity: np.ndarray, threshold: float) -> str:
    """Items by similarity, the heights logarithmic: of thousands a few are near."""
    low = min(float(np.floor(similarity.min() * 20) / 20), threshold, 0.95)
    counts, edges = np.histogram(np.clip(similarity, low, 1), BARS, (low, 1))
    width, height = CHART
    step, tallest = width / BARS, np.log1p(max(1, int(counts.max())))
    parts = [f'<svg viewBox="0 0 {width} {height + 24}" role="img" aria-label="images by similarity">']
    for place, count in enumerate(counts.tolist()):
        tall = height * float(np.log1p(count) / tallest)
        parts.append(
            f'<rect x="{place * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}" '
            f'fill="#3b6ea5"><title>{edges[place]:.3f} to {edges[place + 1]:.3f}: {count:,}</title></rect>'
        )
    at = width * (threshold - low) / (1 - low) if low < 1 else width
    parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}" stroke="#d9822b" stroke-width="2"/>')
    for value in np.linspace(low, 1, 6):
        x, anchor = width * (value - low) / (1 - low), "end" if value == 1 else "start"
        parts.append(f'<text x="{x:.1f}" y="{height + 16}" fill="#555" text-anchor="{anchor}">{value:.2f}</text>')
    title = "<h3>images by similarity to the nearest training image (heights are logarithmic)</h3>"
    return title + "\n" + "\n".join(parts) + "</svg>"


def _gallery(title: str, pairs: Sequence[tuple[OverlapPair, bool]], findings: SetFindings, source: PairSource) -> str:
    if not pairs:
        return ""
    figures = [_figure(pair, same, findings, source) for pair, same in pairs]
    return f"<h3>{escape(title)}</h3>\n" + '<div class="pairs">\n' + "\n".join(figures) + "\n</div>"


def _figure(pair: OverlapPair, same: bool, findings: SetFindings, source: PairSource) -> str:
    ours = theirs = '<span class="gone"></span>'
    try:
        ours = _image(findings.images.images(pair.item)[pair.frame])
        if pair.row >= 0:
            stored = source.read(pair.row)
            with decoding_at_least(lambda width, height: (min(width, THUMBNAIL), min(height, THUMBNAIL))):
                theirs = _image(open_image(io.BytesIO(stored.image), stored.where))
    except (InputError, IndexError):  # it was there a moment ago
        pass
    told = "same look" if pair.similarity is None else f"{pair.similarity:.3f}"
    names = f"{escape(findings.images.key(pair.item))}<br>{escape(pair.name)}"
    style = ' class="same"' if same else ""
    return f"<figure{style}><div>{ours}{theirs}</div><figcaption><b>{told}</b><br>{names}</figcaption></figure>"


def _image(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}" alt="">'


def _problems(title: str, lines: Sequence[str], number: int) -> str:
    if not number:
        return ""
    of_all = "" if number == len(lines) else f", the first {len(lines):,} of {number:,}"
    return f"<h2>{escape(title + of_all)}</h2>\n" + _table((), [("wrong", [line]) for line in lines])
