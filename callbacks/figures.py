"""Figures, drawn with Pillow."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_clip.evaluation.report.prediction_grid import INK, MARGIN, PAPER, fit


def similarity_matrix(images: Sequence[Image.Image], captions: Sequence[str], scores: np.ndarray) -> Image.Image:
    """Return a table with images above, captions at the left, and each similarity as a shade and a number.

    Scores are cosines ``[N captions, N images]``; NaN has no shade.
    """
    font = ImageFont.load_default(12)
    cell, left, top, N = 56, 230, 64, len(captions)
    sheet = Image.new("RGB", (left + cell * N + MARGIN, top + cell * N + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    finite = scores[np.isfinite(scores)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    shades = np.nan_to_num((scores - low) / (high - low or 1.0)).clip(0, 1)
    for i, image in enumerate(images):
        sheet.paste(image.resize((cell - 4, cell - 4), Image.Resampling.BICUBIC), (left + i * cell + 2, top - cell + 2))
    for row, text in enumerate(captions):
        y = top + row * cell
        draw.text((left - MARGIN, y + cell / 2), fit(text, font, left - 2 * MARGIN), INK, font, anchor="rm")
        for column in range(N):
            x = left + column * cell
            shade = float(shades[row, column])
            color = tuple(round(255 + shade * (ink - 255)) for ink in (21, 94, 149))
            frame = INK if row == column else PAPER
            draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), color, frame, 2 if row == column else 1)
            text_color = PAPER if shade > 0.5 else INK
            draw.text((x + cell / 2, y + cell / 2), f"{scores[row, column]:.2f}", text_color, font, anchor="mm")
    return sheet
