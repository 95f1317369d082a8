"""Opening an image, with an error that says where it came from."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from lit_clip.errors import BadSample

CHECKED = 10_000
MAX_PIXELS = 178_956_970  # what Pillow itself refuses; 0.7 GB as RGB
MOST_ELONGATED = 500  # times as long as wide; resized to a model's input a thread of pixels is a gigabyte
PROGRAMS = frozenset({"EPS"})  # formats that another program draws, as long as it likes

LeastSize = Callable[[int, int], tuple[int, int]]  # width and height of an image -> those that are still enough

FULL_SIZE = "size in the file"  # of an image that was decoded at a fraction, in its ``info``
FRACTIONS = (1, 2, 4, 8)  # of width and height, that JPEG's decoder knows and Pillow passes on

_hushed = False
_least_size: ContextVar[LeastSize | None] = ContextVar("_least_size", default=None)


@contextmanager
def decoding_at_least(size: LeastSize | None) -> Iterator[None]:
    """Let images that are opened inside come at a fraction of their width and height.

    JPEG's decoder can leave out the finer half, three quarters or seven eighths of its frequencies, which costs a
    fraction of the time; other formats are decoded as ever.

    Args:
        size: the width and height that an image must still have; None: its own.
    """
    token = _least_size.set(size)
    try:
        yield
    finally:
        _least_size.reset(token)


def _hush() -> None:
    """Keep Pillow's remarks on files that it reads all the same from the terminal: each has words of its own."""
    global _hushed
    if not _hushed:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        _hushed = True


@contextmanager
def _opened(source: Path | BinaryIO, where: str) -> Iterator[Image.Image]:
    _hush()
    name = f"image {source}" if isinstance(source, Path) else "its image"
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():  # a pipe would be waited for
            raise BadSample(where, "missing image", f"{source} is no file")
        with Image.open(source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, {MAX_PIXELS:,} are the most")
            if max(width, height) > MOST_ELONGATED * min(width, height):
                raise ValueError(f"{width} x {height} pixels are a thread")
            if image.format in PROGRAMS:
                raise UnidentifiedImageError
            yield image
    except BadSample:
        raise
    except FileNotFoundError as error:
        raise BadSample(where, "missing image", f"no such image file: {source}") from error
    # Pillow's decoders answer a broken file with whatever they trip over: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        reason, what = _what(error)
        raise BadSample(where, reason, f"cannot read {name} ({what}); fix or remove it") from error


def _what(error: Exception) -> tuple[str, str]:
    """The kind of an image's error, and its own words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image", "not an image"
    words = str(error).strip().partition("\n")[0] or type(error).__name__
    return "image too large" if isinstance(error, Image.DecompressionBombError) else "broken image", words


def open_image(source: Path | BinaryIO, where: str) -> Image.Image:
    """The decoded image: of an animation the first frame, and not turned as a camera's rotation flag says.

    Args:
        source: a file, or its content.
        where: how the user knows it, such as ``captions.csv row 7``.

    Raises:
        BadSample: no such file, not an image, a broken one, or one of more than ``MAX_PIXELS``.
    """
    with _opened(source, where) as image:
        least_size = _least_size.get()
        if least_size is not None:
            width, height = least_size(*image.size)
            image.info[FULL_SIZE] = image.size
            image.draft(None, (max(1, width), max(1, height)))  # pyright: ignore[reportArgumentType]  # None keeps the mode
        image.load()
        return image


def fraction(size: tuple[int, int], least: tuple[int, int]) -> int:
    """1, 2, 4 or 8: by what a JPEG's width and height may be divided to still be at least so large."""
    times = min(side // max(1, enough) for side, enough in zip(size, least, strict=True))
    return max((each for each in FRACTIONS if each <= times), default=1)


def full_size(image: Image.Image) -> tuple[int, int, int]:
    """Width and height that the file says, and by what decoding has divided them (rounding up)."""
    width, height = image.info.get(FULL_SIZE, image.size)
    for each in FRACTIONS:
        if (math.ceil(width / each), math.ceil(height / each)) == image.size:
            return width, height, each
    return *image.size, 1


def check_images(images: Sequence[tuple[Path, str]]) -> None:
    """Look at the headers of up to ``CHECKED`` files, evenly spread, before anything is trained; decodes nothing.

    Args:
        images: each file and how the user knows it.

    Raises:
        BadSample: no such file, or no image.
    """
    for path, where in images[:: max(1, len(images) // CHECKED)]:
        with _opened(path, where):
            pass
