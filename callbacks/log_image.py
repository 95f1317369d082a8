"""Log images to every logger that can show them; and a contact sheet of predictions, drawn with Pillow."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def log_image(trainer: Trainer, tag: str, image: Image.Image) -> None:
    """Log an image as ``tag`` at the current step, on the first rank.

    TensorBoard, MLflow and loggers with W&B's ``log_image(key, images, step)`` get it; others, such as CSV, do not.
    """
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(image), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, image, key=tag, step=trainer.global_step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=trainer.global_step)


def shown_bands(images: Tensor) -> Tensor:
    """Return the first three bands of ``[..., C, H, W]``; if there are fewer, the first band three times."""
    return images[..., :3, :, :] if images.shape[-3] >= 3 else images[..., [0, 0, 0], :, :]


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
