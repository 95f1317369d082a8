"""Cosines between texts and the places of whole images, and a task's records of each image.

An image keeps its aspect ratio. Square windows, whose side is the image's short side, are encoded one beside the other
along the long side, each overlapping the next by half, and places in several windows have the mean of their cosines.
With a short side of 448 pixels this is the protocol of TCL (Cha et al. 2023).

Shapes: M names, D embedding dimension, h x w places, H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lit_clip.embedding.encode import Finished, RowTask
from lit_clip.embedding.parts import Arrays
from lit_clip.embedding.reading import Batches, EncoderBatch, ImageBatches
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, Localised
from lit_clip.models.clip import CLIP
from lit_clip.models.preprocess import to_rgb, windowed
from lit_clip.models.size import height_width

WINDOWS = 16  # encoded at once
LONGEST = 4096  # pixels of a window's side; its attention grows with their fourth power

Size = tuple[int, int]  # width and height in pixels


class PlaceTexts(NamedTuple):
    """Unit features of all class names, ``[D, M]``, and the class of each name, int64 ``[M]``."""

    features: Tensor
    classes: Tensor


class Recorder(NamedTuple):
    """Functions with which a task records an image.

    Attributes:
        truth: set, row and size of the image -> the truth about it; called in data workers.
        record: cosines ``[M, h, w]``, that truth and the class of each name -> int64 ``[K, m]``.
    """

    truth: Callable[[Any, int, Size], Any]
    record: Callable[[Tensor, Any, Tensor], Tensor]


class Window(NamedTuple):
    """A square window in pixels and in places."""

    side: int
    places: int

    @property
    def step(self) -> int:
        """Pixels per place."""
        return self.side // self.places


@torch.no_grad()
def window_of(model: CLIP, images: Localised) -> Window:
    """Return the window of a set's images."""
    side = images.short_side(min(height_width(model.preprocessing.image_size)))
    require(model.preprocessing.bands == 3, "places of a set: the model must read red, green and blue")
    require(0 < side <= LONGEST, f"short_side: {side} must be between 1 and {LONGEST} pixels")
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=model.device)
    try:
        rows, columns = model.encode_patches(model.normalize(pixels)).shape[-2:]
    except InputError as error:
        raise InputError(f"short_side: {side} pixels; {error}") from error
    even = rows == columns and side % rows == 0
    require(even, f"short_side: {side} pixels are {rows} x {columns} places; give a multiple of the pixels of a place")
    return Window(side, rows)


def whole_size(size: Size, window: Window) -> list[int]:
    """Return the size of a resized image: its short side is the window's, its long side a whole number of places."""
    return [max(1, round(each / min(size) * window.places)) * window.step for each in reversed(size)]


def window_starts(length: int, window: int) -> list[int]:
    """Return the first places of windows along a side: half a window apart; the last one ends at the edge."""
    last = length - window
    return [*range(0, last, max(1, window // 2)), last]


@torch.no_grad()
def window_cosines(model: CLIP, pixels: Tensor, features_DM: Tensor, window: Window) -> Tensor:
    """Return the cosines of a resized image's places, uint8 ``[1, 3, H, W]``, with texts: float32 ``[M, h, w]``."""
    n, (h, w) = window.places, (side // window.step for side in pixels.shape[-2:])
    corners = [(top, left) for top in window_starts(h, n) for left in window_starts(w, n)]
    total = torch.zeros(features_DM.shape[1], h, w, device=pixels.device)
    windows = torch.zeros(h, w, device=pixels.device)
    for start in range(0, len(corners), WINDOWS):
        some, step = corners[start : start + WINDOWS], window.step
        crops = [pixels[..., top * step : (top + n) * step, left * step : (left + n) * step] for top, left in some]
        features = model.encode_patches(model.normalize(torch.cat(crops)), normalize=True).float()
        with torch.autocast(pixels.device.type, enabled=False):
            cosines = torch.einsum("bdhw,dm->bmhw", features, features_DM.to(features))
        for (top, left), values in zip(some, cosines, strict=True):
            total[:, top : top + n, left : left + n] += values
            windows[top : top + n, left : left + n] += 1
    return total / windows


def _truth_of(images: ImageSet, truth: Callable[[Any, int, Size], Any], row: int, name: str, image: Image.Image) -> Any:
    return truth(images, row, image.size)


def _resized(image: Image.Image, window: Window, filter: Image.Resampling) -> Image.Image:
    height, width = whole_size(image.size, window)
    return image.resize((width, height), filter)


@dataclass(frozen=True, kw_only=True)
class PlaceTask(RowTask):
    """Record images; a part is a table of rows, and of records with their rows."""

    record: Callable[[Tensor, Any], Tensor]
    settings: tuple[object, ...]  # all that the records depend on, besides the model and the images

    def step(self, batch: EncoderBatch, device: torch.device, batch_size: int) -> Tensor:
        """Return the records of a batch of one image, int64 ``[K, m]``, and take its note out of the batch."""
        if batch.inputs is None:
            return torch.empty(0, device=device)
        truth = batch.notes.pop()  # it may be large, and finished batches wait to be written
        return self.record(self.encode(batch.inputs.to(device)), truth)

    def part(self, finished: Finished) -> Arrays:
        return records_arrays([(batch.rows[0], values) for batch, values in finished])


def records_arrays(of_images: Sequence[tuple[int, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the rows of images, and all records, each with its image's row in front."""
    values = [np.insert(values, 0, row, axis=1) for row, values in of_images]
    return {"rows": np.array([row for row, _ in of_images], dtype=np.int64), "values": np.concatenate(values)}


def place_task(model: CLIP, images: ImageSet, texts: PlaceTexts, recorder: Recorder) -> PlaceTask:
    """Create the task of recording a set, which must be :class:`lit_clip.evaluation.data.Localised`."""
    assert isinstance(images, Localised)
    window, preprocessing = window_of(model, images), model.preprocessing
    resize = partial(_resized, window=window, filter=Image.Resampling[preprocessing.interpolation.upper()])
    first = v2.Lambda(partial(windowed, config=preprocessing))

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        """Return batches of one resized image, uint8 ``[1, 3, H, W]``, with the truth about it as its note."""
        whole = ImageBatches(images, batches, preprocessing, partial(_truth_of, images, recorder.truth), stop)
        whole.transform = v2.Compose([first, v2.Lambda(resize), v2.Lambda(to_rgb), v2.PILToTensor()])
        return whole

    return PlaceTask(
        range(len(images)),
        read,
        lambda pixels: window_cosines(model, pixels, texts.features, window),
        several=True,
        must_be_finite=False,
        record=lambda cosines, truth: recorder.record(cosines, truth, texts.classes),
        settings=(images.truth_stamp(), window, texts.classes.tolist()),
    )
