"""Figures and embeddings for TensorBoard."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_pil_image

from lit_clip.batch import CaptionBatch
from lit_clip.errors import require
from lit_clip.models.patches import as_image
from lit_clip.module import Features
from .log_image import INK, MARGIN, PAPER, fit, log_image, shown_bands

THUMBNAIL = 64  # pixels, of images in their own aspect ratio
FRAME = torch.tensor([0.08, 0.37, 0.58])[:, None, None]  # blue, [3, 1, 1]


class SimilarityMatrix(Callback):
    """Log the cosine similarities of some validation images and captions after every validation.

    Args:
        pairs: number of pairs, spread over the first batch.
    """

    def __init__(self, pairs: int = 12) -> None:
        require(pairs >= 1, f"{type(self).__name__}.pairs: {pairs} must be at least 1")
        self.pairs = pairs

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: CaptionBatch, batch_idx: int, *_: Any, **__: Any
    ) -> None:
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero or not len(batch.images):
            return
        if batch.images.is_floating_point():  # stored activations
            rank_zero_warn("SimilarityMatrix: FrozenFeatures decodes no images, so there is no picture")
            return
        features = cast(Features, outputs)
        shown = min(self.pairs, len(batch.images))
        rows = [i * len(batch.images) // shown for i in range(shown)]
        scores = (features["text"][rows] @ features["image"][rows].T).float().cpu().numpy()
        images = [to_pil_image(shown_bands(as_image(batch.images[row]))) for row in rows]
        captions = [cast(Any, pl_module).tokenize.decode(batch.tokens[row].tolist()) for row in rows]
        log_image(trainer, "val/similarity", similarity_matrix(images, captions, scores))


class EmbeddingProjector(Callback):
    """Log image and caption features of the last validation for TensorBoard's projector.

    Each image is shown as a thumbnail, its caption as the same thumbnail in a blue frame; with
    :class:`callbacks.FrozenFeatures`, which decodes no images, both as points.

    Args:
        pairs: most validation pairs to log, from the first rank.
    """

    def __init__(self, pairs: int = 500) -> None:
        require(pairs >= 1, f"{type(self).__name__}.pairs: {pairs} must be at least 1")
        self.pairs = pairs
        self._seen: list[tuple[Features, Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, *_: Any, **__: Any
    ) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if sum(len(images) for _, images in self._seen) < self.pairs:
            self._seen.append((cast(Features, outputs), batch.images))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._seen or not trainer.is_global_zero:
            return
        image = torch.cat([features["image"] for features, _ in self._seen])[: self.pairs].float().cpu()
        text = torch.cat([features["text"] for features, _ in self._seen])[: self.pairs].float().cpu()
        photos = torch.cat([images for _, images in self._seen])[: self.pairs].cpu()
        captions = [
            cast(Any, pl_module).tokenize.decode(row)
            for features, _ in self._seen
            for row in features["tokens"].tolist()
        ][: self.pairs]
        self._seen = []
        metadata = [[caption, kind] for kind in ("image", "caption") for caption in captions]
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            logger.experiment.add_embedding(
                torch.cat([image, text]),
                metadata=metadata,
                metadata_header=["caption", "kind"],
                label_img=_thumbnails(photos),
                global_step=trainer.global_step,
                tag="val",
            )


def _thumbnails(photos: Tensor) -> Tensor | None:
    """Return the images, then the same images in a frame, ``[2N, 3, H, W]``; None for stored activations."""
    if photos.is_floating_point():
        return None
    if photos.ndim == 3:  # patches; all thumbnails have one size
        photos = torch.stack([resize(as_image(photo), [THUMBNAIL, THUMBNAIL]) for photo in photos])
    photos = shown_bands(photos).float() / 255
    edge = max(1, photos.shape[-1] // 16)
    framed = FRAME.expand_as(photos).clone()
    framed[..., edge:-edge, edge:-edge] = photos[..., edge:-edge, edge:-edge]
    return torch.cat([photos, framed])


def similarity_matrix(images: Sequence[Image.Image], captions: Sequence[str], scores: np.ndarray) -> Image.Image:
    """Return a table: images on top, captions at the left, and each similarity as a shade and a number.

    Scores are cosines ``[N captions, N images]``; NaN has no shade.
    """
    font = ImageFont.load_default(12)
    cell = 56
    left = 230
    top = 64
    N = len(captions)
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
            text_color = PAPER if shade > 0.65 else INK
            draw.text((x + cell / 2, y + cell / 2), f"{scores[row, column]:.2f}", text_color, font, anchor="mm")
    return sheet
