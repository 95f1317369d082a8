"""Small tar shards for tests."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from datamodules.pairs.source import Pair

SIZES = (1, 2, 3, 5, 9, 17, 23)  # 60 pairs in seven shards
Files = dict[str, bytes]  # by extension


def write_tar(path: Path, samples: Sequence[tuple[str, Files]], format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for key, files in samples:
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def image(shade: int = 0, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(content, format)
    return content.getvalue()


def numbered(count: int, first: int = 0) -> list[tuple[str, Files]]:
    """Return samples of one shade each, numbered from ``first``."""
    numbers = range(first, first + count)
    return [(f"{number:05d}", {"png": image(number % 256), "txt": f"number {number}".encode()}) for number in numbers]


def write_shards(folder: Path, sizes: Sequence[int] = SIZES) -> Path:
    folder.mkdir(exist_ok=True)
    done = 0
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number:03d}.tar", numbered(size, done))
        done += size
    return folder


def shade_of(pair: Pair) -> int:
    pixel = pair.image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])
