"""Pages that need no other file and no network."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, style: str, body: str) -> str:
    """A whole page.

    Args:
        title: as text; it is escaped.
        style: CSS.
        body: HTML, in which what comes from the data has been escaped.
    """
    return _PAGE.format(title=escape(title), style=style, body=body)


THUMBNAIL = 160  # pixels of the longer side


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = (), kind: str = "", right: Iterable[int] = ()) -> str:
    """A table of plain values.

    Args:
        rows: cells as text or numbers, escaped here.
        head: of the columns.
        kind: CSS class.
        right: columns of figures, by place.
    """
    figures = set(right)
    cell = {True: ' class="n"', False: ""}
    parts = [f'<div class="scroll"><table class="{kind}">']
    if head:
        parts.append(
            "<tr>" + "".join(f"<th{cell[i in figures]}>{escape(h)}</th>" for i, h in enumerate(head)) + "</tr>"
        )
    for row in rows:
        cells = (f"<td{cell[i in figures]}>{escape(str(value))}</td>" for i, value in enumerate(row))
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(parts) + "\n</table></div>"


def details(summary: str, content: str) -> str:
    """Shown when it is asked for; ``content`` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def plural(count: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def thumbnail(image: Image.Image) -> str:
    """A small JPEG as a data URI."""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
