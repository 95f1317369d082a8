"""Pieces of the report's HTML; whatever comes from the data is escaped here."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lit_clip.evaluation.overview import number
from lit_clip.tools.html import table

STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; margin-bottom: .3rem }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem;
  overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
a { color: #00588a }
p, li, summary { overflow-wrap: anywhere }
.muted, small { color: #666 }
.wrong { color: #a33400; font-weight: 600 }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
td, th { padding: .15rem .9rem .15rem 0; vertical-align: top; text-align: left; overflow-wrap: anywhere }
td:not(.n) { min-width: 7rem }
th { font-weight: 600; border-bottom: 1px solid #bbb; vertical-align: bottom }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
table.overall { width: 100%; font-size: .85rem }
table.overall th.n { white-space: normal; max-width: 7em; overflow-wrap: break-word }
table.overall td, table.overall th { padding-right: .7rem }
table.overall td:nth-child(1) { min-width: 8rem }
table.overall td:nth-child(2) { min-width: 8rem; color: #666 }
table.overall td.ours { font-weight: 600 }
table.overall tr:nth-child(even) td { background: #f6f8fa }
table.overall tr.mean td { border-top: 1px solid #bbb; font-weight: 600; background: none }
table.facts td:first-child { color: #555; white-space: nowrap }
.columns { display: flex; flex-wrap: wrap; gap: .5rem 3rem; align-items: flex-start }
.columns > div { min-width: 0; max-width: 100% }
figure { margin: 0 }
figure.chart { margin: 1rem 0; overflow-x: auto }
figure.chart svg { width: 100%; height: auto; min-width: 620px; max-width: 900px }
figure.wide svg { max-width: none }
figure.narrow svg { max-width: 700px }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem }
.gallery img, .gallery .none { width: 100%; height: 150px; object-fit: contain; background: #f2f2f2; display: block }
.gallery figcaption { font-size: .8rem; overflow-wrap: anywhere }
.gallery ol { margin: .2rem 0; padding: 0; list-style: none }
.gallery li { display: flex; justify-content: space-between; gap: .5rem; color: #666 }
.gallery b, .gallery li span:first-child, .gallery small { display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 2; overflow: hidden }
.gallery li span:last-child { flex: none }
.gallery li.truth { color: #1b6e3c; font-weight: 600 }
.gallery li.prediction { color: #a33400 }
details { margin: .6rem 0 }
summary { cursor: pointer }"""


def tree(values: Mapping[str, Any]) -> str:
    """Nested values; what has a ``value``, ``count`` and ``images`` is one line of a table."""
    lines: list[tuple[str, str]] = []
    _flatten(values, "", lines)
    return table(lines, kind="facts")


def _flatten(values: Mapping[str, Any], prefix: str, lines: list[tuple[str, str]]) -> None:
    for name, value in values.items():
        path = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping) and {"value", "count", "images"} <= value.keys():
            share = number(value["value"])
            text = "no images" if share is None else f"{100 * share:.1f} % ({value['count']} of {value['images']})"
            lines.append((path, text + between(value.get("interval"))))
        elif isinstance(value, Mapping):
            _flatten(value, f"{path} / ", lines)
        else:
            lines.append((path, str(value)))


def between(interval: Any) -> str:
    """``, 88.1 to 90.2`` of an interval, or nothing."""
    if not isinstance(interval, Sequence) or len(interval) != 2:
        return ""
    low, high = number(interval[0]), number(interval[1])
    return "" if low is None or high is None else f", {100 * low:.1f} to {100 * high:.1f}"


def run_image(folder: Path, name: Any) -> Image.Image | None:
    """An image that results name, as RGB; None if it is not in the run's folder, or not one."""
    if not name or not isinstance(name, str):
        return None
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return None
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
