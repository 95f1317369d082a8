"""One rank of the throughput test; the ``ranks`` fixture starts it in its own process."""

import json
import os
from pathlib import Path
from unittest.mock import patch

from callbacks import Throughput
from lit_clip import distributed
from tests.helpers.ranks import serve
from tests.helpers.small_sets import data_for, make_module, make_trainer, numbers


def fit(output: str, table: str) -> None:
    """Train for an epoch of two steps on all 8 pairs; every rank has the same metrics, and rank 0 writes them."""
    rank, world = distributed.rank_and_world()
    os.environ["LOCAL_RANK"] = str(rank)  # keeps Lightning from starting processes
    module = make_module()
    options = {"max_epochs": 1, "log_every_n_steps": 2, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = make_trainer(Path(output).parent, [Throughput()], **options)
    with patch("callbacks.throughput.device_peak", lambda trainer: 1e9):  # which Lightning's table lacks
        trainer.fit(module, data_for(module, Path(table), 4 // world))
    metrics = numbers(trainer, "train/")
    for name in ("train/loss", "train/in_batch_accuracy"):
        metrics.pop(name)
    for other in distributed.gather_objects([metrics]):
        assert other == metrics
    if rank == 0:
        Path(output).write_text(json.dumps(metrics), encoding="utf-8")


if __name__ == "__main__":
    serve(globals())
