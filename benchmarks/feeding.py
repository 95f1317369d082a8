"""Measure how many images a core feeds from tar shards, by the size that ``lit-clip shard --resize`` wrote.

    python benchmarks/feeding.py [--pairs 7] [--images 256] [--resize 256 384 512 768]

Prints for each short side, and for the 1280 x 960 originals (JPEG quality 90), the kB and the images per second of CPU
time: reading, decoding, the default training crop to 224 pixels, tokenising and collating batches of 32 in the main
process. Other programs on the machine slow a core down less than they would a clock on the wall.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from image_pipeline import BATCH, write_table
from peers import parser

from datamodules import Captions
from datamodules.commands.shard import shard


def seconds_per_image(loader: Iterable[Any]) -> float:
    """Return the CPU time of an image in an epoch."""
    start, images = time.process_time(), 0
    for batch in loader:
        images += len(batch.images)
    return (time.process_time() - start) / images


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=256)
    options.add_argument("--resize", type=int, nargs="+", default=[256, 384, 512, 768])
    arguments = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = str(write_table(Path(folder), (1280, 960), arguments.images))
        loaders: dict[int, Any] = {}
        size: dict[int, float] = {}
        for short in [*arguments.resize, 960]:
            output = Path(folder) / str(short)
            shard(table, str(output), resize=short, num_workers=0, shard_size=128)
            size[short] = sum(path.stat().st_size for path in output.glob("*.tar")) / arguments.images / 1e3
            data = Captions(str(output), table, batch_size=BATCH, num_workers=0)
            data.setup("fit")
            loaders[short] = data.train_dataloader()
        times: dict[int, list[float]] = {short: [] for short in loaders}
        for _ in range(arguments.pairs + 1):
            for short, loader in loaders.items():
                times[short].append(seconds_per_image(loader))
    print("| short side | kB an image | images per second and core | ms an image |\n|--:|--:|--:|--:|")
    for short, each in times.items():
        found = statistics.median(each[1:])  # the first warms up
        print(f"| {short} | {size[short]:.0f} | {1 / found:.0f} | {found * 1e3:.1f} |")


if __name__ == "__main__":
    main()
