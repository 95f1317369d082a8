"""Levels with more than 8 bits, grey or in bands, and the window that scales them to 8 bits."""

import sys
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from lit_clip.errors import BadSample, InputError

Window = list[float] | dict[str, list[float]] | Literal["bit_depth"]
"""Levels that become 0 and 255: ``[low, high]``, ``{"percentiles": [low, high]}`` of each image, the file's range."""

MOST_BANDS = 1024
NO_RANGE = "levels without a range"  # reason of a bad sample
BITS, BANDS = 258, 277  # TIFF tags: bits of each band, number of bands
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # TIFF tag; Pillow inverts such levels of 8 bits alone
WHOLE: Window = {"percentiles": [0, 100]}


class Levels(NamedTuple):
    """Levels as stored in an image's file."""

    values: np.ndarray  # [H, W], or [H, W, C] of bands; integers or floats
    bits: int | None  # of the whole range, which starts at 0; None: the file says none
    inverted: bool  # whether the lowest is white
    where: str  # how the user knows the image
    windowed: bool = False  # whether the file has a window of its own


def check_window(window: Window | None, where: str) -> None:
    """Raise :class:`InputError` unless a window's ends ascend and percentiles are between 0 and 100."""
    if window is None or window == "bit_depth":
        return
    ends = window.get("percentiles") if isinstance(window, dict) and len(window) == 1 else window
    if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)):
        raise InputError(f"{where}: {window} must be [low, high], {{percentiles: [low, high]}} or bit_depth")
    least, most = (0, 100) if isinstance(window, dict) else (-sys.float_info.max, sys.float_info.max)
    if not least <= ends[0] < ends[1] <= most:
        limits = "between 0 and 100" if isinstance(window, dict) else "finite"
        raise InputError(f"{where}: {window} must be {limits}, the lower number first")


def levels_of(image: Image.Image, where: str = "an image") -> Levels | None:
    """Return an image's deep levels; None for an image with 8 bits, including colours."""
    kept: Levels | None = getattr(image, "levels", None)
    if kept is not None or not image.mode.startswith(("I", "F")):
        return kept
    tags = getattr(image, "tag_v2", {})
    # Pillow's modes I and F are of 32 bits; in PNG and PPM I has 16.
    unknown = image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM"))
    bits = None if unknown else tags.get(BITS, (16,))[0]
    return Levels(np.asarray(image), bits, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO, where)


def keep_levels(image: Image.Image, where: str) -> Image.Image:
    """Return an 8-bit image that remembers its deeper levels for a model's window, until it is changed.

    Levels without a range are shown from the lowest to the highest. ``where`` is remembered too.
    """
    shown: Any = image
    levels = levels_of(image, where)
    if levels is not None:
        shown = image if hasattr(image, "levels") else eight_bits(image, where, None if levels.bits else WHOLE)
        shown.levels = levels._replace(where=where)
    shown.where = where
    return shown


def eight_bits(image: Image.Image, where: str = "an image", window: Window | None = None) -> Image.Image:
    """Return an image with grey levels scaled to 8 bits by a window; colours and 8-bit levels stay.

    By default and by ``bit_depth`` the highest 8 bits are kept, which Pillow's own conversion clips at 255; of a DICOM
    file its own window. Of 16-bit colours Pillow itself keeps the highest 8. In a PNG levels of fewer bits are scaled
    to all 16, by its specification. Without a window raise :class:`BadSample` for floats and 32-bit integers, whose
    range is unknown.
    """
    levels = levels_of(image, where)
    if levels is None:
        return image
    if window in (None, "bit_depth") and levels.bits is not None and hasattr(image, "levels"):
        return image  # it shows them already
    result = Image.fromarray(as_bytes(levels, window))
    result.format = image.format
    result.info = {name: value for name, value in image.info.items() if name != "transparency"}  # of 16 bits
    return result


def as_bytes(levels: Levels, window: Window | None) -> np.ndarray:
    """Return levels scaled to 8 bits by a window (:func:`eight_bits`), each band separately, in the same shape."""
    values = levels.values
    if values.ndim == 3 and levels.bits == 8:
        return values
    if window is None or window == "bit_depth":
        if levels.bits is None:
            detail = "its levels are floats or 32-bit integers, without a range in the file; set data.window, or scale "
            raise BadSample(levels.where, NO_RANGE, f"{detail}them to 8 or 16 bits")
        values = (values >> (levels.bits - 8)).astype(np.uint8)
    else:
        bands = [scaled(band, *_ends(band, window)) for band in np.atleast_3d(values).transpose(2, 0, 1)]
        values = np.stack(bands, axis=2).reshape(values.shape)
    return 255 - values if levels.inverted else values


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale numbers from ``low`` to 0 and ``high`` to 255, then round and clip, uint8; NaN becomes 0."""
    share = (values.astype(np.result_type(values, np.float32)) - low) / (high - low)
    return np.rint(255 * np.nan_to_num(share, nan=0.0).clip(0, 1)).astype(np.uint8)


def _ends(values: np.ndarray, window: Window) -> tuple[float, float]:
    if not isinstance(window, dict):
        return float(window[0]), float(window[1])
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, window["percentiles"]).tolist() if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low, low + 1)  # of a single colour


def check_count(image: Image.Image, wanted: int) -> None:
    """Raise :class:`BadSample` unless an image has the model's number of bands, or is grey for a colour model."""
    levels = levels_of(image)
    found = 1 if image.mode in ("1", "L", "LA") else 3
    if levels is not None:
        found = levels.values.shape[2] if levels.values.ndim == 3 else 1
    elif image.mode == "RGB" and wanted == 3:  # Pillow drops the other bands of some TIFF files
        found = max(3, getattr(image, "tag_v2", {}).get(BANDS, 3))
    check_bands(found, wanted, getattr(image, "where", "an image without its path"))


def check_bands(found: int, wanted: int | None, where: str) -> None:
    """Raise :class:`BadSample` unless a model can read an image of ``found`` bands; None: any number."""
    if wanted not in (None, found) and (found, wanted) != (1, 3):
        raise BadSample(where, "another number of bands", f"it has {found} bands, the model reads {wanted}")
