"""Memory of persistent data workers and of the main process does not grow from epoch to epoch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules import Captions
from lit_clip.models.config import Preprocessing
from tests.helpers.tar_shards import write_tar

ROWS, TARS, EPOCHS = 3000, 30, 5


def kilobytes(process: int) -> int:
    """Return a process's anonymous memory in KiB, without mapped files, whose pages the system can drop."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0])


def write_images(folder: Path) -> list[str]:
    """Write the twenty small images that all samples share, and return their names."""
    rng = np.random.default_rng(0)
    names = [f"{i:02}.jpg" for i in range(20)]
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (60 + i, 80, 3), dtype=np.uint8)).save(folder / name)
    return names


def caption(row: int) -> str:
    return f"caption {row} {'and so on ' * (row % 9)}"


def write_table(folder: Path) -> str:
    names = write_images(folder)
    lines = [f"{names[row % 20]},{caption(row)}" for row in range(ROWS)]
    (folder / "t.csv").write_text("\n".join(["image,caption", *lines]))
    return str(folder / "t.csv")


def write_tars(folder: Path) -> str:
    """Write thirty shards, more than are shuffled at once, and return their pattern."""
    images = [(folder / name).read_bytes() for name in write_images(folder)]
    for number in range(TARS):
        rows = range(number * ROWS // TARS, (number + 1) * ROWS // TARS)
        samples = [(str(row), {"jpg": images[row % 20], "txt": caption(row).encode()}) for row in rows]
        write_tar(folder / f"{number:05}.tar", samples)
    return f"{folder}/{{00000..{TARS - 1:05}}}.tar"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("write", [write_table, write_tars])
def test_persistent_workers_grow_by_less_than_two_percent_after_the_second_epoch(
    write: Callable[[Path], str], tmp_path: Path
) -> None:
    data = write(tmp_path)
    module = Captions(data, data, batch_size=50, num_workers=2)
    module.preprocessing = Preprocessing(image_size=32)
    module.setup("fit")
    loader: Any = module.train_dataloader()
    used = []
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        assert sum(len(batch.keys) for batch in loader) == ROWS
        workers = [worker.pid for worker in loader._iterator._workers]
        used.append([kilobytes(process) for process in (*workers, os.getpid())])
    for process in range(3):
        assert used[-1][process] < 1.02 * used[1][process], used
