"""Callbacks that break images or gradients in real runs, and one rank of the test of gradient norms."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from callbacks.monitor import gradient_norms
from lit_clip.batch import CaptionBatch
from lit_clip.models.clip import CLIP
from lit_clip.tools import hardware
from tests.helpers.ranks import serve


class BrokenImage(Callback):
    """Give images infinite pixels in training, on whichever rank reads them.

    Args:
        keys: keys of the images to break; None breaks all.
        folder: where every rank saves its weights, before training and after it has ended or failed.
    """

    def __init__(self, keys: list[str] | None, folder: str | None = None) -> None:
        self.keys, self.folder = keys, folder
        self._rows: list[int] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: CaptionBatch, batch_idx: int
    ) -> None:
        self._rows = [row for row, key in enumerate(batch.keys) if self.keys is None or key in self.keys]

    def _break(self, encoder: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if not encoder.training:
            return None
        images = inputs[0].clone()
        images[self._rows] = torch.inf
        return (images,)

    def _write(self, trainer: Trainer, module: Any, name: str) -> None:
        if self.folder:
            torch.save(module.model.state_dict(), Path(self.folder) / f"{name}_{trainer.global_rank}.pt")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.model.visual.register_forward_pre_hook(self._break)
        self._write(trainer, module, "first")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "last")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer, pl_module, "last")


class BrokenGradient(Callback):
    """Make one gradient infinite on one rank at one step, after DDP's averaging; the loss is not affected."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gradient = pl_module.get_parameter("model.visual.proj").grad
        if gradient is not None and (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            gradient[0, 0] = torch.inf


class RunsAhead(Callback):
    """Train as on a device for which the host does not wait."""

    def __init__(self) -> None:
        hardware.runs_ahead = lambda device: True


def give_gradients(model: nn.Module) -> None:
    """Set random gradients."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def norms_of_shards() -> None:
    """Check that gradients divided among the ranks have the norms of the whole gradients."""
    from tests.helpers.ranks import CONFIG

    torch.manual_seed(0)
    model = CLIP(CONFIG)
    give_gradients(model)
    expected = gradient_norms(model)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=scalars)
    give_gradients(model)
    norms = gradient_norms(model)
    assert norms.keys() == expected.keys() == {"image", "text"}
    for encoder, norm in norms.items():
        torch.testing.assert_close(norm, expected[encoder])


# Callbacks that show the progress of the runs of ``tests/callbacks/test_preemption.py``, or interrupt them.


class ValidationMark(Callback):
    """Create a file for this rank in the current folder after the second validation batch."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            Path(f"validating_{trainer.global_rank}").touch()


class CtrlC(Callback):
    """Send SIGINT to this process after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    serve(globals())
