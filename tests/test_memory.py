"""Memory of data workers that persist: what an epoch takes, the next gives back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules import Captions
from lit_clip.config import Preprocessing

ROWS, EPOCHS = 3000, 5


def kilobytes(process: int) -> int:
    """A process's own memory; pages of mapped files are the system's to keep or drop."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (60 + i, 80, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.jpg")
    lines = [f"{i % 20:02}.jpg,caption {i} {'and so on ' * (i % 9)}" for i in range(ROWS)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    return tmp_path / "t.csv"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_workers_that_persist_grow_by_less_than_two_percent_after_the_second_epoch(table: Path) -> None:
    options = {"batch_size": 50, "num_workers": 2, "preprocessing": Preprocessing(image_size=32)}
    module = Captions(str(table), str(table), **options)
    module.setup("fit")
    loader: Any = module.train_dataloader()
    used = []
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        assert sum(len(batch.keys) for batch in loader) == ROWS
        used.append([kilobytes(worker.pid) for worker in loader._iterator._workers])
    for worker in range(2):
        assert used[-1][worker] < 1.02 * used[1][worker], used
