"""Draw heat maps over images, on one scale of cosines for all texts, with a colour bar.

They are of located texts, or of a query over the images that a search found.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from lit_clip.errors import BadSample, InputError
from lit_clip.locating.locator import FALSE_ALARMS, Located, default_background, text_features
from lit_clip.locating.regions import Box, background_level
from lit_clip.models.clip import CLIP
from lit_clip.models.heat_maps import map_of, place_cosines
from lit_clip.tools.images import image_for_model, upright

LEAST, MOST = 256, 512  # pixels of an overlay's longer side
BAR, MARGIN, LABEL = 10, 6, 16  # height of the colour bar, space around it, height of its numbers
# Colours from the lowest cosine to the highest, and how much of the image they cover.
STOPS = np.array([0, 0.25, 0.5, 0.75, 1])
COLOURS = np.array([[40, 50, 120], [110, 40, 130], [205, 55, 85], [248, 140, 40], [255, 236, 130]])
COVER = np.array([0, 0.08, 0.3, 0.65, 0.8])


class Scale(NamedTuple):
    """Cosines at the colour bar's ends, and at its mark."""

    low: float
    high: float
    level: float | None = None

    @classmethod
    def around(cls, level: float, highest: float) -> "Scale":
        """Return a scale with the background level in its middle, for all texts of an image.

        It never spans less than 0.04: nothing is stretched until it glows.
        """
        half = max(highest - level, 0.02)
        return cls(level - half, level + half, level)

    def place(self, cosines: np.ndarray) -> np.ndarray:
        """Return the places of cosines on the scale, from 0 to 1."""
        return ((cosines - self.low) / (self.high - self.low)).clip(0, 1)


def overlay(image: Image.Image, cosines: Tensor, scale: Scale, peak: float, box: Box | None = None) -> Image.Image:
    """Draw cosines ``[h, w]`` over an image; the colour bar below marks ``peak``, and ``box`` is in its pixels."""
    size = shown_size(image.size)
    grey = image.convert("RGB").resize(size).convert("L")
    under = 0.7 * np.asarray(grey, dtype=np.float32)[:, :, None] + 0.3 * 255  # light: colours stand out on it
    heat, cover = _coloured(scale.place(map_of(cosines[None], size[::-1])[0].numpy()))
    drawn = Image.fromarray((under * (1 - cover) + heat * cover).astype(np.uint8))
    if box is not None:
        ends = [end * shown / own for end, shown, own in zip(box, size * 2, image.size * 2, strict=True)]
        left, top, right, bottom = (
            min(max(end, 1), max(side - 2, 1)) for end, side in zip(ends, size * 2, strict=True)
        )
        for colour, width in (("black", 4), ("white", 2)):  # visible on any image
            ImageDraw.Draw(drawn).rectangle(
                (left, top, max(left, right), max(top, bottom)), outline=colour, width=width
            )
    return _with_bar(drawn, scale, peak)


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return a width and height within limits, of the same aspect ratio."""
    ratio = min(max(1, LEAST / max(size)), MOST / max(size))
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def _coloured(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return colours ``[..., 3]`` and opacity ``[..., 1]`` for places on the scale, from 0 to 1."""
    colours = np.stack([np.interp(place, STOPS, COLOURS[:, channel]) for channel in range(3)], axis=-1)
    return colours, np.interp(place, STOPS, COVER)[..., None]


def _with_bar(drawn: Image.Image, scale: Scale, peak: float) -> Image.Image:
    width = max(drawn.width, LEAST)
    whole = Image.new("RGB", (width, drawn.height + BAR + LABEL + 2 * MARGIN), "white")
    whole.paste(drawn, ((width - drawn.width) // 2, 0))
    top, span = drawn.height + MARGIN, width - 2 * MARGIN
    colours, cover = _coloured(np.linspace(0, 1, span))
    bar = (235 * (1 - cover) + colours * cover).astype(np.uint8)
    whole.paste(Image.fromarray(np.repeat(bar[None], BAR, axis=0)), (MARGIN, top))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for cosine, anchor in ((scale.low, "la"), (scale.high, "ra")):
        draw.text((MARGIN if anchor == "la" else width - MARGIN, top + BAR + 2), f"{cosine:.2f}", "#444", font, anchor)

    marks = [MARGIN + span * float(scale.place(np.array(each))) for each in (scale.level or scale.low, peak)]
    if scale.level is not None:
        draw.line((marks[0], top - 3, marks[0], top + BAR + 2), "#444")
    draw.polygon([(marks[1], top), (marks[1] - 4, top - 6), (marks[1] + 4, top - 6)], "black")
    middle = min(max(marks[1], MARGIN + 64), width - MARGIN - 64)  # beside the numbers of the ends
    draw.text((middle, top + BAR + 2), f"peak {peak:.2f}", "black", font, "ma")
    return whole


def overlays(image: Image.Image, located: Located) -> list[Image.Image]:
    """Return an overlay of each text on an image, all on one scale."""
    scale = Scale.around(located.level, max(region.cosine for region in located.regions))
    return [
        overlay(image, cosines, scale, region.cosine, region.box(image.size))
        for cosines, region in zip(located.maps, located.regions, strict=True)
    ]


class HeatMaps:
    """Draw where images match a query, at most ``size`` pixels a side.

    In the middle of an image's scale is the level that background texts reach in it, as for
    :class:`lit_clip.locating.Locator`; all scales have the same span.
    """

    def __init__(self, model: CLIP, size: int) -> None:
        self.model, self.size = model, size
        self.background = text_features(model, default_background())  # [K, D]

    def __call__(self, query: Tensor, files: Sequence[Path | None]) -> dict[Path | None, Image.Image]:
        """Return heat maps for a query's unit features ``[D]``.

        Images that cannot be read any more are left out, and all are if the image encoder has no features of places.
        """
        places: dict[Path, tuple[Image.Image, Tensor, float]] = {}
        for file in filter(None, dict.fromkeys(files)):
            try:
                image = image_for_model(file)
                found, *others = place_cosines(self.model, image, torch.cat([query[None], self.background]), scale=1)
            except BadSample:
                continue
            except InputError:
                return {}
            places[file] = (
                upright(image, self.size),
                torch.from_numpy(np.array(_turned(Image.fromarray(found.numpy()), image))),
                background_level(torch.stack(others).amax(dim=(1, 2)), FALSE_ALARMS),
            )
        highest = max((float(each.max()) - level for _, each, level in places.values()), default=0.0)
        return {
            file: overlay(image, each, Scale.around(level, level + highest), float(each.max()))
            for file, (image, each, level) in places.items()
        }


def _turned(map_: Image.Image, image: Image.Image) -> Image.Image:
    map_.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    return ImageOps.exif_transpose(map_)
