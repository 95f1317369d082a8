"""One rank of the test of the attention backend; the ``ranks`` fixture starts it in its own process."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

import callbacks
from callbacks.attention_backend import AttentionCall, Measured
from lit_clip import distributed
from tests.helpers.ranks import serve
from tests.helpers.small_sets import data_for, make_module, make_trainer


class Orders(Callback):
    """Record the order of backends in each step."""

    def __init__(self, attention: callbacks.AttentionBackend) -> None:
        self.attention, self.seen = attention, []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.seen.append((list(self.attention.order), torch.backends.cuda.flash_sdp_enabled()))


def agree(folder: str, table: str) -> None:
    """Train with the first rank's choice, math, though on the second flash would be faster."""
    rank, _ = distributed.rank_and_world()
    os.environ["LOCAL_RANK"] = str(rank)  # keeps Lightning from starting processes
    fastest = {0: {"flash": 2.0, "math": 1.0}, 1: {"flash": 1.0, "math": 2.0}}[rank]
    setattr(AttentionCall, "measured", lambda self: Measured(self.times, fastest))  # noqa: B010 # of a class
    orders = Orders(callbacks.AttentionBackend())
    trainer = make_trainer(Path(folder), callbacks.defaults(orders.attention, orders), max_steps=2)
    module = make_module()
    trainer.fit(module, data_for(module, Path(table), 2))
    assert orders.seen == [(["math"], False)] * 2
    assert torch.backends.cuda.flash_sdp_enabled()


if __name__ == "__main__":
    serve(globals())
