"""Opening a picture, with an error that says where it came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lit_clip.errors import InputError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


_BROKEN = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such image file: {path}") from error
    except _BROKEN as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise InputError(f"{where}: cannot read image {path} ({reason}); mend or remove it") from error


def open_image(path: Path, where: str) -> Image.Image:
    """The decoded picture.

    Args:
        path: the file.
        where: how the user knows it, such as ``captions.csv row 7``.

    Raises:
        InputError: no such file, not a picture, or a broken one.
    """
    with _opened(path, where) as image:
        image.load()
        return image


def check_image(path: Path, where: str) -> None:
    """Raise :class:`InputError` unless the file is there and begins like a picture; decodes nothing."""
    with _opened(path, where):
        pass
