"""One row of the table, run and checked in its own processes: ``runs.py ROW FOLDER PAIRS PLAIN``."""

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint

from callbacks import defaults
from datamodules import Captions
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.module import LitCLIP
from lit_clip.tools.weight_files import read_sharded
from lit_clip.training.lightning.checkpoint_io import WholeCheckpointIO
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine

CONFIG = CLIPConfig(
    embed_dim=16,
    image=VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1),
    text=TextTransformerConfig(context_length=16, width=16, layers=2, heads=1),
)
PAIRS, BATCH, EPOCHS, SAVED_AT = 16, 4, 2, 3  # an epoch has four steps; the checkpoint is within the first
STEPS = EPOCHS * PAIRS // BATCH
State = Mapping[str, torch.Tensor]


class Run(NamedTuple):
    """A finished run.

    Attributes:
        trainer: after ``fit``.
        module: with its final weights.
        data: its data module.
        folder: of this run alone.
        end: checkpoint of the end.
        plain: weights of the run without any option.
        before: trainable weights before the first step.
        resumed: a run of the same settings resumed from ``folder/mid.ckpt``, with its trainer; to be called once.
    """

    trainer: Any
    module: LitCLIP
    data: Captions
    folder: Path
    end: dict[str, Any]
    plain: State
    before: State
    resumed: Callable[[], "Run"]

    @property
    def weights(self) -> State:
        return self.end["state_dict"]


class SaveAt(Checkpoint):
    """Save ``mid.ckpt`` after a step; Lightning puts this behind all callbacks that are no checkpoints."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(row: Any, folder: Path, pairs: str, plain: State, resume: Path | None = None) -> Run:
    """Train with a row's settings, and save ``mid.ckpt`` in the middle of the first epoch unless resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(1, verbose=False)
    torch.manual_seed(1)
    settings = {**row.trainer(folder)}
    model = {"optimizer": partial(PaperAdamW, lr=1e-3, eps=1e-3), **row.model(folder)}
    module = LitCLIP(**{"architecture": CONFIG, "lr_scheduler": partial(WarmupCosine, warmup_steps=2), **model})
    before = {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}
    sizes = {"global_batch_size": BATCH, "batch_size": 2, "num_workers": 0}
    data = Captions(pairs, **{"val": pairs, **sizes, **row.data(folder)})
    own = settings.pop("callbacks", [])
    saving = settings.get("enable_checkpointing", True) and not settings.get("barebones")
    if saving and resume is None:
        own = [*own, SaveAt(folder / "mid.ckpt", row.saved_at)]
    if not settings.get("barebones"):
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **settings}
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": row.devices,
            "strategy": "ddp" if row.world > 1 else "auto",
            "max_epochs": EPOCHS,
            "use_distributed_sampler": False,
            "default_root_dir": folder,
            "plugins": [WholeCheckpointIO()],
            "callbacks": defaults(*own),
            **settings,
        }
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    again = partial(fit, row, folder / "resumed", pairs, plain, folder / "mid.ckpt")
    return Run(trainer, module, data, folder, _end(row, trainer, module, folder), plain, before, again)


def _end(row: Any, trainer: Any, module: LitCLIP, folder: Path) -> dict[str, Any]:
    """Return a checkpoint of the end; of ranks that Lightning has started itself only the weights are here."""
    if row.launched:
        return {"state_dict": module.model.state_dict(), "optimizer_states": []}
    trainer.save_checkpoint(folder / "end.ckpt")
    cast(Any, trainer.strategy.checkpoint_io).teardown()  # waits for one that writes later
    trainer.strategy.barrier()
    path = folder / "end.ckpt"
    return read_sharded(path) if path.is_dir() else torch.load(path, weights_only=True)


def examine(row: Any, folder: Path, pairs: str, plain: State) -> None:
    """Run a row and assert its outcome."""
    if row.refused:
        try:
            fit(row, folder, pairs, plain)
        except InputError as error:
            line = str(error)
            assert "\n" not in line, line
            assert row.refused in line, line
            return
        raise AssertionError(f"{row.name}: was not refused")
    run = fit(row, folder, pairs, plain)
    for check in row.checks:
        check.function(run)


def main() -> None:
    torch.set_num_threads(1)
    from benchmarks.combinations.table import PLAIN, ROWS

    name, world, folder, pairs, plain = sys.argv[1:]
    if name == "plain":
        torch.save(fit(PLAIN, Path(folder), pairs, {}).weights, plain)
    else:
        row = next(row for row in ROWS if row.name == name and row.world == int(world))
        os.environ.update(row.environment)  # the server of forks sets LOCAL_RANK
        examine(row, Path(folder), pairs, torch.load(plain, weights_only=True))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort a regular exit of the interpreter


if __name__ == "__main__":
    main()
