"""One rank of the trainings in ``tests/training/test_optimizers.py``."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm import optim

from callbacks import defaults
from lit_clip import distributed
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupConstant, WarmupCosine, WarmupStableDecay
from tests.helpers.small_sets import data_for, make_module, make_trainer

OPTIMIZERS: dict[str, Any] = {
    "AdamW": PaperAdamW,
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Lion": partial(optim.Lion, lr=1e-3, weight_decay=0.1),
    "Muon": partial(optim.Muon, lr=1e-2, weight_decay=0.1),
}
SCHEDULES: dict[str, Any] = {
    "cosine": partial(WarmupCosine, warmup_steps=2),
    "WSD": partial(WarmupStableDecay, warmup_steps=2, cooldown_steps=3),
    "constant": partial(WarmupConstant, warmup_steps=2),
}
# Each optimiser and each schedule, in two parts, and all other pairs of them.
SOME, MORE = [("AdamW", "cosine"), ("Lion", "constant")], [("SGD", "WSD"), ("Muon", "cosine")]
CASES = {
    "some": SOME,
    "more": MORE,
    "others": [(each, other) for each in OPTIMIZERS for other in SCHEDULES if (each, other) not in SOME + MORE],
}
SAVED_AT, STEPS = 3, 8  # four steps an epoch


def fit(folder: Path, table: str, optimizer: str, schedule: str, ckpt_path: Path | None) -> Any:
    """Train for two epochs of 16 pairs, the gradients clipped; return the trainer."""
    parts = {"optimizer": OPTIMIZERS[optimizer], "lr_scheduler": SCHEDULES[schedule]}
    module = make_module(rates={"head": 0.5, "temperature": 0.5, "layer_decay": 0.8}, micro_batch_size=2, **parts)
    world = int(os.environ["WORLD_SIZE"])
    saving = ModelCheckpoint(folder, f"{{step}}_{ckpt_path is None}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    trainer = make_trainer(
        folder, defaults(saving), devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2,
        gradient_clip_val=1.0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data_for(module, Path(table), 4 // world), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def compare(folder: str, table: str, cases: str) -> None:
    """Train cases, whole and resumed in mid-epoch; write what rank 0 ends with."""
    ends, world = {}, os.environ["WORLD_SIZE"]
    for optimizer, schedule in CASES[cases]:
        place = Path(folder, f"{world}_{optimizer}_{schedule}")
        whole = fit(place, table, optimizer, schedule, None)
        assert whole.global_step == STEPS
        resumed = fit(place, table, optimizer, schedule, place / f"step={SAVED_AT}_True.ckpt")
        ends[f"{optimizer} {schedule}"] = [
            {
                "weights": trainer.lightning_module.model.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
                "steps": trainer.global_step,
            }
            for trainer in (whole, resumed)
        ]
        if distributed.rank_and_world()[0] == 0:
            shutil.rmtree(place)  # its checkpoints have 100 MB
    if distributed.rank_and_world()[0] == 0:
        torch.save(ends, Path(folder, f"{cases}_{world}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.exit_process()
