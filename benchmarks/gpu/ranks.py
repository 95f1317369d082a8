"""Strategies of several GPUs with one rank: they must work, and train as one device does."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback
from peers import architecture

from gpu.fitting import Timed, as_batch, fit
from gpu.inputs import named, uint8_pairs
from gpu.setting import Row, Setting, attempt, gap
from lit_clip import LitCLIP
from lit_clip.training.lightning.fsdp import FSDP

TOLERANCE = 0.02  # of the loss after a few steps in bfloat16


class Losses(Callback):
    """Keep every step's loss, on the device."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        self.losses.append(outputs["loss"].detach())


def rows(setting: Setting) -> Iterator[Row]:
    found: dict[str, Row] = {}
    for name in ("one device", "DDP", "FSDP"):
        found[name] = attempt(setting, name, lambda name=name: trained(setting, name), 6)
        yield found[name]
    one = found["one device"]
    for name in ("DDP", "FSDP"):
        if "loss" in found[name] and "loss" in one:
            yield attempt(setting, f"{name} as one device", lambda name=name: compared(name, one, found[name]))


def trained(setting: Setting, name: str) -> Row:
    torch.manual_seed(0)
    module = LitCLIP(architecture(named(setting, "ViT-B-32")))
    pairs = uint8_pairs(setting, module.model, 8 if setting.tiny else 256, 1)
    block, losses = 1 if setting.tiny else 10, Losses()
    timed = Timed(block)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    strategy = {"one device": "auto", "DDP": "ddp"}.get(name) or FSDP()  # NCCL on a GPU, gloo on a CPU
    batches = [as_batch(pairs[0], setting.cuda)]
    fit(setting, module, batches, 3 * block, timed, losses, log_every_n_steps=block, strategy=strategy)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {"ms": timed.seconds() * 1000, "loss": float(losses.losses[-1])}


def compared(name: str, one: Row, other: Row) -> Row:
    error = abs(other["loss"] / one["loss"] - 1)
    if not error <= TOLERANCE:
        raise ArithmeticError(f"{name}: the loss is {other['loss']:.4f}, that of one device {one['loss']:.4f}")
    return {"error": error, **gap(other["ms"] / one["ms"], f"{name} with one rank")}
