"""Augmentation of training images: our crop, our default, and any list of transforms."""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import get_worker_info
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from lit_clip.errors import InputError, require
from lit_clip.models.config import Preprocessing, Size, height_width
from lit_clip.models.preprocess import resize_steps, to_rgb, windowed
from lit_clip.tools.images import LeastSize, fraction, full_size

REDUCING_GAP = 2.0  # Pillow first averages whole pixels, down to this many times the final size, then filters
OF_COLOURS = v1.ColorJitter | v1.RandomGrayscale | v2.ColorJitter | v2.RandomGrayscale | v2.RandomPhotometricDistort
OVERSHOOT = 0.25  # by which resizing an image of floats may leave 0 to 1, which it does at sharp edges

Interpolation = Literal["bicubic", "bilinear"]
Transform = Callable[[Any], Any]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, and restore them afterwards.

    In a data worker they stay seeded: nothing else there draws, and restoring costs as much as decoding a small image.
    """
    if get_worker_info() is not None:
        _seed(seed)
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # transforms of all kinds draw from it
    with torch.random.fork_rng(devices=[]):
        _seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device too
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


class RandomSquareCrop:
    """Crop a random square from the image and resize it, to RGB.

    torchvision's RandomResizedCrop takes ``scale`` as a share of the whole image. No square covers nine tenths of a
    photograph, so it would always fall back on the centre crop.

    For a NaFlex model the crop has the shape of its grid of patches, which is about the image's.

    The crop has whole pixels of the image decoded at the smallest sufficient fraction of its size; an image decoded at
    full size is cropped at the same place.

    Args:
        scale: smallest and largest area of the crop, as a share of the largest square that fits.
        exact: see :class:`Augmentation`; the result is then a PIL image, otherwise uint8 ``[3, H, W]``.
        size: side, or height and width of the result in pixels; None: the model's, as of ``interpolation``.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.9, 1.0),
        exact: bool = False,
        size: Size | None = None,
        interpolation: Interpolation | None = None,
    ) -> None:
        low, high = scale
        ascending = 0 < low <= high <= 1
        require(ascending, f"RandomSquareCrop: scale {[low, high]} must be ascending, above 0 and at most 1")
        self.scale, self.exact = (low, high), exact
        self.size, self.interpolation = None if size is None else height_width(size), interpolation
        self._patches: Preprocessing | None = None  # of a NaFlex model, whose sizes are the images' own
        self._kind: type = Image.Image  # of its input

    def for_model(self, preprocessing: Preprocessing) -> Self:
        """Return the same crop, with the model's size and interpolation where these are unset."""
        crop = copy.copy(self)
        crop._patches = preprocessing if self.size is None and preprocessing.max_patches is not None else None
        crop._kind = Image.Image if preprocessing.bands == 3 else Tensor
        crop.size = self.size or height_width(preprocessing.image_size)
        crop.interpolation = self.interpolation or preprocessing.interpolation
        return crop

    @property
    def decode_size(self) -> LeastSize | None:
        """Return the size at which an image must be decoded; None: full size."""
        return None if self.exact else self.least_size

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image, self.make_params([image]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.scale
        share, y, x = torch.rand(3).tolist()
        return {"side": (low + (high - low) * share) ** 0.5, "x": x, "y": y}

    def box(self, image: Image.Image | Tensor, params: dict[str, Any]) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the crop in the decoded image."""
        *size, divided = full_size(image)
        step = fraction((size[0], size[1]), self.least_size(*size))  # in pixels of the file
        assert step % divided == 0, "the image was decoded for another crop"
        (height, width), columns, rows = self._size(size[0], size[1]), size[0] // step, size[1] // step
        largest = min(columns / width, rows / height) * params["side"]
        across, down = max(1, round(width * largest)), max(1, round(height * largest))
        left, top = round(params["x"] * (columns - across)), round(params["y"] * (rows - down))
        pixels = step // divided
        return left * pixels, top * pixels, (left + across) * pixels, (top + down) * pixels

    def transform(self, inpt: Image.Image | Tensor, params: dict[str, Any]) -> Any:
        require(isinstance(inpt, self._kind), f"RandomSquareCrop: crops PIL images, not {type(inpt).__name__}")
        left, top, right, bottom = box = self.box(inpt, params)
        height, width = self._size(*full_size(inpt)[:2])
        averaged = min((right - left) / width, (bottom - top) / height) >= 2 * REDUCING_GAP  # Pillow is fast at this
        if isinstance(inpt, Image.Image) and (self.exact or averaged or inpt.mode != "RGB"):
            gap = None if inpt.mode.startswith(("I;", "1", "P")) else REDUCING_GAP  # Pillow cannot average those
            filtering = Image.Resampling[str(self.interpolation).upper()]
            image = to_rgb(inpt.resize((width, height), filtering, box, gap))  # after resizing, as in evaluation
            return image if self.exact else TF.pil_to_tensor(image)
        # Resized by torch: equal to within rounding, in a third of the time.
        if isinstance(inpt, Tensor):  # bands, uint8 [C, H, W]
            pixels = inpt[:, top:bottom, left:right]
        else:
            pixels = torch.from_numpy(np.array(inpt.crop(box))).permute(2, 0, 1)
        return F.interpolate(pixels[None], (height, width), mode=str(self.interpolation), antialias=True)[0]

    def least_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the least width and height that keep the smallest crop as wide as the result."""
        rows, columns = self._size(width, height)
        share = 1 / (min(width / columns, height / rows) * self.scale[0] ** 0.5)
        return (width, height) if share >= 1 else (math.ceil(width * share), math.ceil(height * share))

    def _size(self, width: int, height: int) -> tuple[int, int]:
        if self._patches is not None:
            from lit_clip.models.patches import sequence_size

            return sequence_size(height, width, self._patches)
        if self.size is None:
            raise InputError("RandomSquareCrop: its size is only known in the list itself; set size, interpolation")
        return self.size


@dataclass
class Augmentation:
    """Augmentation of training images. The paper uses only a random square crop (section 2.4).

    Attributes:
        crop_scale: smallest and largest area of a crop, as a share of the largest square that fits (the paper gives
            none; open_clip's default is 0.9 to 1 of the whole image, squashed to a square).
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        grayscale: probability of converting an image to grey; as ``color_jitter`` for red, green and blue alone.
        exact: decode JPEGs at full size and resize with Pillow, as other packages do; two to four times slower.
            Otherwise they are decoded at a half, a quarter or an eighth of their width where the crop allows it.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    color_jitter: float = 0.0
    grayscale: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1, f"augmentation.crop_scale: {[low, high]} must be ascending, above 0 and at most 1"
        )
        require(self.color_jitter >= 0, f"augmentation.color_jitter: {self.color_jitter} must be at least 0")
        require(0 <= self.grayscale <= 1, f"augmentation.grayscale: {self.grayscale} must be between 0 and 1")

    def transforms(self) -> list[Transform]:
        steps: list[Transform] = [RandomSquareCrop(self.crop_scale, self.exact)]
        if self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.grayscale:
            steps.append(v2.RandomGrayscale(self.grayscale))
        return steps


class TrainingTransform:
    """Apply any transforms in turn: PIL image -> uint8 in the model's shape.

    The first gets an RGB image (:class:`RandomSquareCrop` any image, since it resizes before it converts), or uint8
    ``[C, H, W]`` if the model reads other bands than red, green and blue. The last may
    return a PIL image, a uint8 tensor, or a tensor of floats between 0 and 1; the result is resized as in evaluation if
    it does not have the model's size. What they draw from the global generators of torch, numpy and Python is
    reproducible within :func:`seeded`.

    Args:
        augmentation: its transforms, or a list of them. A transform with a method ``for_model(preprocessing)``, which
            returns a transform, is replaced by what it returns.
        budgets: of patches, other than the model's own, that images may be prepared at (NaFlex).

    Attributes:
        decode_size: size that images must be decoded at: the first transform's ``decode_size``; None: full size.
    """

    def __init__(
        self,
        augmentation: Augmentation | Sequence[Transform],
        preprocessing: Preprocessing,
        budgets: Sequence[int] = (),
    ) -> None:
        listed = augmentation.transforms() if isinstance(augmentation, Augmentation) else list(augmentation)
        check_transforms(listed, preprocessing.bands)
        self.transforms = [
            bind(preprocessing) if (bind := getattr(each, "for_model", None)) is not None else each for each in listed
        ]
        self.size, self._resize = height_width(preprocessing.image_size), v2.Compose(resize_steps(preprocessing))
        self._preprocessing = preprocessing
        self._patches = preprocessing if preprocessing.max_patches is not None else None
        if budgets and self._patches is None:
            raise InputError("data.patch_budgets: the model reads images of one size; leave it out, or use NaFlex")
        self._at = {each: TrainingTransform(augmentation, replace(preprocessing, max_patches=each)) for each in budgets}
        self._takes_any_mode = not listed or isinstance(listed[0], RandomSquareCrop)
        self.decode_size: LeastSize | None = getattr(self.transforms[0], "decode_size", None) if listed else None

    def at(self, budget: int) -> "TrainingTransform":
        """Return the transform for a patch budget; 0: the model's own budget."""
        return self._at[budget] if budget else self

    def __call__(self, image: Image.Image) -> Tensor:
        image = windowed(image, self._preprocessing)
        result: Any = image if self._takes_any_mode or getattr(image, "mode", "RGB") == "RGB" else to_rgb(image)
        for transform in self.transforms:
            result = transform(result)
        if self._patches is not None:
            is_image = isinstance(result, Image.Image)
            from lit_clip.models.patches import patch_sequence

            return patch_sequence(to_rgb(result) if is_image else self._pixels(result), self._patches)
        if isinstance(result, Image.Image) and self._preprocessing.bands == 3:
            fits = result.size == (self.size[1], self.size[0])
            return TF.pil_to_tensor(to_rgb(result if fits else self._resize(result)))
        pixels = self._pixels(result)
        return pixels if tuple(pixels.shape[1:]) == self.size else self._resize(pixels)

    def _pixels(self, result: Any) -> Tensor:
        """Return the last transform's result as uint8 ``[C, H, W]``."""
        bands = self._preprocessing.bands
        last = f"augmentation: {', '.join(map(_name, self.transforms[-1:]))}, the last transform, returned"
        if not isinstance(result, Tensor):
            wanted = "a PIL image or a tensor [C, H, W]" if bands == 3 else f"a tensor [{bands}, H, W]"
            raise InputError(f"{last} a {type(result).__name__}; it must return {wanted}")
        result = result.as_subclass(Tensor)  # of torchvision's images
        if result.ndim != 3 or result.shape[0] not in ((1, 3) if bands == 3 else (bands,)):
            raise InputError(f"{last} a tensor {list(result.shape)}; it must be [{bands}, H, W]")
        if result.is_floating_point():
            low, high = float(result.min()), float(result.max())
            require(
                low >= -OVERSHOOT and high <= 1 + OVERSHOOT,
                f"{last} values from {low:.3g} to {high:.3g}; they must be between 0 and 1, or uint8: the model itself "
                "normalises",
            )
            result = (result.clamp(0, 1) * 255).round().to(torch.uint8)
        elif result.dtype != torch.uint8:
            raise InputError(f"{last} {result.dtype}; it must be uint8, or floats between 0 and 1")
        return result.expand(bands, -1, -1)


def check_transforms(transforms: Sequence[Transform], bands: int = 3) -> None:
    """Raise :class:`InputError` if a transform is not callable, normalises, or needs RGB and the bands are others."""
    for transform in transforms:
        require(callable(transform), f"augmentation: {transform!r} is not a transform; it cannot be called")
        normalises = isinstance(transform, v1.Normalize | v2.Normalize)
        require(not normalises, "augmentation: the model itself normalises images; leave Normalize out")
        if bands != 3 and isinstance(transform, OF_COLOURS):
            problem = f"{_name(transform)} needs red, green and blue, the model reads {bands} bands"
            raise InputError(f"data.augmentation: {problem}; leave it out (color_jitter and grayscale: 0)")
        check_transforms(list(getattr(transform, "transforms", ())), bands)  # of Compose, RandomApply, RandomChoice


def _name(transform: Transform) -> str:
    return str(getattr(transform, "__name__", type(transform).__name__))


def described_augmentation(augmentation: object) -> str:
    """Describe an augmentation or a list of transforms by class and settings, identically in every run."""
    if isinstance(augmentation, list):
        return ", ".join(described_augmentation(transform) for transform in augmentation)
    kind = type(augmentation)
    plain = not isinstance(augmentation, nn.Module) and kind.__repr__ is object.__repr__
    found = f"{kind.__module__}.{sorted(vars(augmentation).items())}" if plain else repr(augmentation)
    if " at 0x" in found:
        raise InputError(f"FrozenFeatures: {kind.__name__} has no description that lasts; give it a __repr__")
    return f"{kind.__module__}.{kind.__qualname__} {found}"
