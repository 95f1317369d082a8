"""The command line: checkpoints that runs are validated with and resumed from."""

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.cli import LightningCLI

from lit_clip.cli.main import _run
from tests.fuzz.inputs import Input, Inputs, Target, edited_json
from tests.fuzz.samples import table_images
from tests.fuzz.targets.weights import HOSTILE, save_checkpoint

ARCHITECTURE = {
    "embed_dim": 8,
    "image": {"image_size": 32, "patch_size": 16, "width": 8, "layers": 1, "heads": 1},
    "text": {"context_length": 8, "width": 8, "layers": 1, "heads": 1},
}
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 1,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}
ALONE = 120  # seconds for the commands that make the checkpoint


def write_data(folder: Path) -> None:
    """Write a table of four images."""
    for name in list(table_images())[:4]:
        (folder / name).write_bytes(table_images()[name])
    lines = [f"{name},caption {number}" for number, name in enumerate(list(table_images())[:4])]
    (folder / "t.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")


@cache
def fit_trees() -> dict[str, Any]:
    """Return settings of `fit`."""
    model = {
        "architecture": ARCHITECTURE,
        "optimizer": {"lr": 1e-3, "weight_decay": 0.2},
        "lr_scheduler": {"warmup_steps": 0},
        "loss": {"class_path": "lit_clip.losses.Softmax", "init_args": {}},
        "freeze": {"image": "none"},
        "lora": None,
        "rates": None,
        "micro_batches": 1,
    }
    del model["loss"], model["freeze"], model["lora"], model["micro_batches"]
    data = {
        "train": "t.csv",
        "val": "t.csv",
        "batch_size": 2,
        "num_workers": 0,
        "augmentation": {"crop_scale": [0.7, 1.0]},
    }
    callbacks = [
        {"class_path": "callbacks.TrainingMonitor"},
        {"class_path": "callbacks.EMA", "init_args": {"decay": 0.9}},
    ]
    return {
        "fit.yaml": {
            "seed_everything": 0,
            "model": model,
            "data": {"class_path": "datamodules.Captions", "init_args": data},
            "trainer": {**TRAINER, "callbacks": callbacks, "precision": "32-true", "accumulate_grad_batches": 1},
        }
    }


def command(*words: str) -> None:
    """Run `lit-clip` in this process, up to what its exit code would be made from.

    Only the options of the subcommand are made: those of all take longer than reading most inputs.
    """
    known = {words[0]: LightningCLI.subcommands()[words[0]]}
    with (
        patch.object(sys, "argv", ["lit-clip", *words]),
        patch.object(sys, "path", [*sys.path]),
        patch.object(LightningCLI, "subcommands", staticmethod(lambda: known)),
    ):
        try:
            _run(list(words))
        except SystemExit as end:
            if end.code:
                raise


@cache
def run_trees() -> dict[str, Any]:
    """Return the checkpoint of a run of one step, its tensors described by their shapes and types."""
    import os
    from contextlib import chdir

    with tempfile.TemporaryDirectory() as name, chdir(name):
        write_data(Path(name))
        _write_settings(Path(name))
        save = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": ".", "filename": "last"},
        }
        words = ["--trainer.enable_checkpointing", "true", "--trainer.callbacks", json.dumps([save])]
        faulty = os.environ.copy()
        command("fit", "--config", "run.yaml", *words)
        os.environ.clear()
        os.environ.update(faulty)
        checkpoint = torch.load("last.ckpt", weights_only=True)
    tree = _described(checkpoint)
    tree.pop("callbacks", None)
    return {"run.ckpt": json.loads(json.dumps(tree, default=str))}


def _write_settings(folder: Path) -> None:
    tree = json.loads(json.dumps(fit_trees()["fit.yaml"]))
    tree["trainer"] = TRAINER
    (folder / "run.yaml").write_text(json.dumps(tree), encoding="utf-8")


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), *value.shape]
    if isinstance(value, dict):
        return {key: _described(each) for key, each in value.items()}
    return [_described(each) for each in value] if isinstance(value, list | tuple) else value


def run_inputs() -> Inputs:
    return edited_json(run_trees, HOSTILE)


def use_run(folder: Path, given: Input) -> Iterator[str]:
    """Validate with a checkpoint, or resume from it."""
    write_data(folder)
    _write_settings(folder)
    path = save_checkpoint(folder, given)
    if sum(given.data) % 2:
        command("validate", "--config", "run.yaml", "--ckpt_path", path.name)
    else:
        command("fit", "--config", "run.yaml", "--ckpt_path", path.name, "--trainer.max_steps", "2")
    yield "used"


resumed_checkpoints = Target(run_inputs, use_run)
