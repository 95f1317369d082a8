"""A contact sheet of images with a model's predictions, drawn with Pillow."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

INK = "#1a1a1a"
PAPER = "#ffffff"
MUTED = "#8a8a8a"
RIGHT = "#157f3b"
WRONG = "#b3261e"
TILE, LINE, MARGIN = 96, 15, 10


class Prediction(NamedTuple):
    """An image, its true name, and its nearest names with scores, best first."""

    image: Image.Image
    truth: str
    nearest: list[tuple[str, float]]


def fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Return the text on one line, truncated with an ellipsis to ``width`` pixels."""
    text = " ".join(text.split())  # one of Pillow's layout engines rejects line breaks
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda letters: font.getlength(text[:letters] + "…"))
    return text[: max(0, fitting - 1)].rstrip() + "…"


def prediction_grid(predictions: Sequence[Prediction], columns: int = 4) -> Image.Image:
    """Draw each image, at most ``columns`` in a row, with its true and nearest names; mark the right one."""
    font, bold = (ImageFont.load_default(size) for size in (12, 13))
    lines = max((len(p.nearest) for p in predictions), default=0)
    text_width, height = 190, max(TILE, LINE * (lines + 1) + 4) + 2 * MARGIN
    width = TILE + text_width + 3 * MARGIN
    rows = -(-len(predictions) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(predictions)), height * rows), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, prediction in enumerate(predictions):
        x, y = i % columns * width + MARGIN, i // columns * height + MARGIN
        sheet.paste(prediction.image.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        x += TILE + MARGIN
        draw.text((x, y), fit(prediction.truth, bold, text_width), INK, bold)
        for line, (name, score) in enumerate(prediction.nearest, start=1):
            top = y + LINE * line + 4
            right = name == prediction.truth
            color = RIGHT if right else WRONG if line == 1 else MUTED
            if right:  # draw a tick: Pillow's own font has none
                draw.line([(x, top + 8), (x + 3, top + 12), (x + 9, top + 3)], RIGHT, 2)
            indent = 14 if right else 0
            draw.text((x + indent, top), fit(name, font, text_width - 40 - indent), color, font)
            draw.text((x + text_width, top), f"{score:.2f}", MUTED, font, anchor="ra")
    return sheet
