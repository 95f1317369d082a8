"""One rank of the test that counts a step's collectives; the ``ranks`` fixture starts it in its own process."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

import callbacks
from lit_clip import distributed
from lit_clip.tools import hardware
from tests.helpers.ranks import serve
from tests.helpers.small_sets import data_for, make_module, make_trainer

SOME_HAVE = ("barrier", "all_gather_single", "reduce_scatter_single", "monitored_barrier")
NAMES = [name for name in SOME_HAVE if hasattr(dist, name)] + [
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list"),
    *("reduce", "reduce_scatter_tensor", "gather", "gather_object", "scatter", "send", "recv", "batch_isend_irecv"),
]


class Collectives(Callback):
    """Count the calls of torch's collectives in each step, by the function of lit-clip that made them."""

    def __init__(self) -> None:
        self.found: dict[int, Counter[str]] = {}
        self.step: int | None = None
        for module, name in [*((dist, name) for name in NAMES), (distributed, "host_group")]:
            setattr(module, name, self._counting(name, getattr(module, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.step is not None:
                caller = sys._getframe(1).f_code
                where = caller.co_name if caller.co_filename.endswith("lit_clip/distributed.py") else caller.co_filename
                self.found.setdefault(self.step, Counter())[f"{name} {where}"] += 1
            return function(*args, **kwargs)

        return call

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        move = strategy.batch_to_device

        def moved(*args: Any, **kwargs: Any) -> Any:
            self.step = trainer.global_step  # until the next batch
            return move(*args, **kwargs)

        strategy.batch_to_device = moved

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = None


def count(output: str, table: str) -> None:
    """Train 8 steps as on GPUs, of which the 5th is logged, and write each step's collectives."""
    rank, world = distributed.rank_and_world()
    os.environ["LOCAL_RANK"] = str(rank)  # keeps Lightning from starting processes
    hardware.runs_ahead = lambda device: True
    counter = Collectives()
    used = callbacks.defaults(callbacks.TrainingMonitor(), callbacks.Throughput(), counter)
    options = {"max_epochs": 1, "log_every_n_steps": 5, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = make_trainer(Path(output).parent, used, **options)
    module = make_module()
    trainer.fit(module, data_for(module, Path(table), 4 // world))
    if rank == 0:
        Path(output).write_text(json.dumps(counter.found), encoding="utf-8")


if __name__ == "__main__":
    serve(globals())
