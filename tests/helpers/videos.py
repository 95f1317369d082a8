"""Small videos of one colour per frame."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

RATE = 10  # frames a second
Colour = tuple[int, int, int]


def frame_colours(number: int, base: int = 0) -> list[Colour]:
    """Far from each other from one frame to the next."""
    return [((base + 40 * i) % 256, (90 * i + 60) % 256, (200 * i + base) % 256) for i in range(number)]


def film(path: Path, frames: Sequence[Colour], codec: str = "mpeg4", **options: Any) -> Path:
    """A video of one colour a frame, a key frame every six."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 6
        stream.bit_rate = 2_000_000
        for name, value in options.items():
            setattr(stream, name, value)
        for colour in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), colour))))
        container.mux(stream.encode())
    return path


def nearest_frame(image: Image.Image, frames: Sequence[Colour]) -> int:
    """The frame whose colour is nearest to that of an image."""
    colour: Any = image.getpixel((16, 16))
    return min(range(len(frames)), key=lambda i: sum(abs(a - b) for a, b in zip(frames[i], colour, strict=True)))


def write_table(path: Path, header: str, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
