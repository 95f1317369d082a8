"""How an image becomes pixels, as a plain dataclass that checkpoints hold."""

import math
from dataclasses import dataclass
from typing import Literal

from lit_clip.errors import require
from lit_clip.models.size import Size, height_width, normalised
from lit_clip.tools.untrusted import check_fields

# A grid of patches has sides of two bytes (lit_clip.models.patches).
_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (1, 16384),
    "patch_size": (2, 1024),
    "max_patches": (1, 65535),
    "std": (1e-6, 1e6),
    "mean": (-1e6, 1e6),
}


@dataclass
class Preprocessing:
    """How an image becomes the pixels a model was trained on.

    Attributes:
        image_size: in pixels.
        mean: per channel, on the scale 0 to 1; the paper's by default.
        std: per channel, on the scale 0 to 1; the paper's by default.
        interpolation: the resampling filter.
        resize_mode: ``shortest`` resizes the shorter side and crops the centre, ``squash`` ignores the aspect ratio.
        crop_pct: fraction of the resized image's side that the crop keeps; 1 for the paper's models, less for some of
            timm's.
        max_patches: budget of patches of NaFlex: an image keeps its aspect ratio and is resized to as many patches as
            that allows (:mod:`lit_clip.models.patches`); ``image_size`` is then the square of that many patches, and
            ``resize_mode`` has no meaning. None: images of one size.
        patch_size: side of NaFlex's patches in pixels.
    """

    image_size: Size = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    crop_pct: float = 1.0
    max_patches: int | None = None
    patch_size: int | None = None

    def __post_init__(self) -> None:
        where = "architecture: preprocessing"
        check_fields(self, where, _RANGES)
        if self.max_patches is not None:
            patch = self.patch_size or 0
            require(patch >= 2, f"{where}.patch_size: {self.patch_size} must be at least 2 with max_patches")
            self.image_size = math.isqrt(self.max_patches) * patch
        else:
            require(self.patch_size is None, f"{where}.patch_size: is for NaFlex; set max_patches too")
        (r, g, b), (r_std, g_std, b_std) = self.mean, self.std
        self.mean, self.std = (r, g, b), (r_std, g_std, b_std)  # JSON gives lists
        self.image_size = normalised(self.image_size)
        require(0 < self.crop_pct <= 1, f"{where}.crop_pct {self.crop_pct} must be above 0 and at most 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a preprocessed image: ``(3, H, W)``, or for NaFlex ``(1 + max_patches, 3PP)``."""
        if self.max_patches is not None and self.patch_size is not None:
            return 1 + self.max_patches, 3 * self.patch_size**2
        return 3, *height_width(self.image_size)
