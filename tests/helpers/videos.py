"""Small videos whose frames have one colour each."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

RATE = 10  # frames per second
Colour = tuple[int, int, int]


def frame_colours(number: int, base: int = 0) -> list[Colour]:
    """Return a colour for each frame, far from those of its neighbours."""
    return [((base + 40 * i) % 256, (90 * i + 60) % 256, (200 * i + base) % 256) for i in range(number)]


def write_video(path: Path, frames: Sequence[Colour], codec: str = "mpeg4", **options: Any) -> Path:
    """Encode a video with one colour per frame and a key frame every six frames."""
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
    """Return the index of the frame whose colour is nearest to the image's."""
    colour: Any = image.getpixel((16, 16))
    return min(range(len(frames)), key=lambda i: sum(abs(a - b) for a, b in zip(frames[i], colour, strict=True)))


def write_table(path: Path, header: str, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
