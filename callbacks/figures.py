"""Pictures for people, drawn with Pillow."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, MUTED, RIGHT, WRONG = "#1a1a1a", "#ffffff", "#8a8a8a", "#157f3b", "#b3261e"
TILE, LINE, MARGIN = 96, 15, 10


class Prediction(NamedTuple):
    """One image, what it is, and the names the model finds nearest with their cosine similarities."""

    image: Image.Image
    truth: str
    nearest: list[tuple[str, float]]


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut to ``width`` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def prediction_grid(predictions: Sequence[Prediction], columns: int = 4) -> Image.Image:
    """A contact sheet: each image with its true name above and its nearest names, the right one marked."""
    font, bold = ImageFont.load_default(12), ImageFont.load_default(13)
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
        draw.text((x, y), _fit(prediction.truth, bold, text_width), INK, bold)
        for line, (name, score) in enumerate(prediction.nearest, start=1):
            top = y + LINE * line + 4
            right = name == prediction.truth
            color = RIGHT if right else WRONG if line == 1 else MUTED
            if right:  # a tick; Pillow's own font has none
                draw.line([(x, top + 8), (x + 3, top + 12), (x + 9, top + 3)], RIGHT, 2)
            indent = 14 if right else 0
            draw.text((x + indent, top), _fit(name, font, text_width - 40 - indent), color, font)
            draw.text((x + text_width, top), f"{score:.2f}", MUTED, font, anchor="ra")
    return sheet


def similarity_matrix(images: Sequence[Image.Image], captions: Sequence[str], scores: np.ndarray) -> Image.Image:
    """Images above, captions at the left, the cosine similarity of each two as a shade and a number.

    Args:
        images: N pictures.
        captions: N texts.
        scores: ``[N captions, N images]``.
    """
    font = ImageFont.load_default(12)
    cell, left, top, N = 56, 230, 64, len(captions)
    sheet = Image.new("RGB", (left + cell * N + MARGIN, top + cell * N + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    low, high = float(scores.min()), float(scores.max())
    for i, image in enumerate(images):
        sheet.paste(image.resize((cell - 4, cell - 4), Image.Resampling.BICUBIC), (left + i * cell + 2, top - cell + 2))
    for row, text in enumerate(captions):
        y = top + row * cell
        draw.text((left - MARGIN, y + cell / 2), _fit(text, font, left - 2 * MARGIN), INK, font, anchor="rm")
        for column in range(N):
            x = left + column * cell
            shade = (float(scores[row, column]) - low) / (high - low or 1.0)
            color = tuple(round(255 + shade * (ink - 255)) for ink in (21, 94, 149))
            frame = INK if row == column else PAPER
            draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), color, frame, 2 if row == column else 1)
            text_color = PAPER if shade > 0.5 else INK
            draw.text((x + cell / 2, y + cell / 2), f"{scores[row, column]:.2f}", text_color, font, anchor="mm")
    return sheet
