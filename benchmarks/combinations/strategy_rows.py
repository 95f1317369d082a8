"""Rows of strategies and plugins."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import plugins, strategies
from lightning.pytorch.plugins import environments

from benchmarks.combinations.checks import RESUMED, SAME, near, shows
from benchmarks.combinations.rows import STRATEGIES, Settings, option, refused, strategy, works
from benchmarks.combinations.runs import Run
from benchmarks.combinations.trainer_rows import Validations, watched
from lit_clip.training.lightning.checkpoint_io import WholeCheckpointIO
from lit_clip.training.lightning.fsdp import FSDP

for name in ("ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"):
    works(STRATEGIES, f"strategy: {name}", SAME, RESUMED, ranks=[2], trainer=option(strategy=name), covers=[name])
for start in ("spawn", "fork", "notebook"):
    for suffix in ("", "_find_unused_parameters_false", "_find_unused_parameters_true"):
        works(
            STRATEGIES,
            f"strategy: ddp_{start}{suffix}",
            SAME,
            ranks=[2],
            launched=True,
            trainer=option(strategy=f"ddp_{start}{suffix}"),
            covers=[f"ddp_{start}{suffix}"],
        )


works(
    STRATEGIES,
    "SingleDeviceStrategy",
    SAME,
    RESUMED,
    ranks=[1],
    trainer=strategy(lambda: strategies.SingleDeviceStrategy("cpu")),
    covers=["SingleDeviceStrategy", "single_device"],
)
DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view=False": {"gradient_as_bucket_view": False},
}
for name, values in DDP_OPTIONS.items():
    works(
        STRATEGIES,
        f"DDPStrategy: {name}",
        SAME,
        RESUMED,
        ranks=[2],
        trainer=strategy(lambda values=values: strategies.DDPStrategy(**values)),
        covers=["DDPStrategy"],
    )
SHARDED: dict[str, dict[str, Any]] = {
    "": {},
    ": reshard_after_forward: false": {"reshard_after_forward": False},
    ": device_mesh: [1, 2]": {"device_mesh": [1, 2]},
    ": device_mesh: [2, 1]": {"device_mesh": [2, 1]},
    ": sharded_checkpoints: true": {"sharded_checkpoints": True},
}
for name, values in SHARDED.items():
    works(
        STRATEGIES,
        f"lit_clip.training.lightning.fsdp.FSDP{name}",
        near(1e-5),
        RESUMED,
        ranks=[2],
        trainer=strategy(lambda values=values: FSDP(**values)),
    )


def same_losses(run: Run) -> None:
    losses = [None] * 2
    torch.distributed.all_gather_object(losses, float(run.trainer.callback_metrics["val/loss"]))
    assert losses[0] == losses[1] == pytest.approx(losses[0])  # the last is false for nan


@shows("validates on eight batches on one rank and seven on the other")
def uneven(run: Run) -> None:
    assert Validations.of(run).batches == [8 - run.trainer.global_rank] * 2
    same_losses(run)


@shows("validates on one rank alone")
def on_one_rank(run: Run) -> None:
    assert Validations.of(run).batches == [1 - run.trainer.global_rank] * 2
    same_losses(run)


def pairs_for_validation(count: int) -> Settings:
    """Settings with a table of the first pairs."""

    def settings(folder: Path) -> dict[str, Any]:
        pairs = Path(os.environ["COMBINATION_PAIRS"])
        path = pairs.parent / f"first_{count}.csv"
        if not path.exists():
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text("\n".join(pairs.read_text(encoding="utf-8").splitlines()[: count + 1]), encoding="utf-8")
            draft.replace(path)
        return {"val": str(path), "batch_size": 1}

    return settings


for count, words, check in ((15, "uneven validation", uneven), (1, "one pair of validation", on_one_rank)):
    uneven_sets = {"ranks": [2], "data": pairs_for_validation(count)}
    works(STRATEGIES, f"DDP, {words}", SAME, check, RESUMED, **uneven_sets, trainer=watched())
    works(
        STRATEGIES,
        f"FSDP, {words}",
        near(1e-5),
        check,
        RESUMED,
        **uneven_sets,
        trainer=lambda folder: {"strategy": FSDP(), **watched()(folder)},
    )


# Plugins.

works(
    STRATEGIES,
    "TorchCheckpointIO",
    SAME,
    RESUMED,
    trainer=lambda folder: {"plugins": [plugins.TorchCheckpointIO()]},
    covers=["TorchCheckpointIO"],
)
works(
    STRATEGIES,
    "AsyncCheckpointIO",
    SAME,
    RESUMED,
    trainer=lambda folder: {"plugins": [plugins.AsyncCheckpointIO(WholeCheckpointIO())]},
    covers=["AsyncCheckpointIO"],
)
works(
    STRATEGIES,
    "DoublePrecision",
    near(1e-5),
    trainer=lambda folder: {"plugins": [plugins.DoublePrecision(), WholeCheckpointIO()]},
    covers=["DoublePrecision"],
)
works(
    STRATEGIES,
    "MixedPrecision: bf16-mixed",
    near(0.01),
    trainer=lambda folder: {"plugins": [plugins.MixedPrecision("bf16-mixed", "cpu"), WholeCheckpointIO()]},
    covers=["MixedPrecision"],
)
refused(
    STRATEGIES,
    "HalfPrecision: 16-true",
    "weights kept in float16",
    trainer=lambda folder: {"plugins": [plugins.HalfPrecision("16-true")]},
    covers=["HalfPrecision"],
)
works(
    STRATEGIES,
    "Precision",
    SAME,
    trainer=lambda folder: {"plugins": [plugins.Precision(), WholeCheckpointIO()]},
    covers=["Precision"],
)
for environment in (environments.LightningEnvironment, environments.TorchElasticEnvironment):
    works(
        STRATEGIES,
        environment.__name__,
        SAME,
        ranks=[1 if environment is environments.LightningEnvironment else 2],
        trainer=lambda folder, made=environment: {"plugins": [made(), WholeCheckpointIO()]},
        environment={"LOCAL_RANK": "0"} if environment is environments.LightningEnvironment else {},
    )
