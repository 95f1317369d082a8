"""The same pairs as a table, as tars and behind a web server."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.tar_shards import write_tar

PAIRS = 26  # four steps of six; an epoch drops two
SHARDS = (1, 9, 3, 6, 7)


def write_sources(folder: Path) -> None:
    """Write ``pairs.csv`` with its images, and ``shards/*.tar``."""
    noise = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "shards").mkdir()
    samples, lines = [], ["image,caption"]
    for number in range(PAIRS):
        content = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(content, "PNG")
        (folder / f"images/{number:02}.png").write_bytes(content.getvalue())
        lines.append(f"images/{number:02}.png,the number {number}")
        samples.append((f"{number:02}", {"png": content.getvalue(), "txt": f"the number {number}".encode()}))
    (folder / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    for number, size in enumerate(SHARDS):
        write_tar(folder / f"shards/{number}.tar", samples[:size])
        del samples[:size]
    assert not samples
