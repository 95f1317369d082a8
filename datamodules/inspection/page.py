"""The findings of a pass as one HTML file that needs nothing else: figures, histograms, images, lists."""

import base64
import io
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.inspection.scan import ScanFindings, caption_digest
from datamodules.inspection.summary import Repeats, Section
from datamodules.near_duplicates import Groups
from datamodules.pairs.source import EncodedPair, PairSource
from lit_clip.errors import BadSample
from lit_clip.tools.atomic import replacing
from lit_clip.tools.html import page
from lit_clip.tools.images import decoding_at_least, open_image

SAMPLES = 24
OF_GROUP = 4  # images of a group that are shown
THUMBNAIL = 160  # pixels of the longer side
CHARACTERS = 200  # of a caption
BARS = 40
CHART = (640, 180)  # width and height of a histogram, without its labels
LABEL = 24

_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: .2rem .8rem .2rem 0; vertical-align: top; text-align: left; overflow-wrap: anywhere }
td:first-child { color: #555; width: 42% }
tr.wrong td:last-child { color: #b03a00; font-weight: 600 }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { margin: 0 }
.chart { flex: 1 1 460px }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem }
.group { border: 1px solid #ddd; border-radius: 6px; padding: .6rem }
.gallery img { width: 100%; height: 150px; object-fit: contain; background: #f2f2f2 }
figcaption { overflow-wrap: anywhere; font-size: .85rem }
figcaption small { color: #666 }
figcaption span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden }"""


def write_page(
    path: Path,
    title: str,
    source: PairSource,
    findings: ScanFindings,
    repeats: Repeats,
    sections: Sequence[Section],
    context_length: int,
) -> None:
    """Write the page; thumbnails are inside it, nothing is fetched from anywhere.

    Args:
        path: of the page.
        title: what the data are called.
        source: of the pairs that are shown.
        findings: of the pass.
        repeats: among them.
        sections: the figures.
        context_length: tokens that a model reads.
    """
    usable = findings.usable
    with warnings.catch_warnings(action="ignore"):  # Pillow's, as in the pass
        parts = [*map(_section, sections), _charts(findings, context_length)]
        if len(usable):
            some = usable[np.unique(np.linspace(0, len(usable) - 1, SAMPLES).astype(int))]
            parts += ["<h2>images, as a model sees them</h2>", _gallery(source, some)]
        parts += _groups("the same file", repeats.files, source)
        parts += _groups("other files of the same look", repeats.looks, source)
        parts += _captions(repeats.captions, source, findings)
    wrong = [(where, line) for where, _, line in findings.problems] + source.left_out.listed
    parts += _problems(wrong, findings.reasons.total() + source.left_out.counts.total())
    content = page(title, _STYLE, "\n".join([f"<h1>{escape(title)}</h1>", *parts]))
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="replace")


def _section(section: Section) -> str:
    rows = (
        f"<tr{' class=wrong' if line.wrong else ''}><td>{escape(line.name)}</td><td>{escape(line.value)}</td></tr>"
        for line in section.lines
    )
    return f"<h2>{escape(section.title)}</h2>\n<table>\n" + "\n".join(rows) + "\n</table>"


def _charts(findings: ScanFindings, context_length: int) -> str:
    images = findings.images[findings.distinct]
    if not len(images):
        return ""
    sides = np.minimum(images["width"], images["height"])
    lengths = findings.token_counts
    wide = max(1, -(-(context_length + 1) // (BARS // 2)))  # tokens a bar; half of the bars are for what is cut
    edges = np.append(np.arange(1, context_length + 1, wide), context_length + 1)
    if len(lengths) > context_length + 1:
        cut = context_length + 1 + wide * np.arange(1, BARS // 2)
        edges = np.concatenate([edges, cut[: np.searchsorted(cut, len(lengths)) + 1]])
    heights = [int(lengths[start:stop].sum()) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    heights[-1] += int(lengths[edges[-1] :].sum())
    shown = np.unique(np.geomspace(sides.min(), sides.max() + 1, 25).round().astype(int))
    return "\n".join(
        [
            '<h2>histograms</h2>\n<div class="charts">',
            _chart(f"captions by tokens; orange: cut at {context_length}", edges, heights, context_length + 1),
            _chart("images by shorter side, pixels", shown, np.histogram(sides, shown)[0].tolist(), None),
            "</div>",
        ]
    )


def _chart(title: str, edges: np.ndarray, heights: Sequence[int], wrong_from: int | None) -> str:
    """A histogram as SVG; bar ``i`` is of the whole numbers from ``edges[i]`` up to ``edges[i + 1]``, that left out."""
    width, height = CHART
    step, tallest = width / len(heights), max(1, *heights)
    parts = [f'<figure class="chart"><svg viewBox="0 0 {width} {height + LABEL}" role="img" aria-label="{title}">']
    for place, count in enumerate(heights):
        first, last = int(edges[place]), int(edges[place + 1]) - 1
        tall = height * count / tallest
        colour = "#d9642c" if wrong_from is not None and first >= wrong_from else "#3b6ea5"
        label = f"{first}" if first == last else f"{first} to {last}"
        parts.append(
            f'<rect x="{place * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}" '
            f'fill="{colour}"><title>{label}: {count:,}</title></rect>'
        )
    every = -(-len(heights) // 10)
    for place in range(0, len(heights), every):
        parts.append(f'<text x="{place * step:.1f}" y="{height + 16}" fill="#555">{int(edges[place])}</text>')
    parts.append(f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="#999"/></svg>')
    return "\n".join(parts) + f"\n<figcaption>{escape(title)}; the tallest bar: {tallest:,}</figcaption></figure>"


def _gallery(source: PairSource, rows: Iterable[int]) -> str:
    return '<div class="gallery">\n' + "\n".join(_figure(source, int(row)) for row in rows) + "\n</div>"


def _figure(source: PairSource, row: int) -> str:
    try:
        stored = source.read(row)
        image = _thumbnail(stored)
    except BadSample as error:  # it was there a moment ago
        return f"<figure><figcaption>{escape(str(error))}</figcaption></figure>"
    more = f"(+{len(stored.captions) - 1} captions)<br>" if len(stored.captions) > 1 else ""
    caption = f"<span>{escape(_short(stored.captions[0]))}</span>{more}"
    caption += f"<small>{escape(stored.where)}<br>{escape(stored.key)}</small>"
    return f'<figure><img src="data:image/jpeg;base64,{image}" alt=""><figcaption>{caption}</figcaption></figure>'


def _thumbnail(stored: EncodedPair) -> str:
    """A JPEG of the image, base64."""
    with decoding_at_least(lambda width, height: (min(width, THUMBNAIL), min(height, THUMBNAIL))):
        image = open_image(io.BytesIO(stored.image), stored.where).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()


def _short(caption: str) -> str:
    return caption if len(caption) <= CHARACTERS else f"{caption[:CHARACTERS]}..."


def _groups(title: str, groups: Groups, source: PairSource) -> list[str]:
    if not groups.number:
        return []
    of_all = "" if groups.number == len(groups.largest) else f", the largest of {groups.number:,} groups"
    parts = [f'<h2>{escape(title)}{of_all}</h2>\n<div class="groups">']
    for rows in groups.largest:
        more = f"<small>and {len(rows) - OF_GROUP:,} more</small>" if len(rows) > OF_GROUP else ""
        parts.append(f'<div class="group">{_gallery(source, rows[:OF_GROUP])}{more}</div>')
    return [*parts, "</div>"]


def _captions(groups: Groups, source: PairSource, findings: ScanFindings) -> list[str]:
    if not groups.number:
        return []
    of_rows = findings.caption_rows
    parts = ["<h2>captions that come most often</h2>\n<table>"]
    for positions in groups.largest:
        wanted = int(findings.captions[positions[0]])
        try:
            captions = source.captions(int(of_rows[positions[0]]))
        except BadSample as error:
            captions = [str(error)]
        text = next((caption for caption in captions if caption_digest(caption) == wanted), captions[0])
        parts.append(f"<tr><td>{escape(_short(text))}</td><td>{len(positions):,}</td></tr>")
    return [*parts, "</table>"]


def _problems(wrong: Sequence[tuple[str, str]], number: int) -> list[str]:
    if not number:
        return []
    of_all = "" if number == len(wrong) else f", the first {len(wrong):,} of {number:,}"
    parts = [f"<h2>what cannot be used{of_all}</h2>\n<table>"]
    for where, line in wrong:
        reason = line.removeprefix(f"{where}: ")
        parts.append(f"<tr><td>{escape(where)}</td><td>{escape(reason)}</td></tr>")
    return [*parts, "</table>"]
