"""Opening a picture, with an error that says where it came from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from lit_clip.errors import InputError

CHECKED = 10_000
_BROKEN = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@contextmanager
def _opened(source: Path | BinaryIO, where: str) -> Iterator[Image.Image]:
    name = f"image {source}" if isinstance(source, Path) else "its image"
    if isinstance(source, Path) and source.exists() and not source.is_file():  # a pipe would be waited for
        raise InputError(f"{where}: {source} is no file")
    try:
        with Image.open(source) as image:
            yield image
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such image file: {source}") from error
    except _BROKEN as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise InputError(f"{where}: cannot read {name} ({reason}); mend or remove it") from error


def open_image(source: Path | BinaryIO, where: str) -> Image.Image:
    """The decoded picture.

    Args:
        source: a file, or its content.
        where: how the user knows it, such as ``captions.csv row 7``.

    Raises:
        InputError: no such file, not a picture, or a broken one.
    """
    with _opened(source, where) as image:
        image.load()
        return image


def check_images(images: Sequence[tuple[Path, str]]) -> None:
    """Look at the headers of up to ``CHECKED`` files, evenly spread, before anything is trained; decodes nothing.

    Args:
        images: each file and how the user knows it.

    Raises:
        InputError: no such file, or no picture.
    """
    for path, where in images[:: max(1, len(images) // CHECKED)]:
        with _opened(path, where):
            pass
