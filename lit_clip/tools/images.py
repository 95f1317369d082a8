"""The one way to open an image, with one set of refusals."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from lit_clip.errors import BadSample, InputError
from lit_clip.tools.bands import ArrayFile, DicomFile, TiffBands, banded, tiff_values
from lit_clip.tools.levels import BANDS, BITS, eight_bits, keep_levels
from lit_clip.tools.reading import reason

SUFFIXES = frozenset({".bmp", ".dcm", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IN_TARS = SUFFIXES - {".npy"}  # where arrays are mostly features of the image beside them
CHECKED = 10_000
MAX_PIXELS = 178_956_970  # Pillow's own limit; 0.5 GB as RGB
MOST_ELONGATED = 500  # longer to shorter side; resized to a model's input, such an image takes a gigabyte
PROGRAMS = frozenset({"EPS"})  # formats that Pillow has another program draw, for however long that takes

OnError = Literal["error", "skip"]
FIX_HINT = "; fix or remove it"  # how the message about an unreadable image ends

LeastSize = Callable[[int, int], tuple[int, int]]  # an image's width and height -> the smallest that are enough

FULL_SIZE = "size in the file"  # key in ``info`` of an image decoded at a fraction
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such files start; Pillow's own reader, imported above, is first
FRACTIONS = (1, 2, 4, 8)  # divisors of width and height that JPEG decoders support and Pillow passes on

_least_size: ContextVar[LeastSize | None] = ContextVar("_least_size", default=None)


class Unseen(StrEnum):
    """Content of an image file that a model does not see unchanged, and what happens to it."""

    DEEP = "have more than 8 bits a level (the highest 8 are read)"
    CONVERTED = "have four or more bands, as CMYK (converted to RGB)"
    TRANSPARENT = "have an alpha channel or a transparent colour (dropped: black, or the colour underneath)"
    ANIMATED = "have several frames (the first is read)"
    ROTATED = "have a rotation flag (ignored)"


@contextmanager
def decoding_at_least(size: LeastSize | None) -> Iterator[None]:
    """Inside this block, decode JPEGs at the smallest fraction of their size that is large enough.

    A JPEG decoder can leave out the finer half, three quarters or seven eighths of the frequencies, at a fraction of
    the time. Other formats are decoded whole, and so is everything if ``size`` is None.
    """
    token = _least_size.set(size)
    try:
        yield
    finally:
        _least_size.reset(token)


@cache
def _prepare() -> None:
    """Register DICOM files and arrays with Pillow, and ignore Pillow's varied warnings about readable files."""
    Image.preinit()  # DICOM comes after all formats that Pillow recognises by their first bytes
    Image.register_open("DICOM", DicomFile)
    Image.register_open("NPY", ArrayFile, lambda start: start.startswith(b"\x93NUMPY"))
    Image.register_open("TIFF OF BANDS", TiffBands, lambda start: start[:4] in TIFF)
    warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def formats() -> list[str]:
    """Return the formats that images are read in, sorted."""
    _prepare()
    Image.init()
    return sorted(Image.OPEN)


@contextmanager
def _opened(source: Path | BinaryIO, where: str | None) -> Iterator[Image.Image]:
    _prepare()
    where = str(source) if where is None else where
    named_by_path = where == str(source)
    name = "this image" if named_by_path else f"image {source}" if isinstance(source, Path) else "its image"
    try:
        if isinstance(source, Path) and not source.is_file():  # opening a pipe would wait for a writer
            problem = "not a file" if source.exists() else "no such image file"
            raise BadSample(where, "missing image", problem if named_by_path else f"{problem}: {source}")
        with Image.open(source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
            if max(width, height) > MOST_ELONGATED * min(width, height):
                raise ValueError(f"{width} x {height} pixels, one side more than {MOST_ELONGATED} times the other")
            if image.format in PROGRAMS:
                raise UnidentifiedImageError
            yield image
    except InputError:  # ours, or a package is missing
        raise
    # For a broken file Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        kind, words = "broken image", reason(error)
        if isinstance(error, UnidentifiedImageError):
            kind = words = "not an image"
        elif isinstance(error, Image.DecompressionBombError):
            kind = "image too large"
        raise BadSample(where, kind, f"cannot read {name} ({words}){FIX_HINT}") from error


def open_image(source: Path | BinaryIO, where: str | None = None) -> Image.Image:
    """Decode an image to 8 bits a level (:func:`eight_bits`); of an animation the first frame.

    A camera's rotation flag is ignored. ``where`` is how the user knows it, such as ``captions.csv row 7``; None: by
    its path. Raise :class:`BadSample` if there is no such file, or it is not an image, broken, too large, too
    elongated, of another program's format, or of levels whose range is unknown.
    """
    return eight_bits(image_for_model(source, where))


def image_for_model(source: Path | BinaryIO, where: str | None = None) -> Image.Image:
    """Decode an image for a model as :func:`open_image` does; a window may use levels of any range."""
    image: Any = keep_levels(stored_image(source, where), str(source) if where is None else where)
    if image.format == "TIFF":
        image.source = source  # for a model of its bands
    return image


def stored_image(source: Path | BinaryIO, where: str | None = None) -> Image.Image:
    """Decode an image as :func:`open_image` does, with the levels stored in the file."""
    with _opened(source, where) as image:
        least_size = _least_size.get()
        if least_size is not None:
            width, height = least_size(*image.size)
            image.info[FULL_SIZE] = image.size
            image.draft(None, (max(1, width), max(1, height)))  # pyright: ignore[reportArgumentType]  # None keeps the mode
        tags = getattr(image, "tag_v2", {})
        planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and tags.get(BANDS, 1) > 1
        if planes and (max(tags.get(BITS, (8,))) > 8 or image.mode == "LA"):
            return banded(tiff_values(source))  # Pillow cannot decode them, or not rightly
        image.load()
        return image


def unseen(source: Path | BinaryIO, where: str) -> list[Unseen]:
    """Return, from an image's header, what a model does not see; an alpha channel may be opaque everywhere."""
    with _opened(source, where) as image:
        tile: Any = getattr(image, "tile", ())
        how = tile[0][3] if tile else ""  # to decode it: such as "I;16B"
        tags, transparent = getattr(image, "tag_v2", {}), image.has_transparency_data
        deep = max(tags.get(BITS, (8,))) > 8 or image.mode.startswith(("I", "F")) or ";16" in str(how)
        deep = deep or getattr(image, "deep", False)  # of a DICOM file
        found = {
            Unseen.DEEP: deep or (image.format == "PPM" and isinstance(how, tuple) and how[-1] > 255),  # highest level
            Unseen.CONVERTED: not transparent and tags.get(BANDS, len(image.getbands())) > 3,
            Unseen.TRANSPARENT: transparent,
            Unseen.ANIMATED: getattr(image, "is_animated", False) and image.format != "MPO",  # a camera's preview
            Unseen.ROTATED: is_rotated(image),
        }
    return [kind for kind, holds in found.items() if holds]


def upright(image: Image.Image, size: int) -> Image.Image:
    """Return an image of at most ``size`` pixels a side, upright and on white."""
    image = ImageOps.exif_transpose(image)
    image.thumbnail((size, size))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_names(names: Iterable[str]) -> list[str]:
    """Choose image files by name; arrays only if there are no other images, because they are mostly features."""
    found = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return [name for name in found if not name.lower().endswith(".npy")] or found


def is_rotated(image: Image.Image) -> bool:
    """Return whether a camera's rotation flag is set; an undecoded PNG may hide a flag after the pixels."""
    try:  # a PNG's own method would decode it
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except Exception:  # EXIF is often malformed, and the pixels do not depend on it
        return False


def image_size(source: Path | BinaryIO, where: str) -> tuple[int, int]:
    """Return an image's width and height from its header, without decoding it; see :func:`open_image`."""
    with _opened(source, where) as image:
        return image.size


def png_program(path: Path) -> object:
    """Return the program that wrote a PNG, from its header; None if unknown, and for other files."""
    with suppress(BadSample), _opened(path, None) as image:
        return image.info.get("Software") if image.format == "PNG" else None


def or_skip(message: str, option: str) -> str:
    """Return a message about an unreadable image, with the option that would skip it at the end."""
    return f"{message.removesuffix(FIX_HINT)}{FIX_HINT}, or set {option}"


def fraction(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Return the largest divisor among 1, 2, 4 and 8 that leaves a JPEG at least ``least`` wide and high."""
    times = min(side // max(1, enough) for side, enough in zip(size, least, strict=True))
    return max((each for each in FRACTIONS if each <= times), default=1)


def full_size(image: Any) -> tuple[int, int, int]:
    """Return the width and height stored in the file, and the divisor used for decoding (rounding up)."""
    if not isinstance(image, Image.Image):  # bands, [C, H, W]
        return image.shape[2], image.shape[1], 1
    width, height = image.info.get(FULL_SIZE, image.size)
    for each in FRACTIONS:
        if (math.ceil(width / each), math.ceil(height / each)) == image.size:
            return width, height, each
    return *image.size, 1


def check_images(images: Sequence[tuple[Path | BinaryIO, str]]) -> None:
    """Check the headers of up to ``CHECKED`` files, evenly spread, each with its name for the user; decode none."""
    for source, where in images[:: max(1, len(images) // CHECKED)]:
        image_size(source, where)
