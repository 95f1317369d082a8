"""Heat maps over images: of located texts, and of a query over the images that a search found."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lit_clip.errors import BadSample, InputError
from lit_clip.locating.locator import FALSE_ALARMS, Located, default_background, text_features
from lit_clip.locating.overlay import Scale, overlay
from lit_clip.locating.regions import background_level
from lit_clip.models.clip import CLIP
from lit_clip.models.heat_maps import place_cosines
from lit_clip.tools.images import image_for_model, upright


def drawn(image: Image.Image, located: Located) -> list[Image.Image]:
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
    """Rotate a map of an image by the camera's rotation flag."""
    map_.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    return ImageOps.exif_transpose(map_)
