"""Rows of lit-clip's own callbacks, alone and in pairs, and of its options."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

import callbacks as ours
from benchmarks.combinations.checks import RESUMED, SAME, TRAINED, Check, near
from benchmarks.combinations.rows import OURS, Settings, csv_logger, nothing, option, refused, strategy, works
from benchmarks.combinations.runs import CONFIG
from callbacks import compile as compile_file
from datamodules import BatchOptions
from lit_clip.losses import Loss
from lit_clip.losses.loss import WholeBatch
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.models.lora import LoRA
from lit_clip.training.lightning.fsdp import FSDP

COMPILE_BLOCKS = compile_file.compile_blocks


SETS = {"ZeroShot": "shades", "LinearProbe": "shades", "Retrieval": "pairs", "ZeroShotSegmentation": "grids"}


def own(kind: str, folder: Path) -> Callback:
    """Create one of our callbacks with small settings."""
    if kind in SETS:
        folder.mkdir(parents=True, exist_ok=True)
        suite = Path(os.environ["COMBINATION_PAIRS"]).parent
        settings = {"data_root": str(suite), "only": [SETS[kind]], "num_workers": 0}
        return getattr(ours, kind)(suite=str(suite / "suite.yaml"), **settings)
    if kind == "Compile":  # real graphs take minutes; tests/callbacks/test_compile.py has them
        compile_file.compile_blocks = partial(COMPILE_BLOCKS, backend="eager")
    if kind == "FrozenFeatures":
        return ours.FrozenFeatures(str(folder / "features"))
    if kind == "EMA":
        return ours.EMA(0.5)
    if kind == "Without":
        return ours.Without(["SkippedSamples"])  # what no other row needs
    return getattr(ours, kind)()


FROZEN = {"freeze": Freeze(UnlockLast(1), UnlockLast(1))}
MODEL = ("ActivationCheckpointing", "Compile", "EMA", "PatchDropout", "FrozenFeatures")
CHANGING = (*MODEL[2:], "HardBatches")
# Beside FrozenFeatures.
NOT_FROZEN = {"Compile": "not together", "PatchDropout": "are random in training", "HardBatches": "not together"}
OWN = [
    name for name in ours.__all__ if isinstance(getattr(ours, name), type) and issubclass(getattr(ours, name), Callback)
]


def settings_for(*kinds: str) -> dict[str, Settings]:
    """Settings that these callbacks of ours need."""
    frozen = "FrozenFeatures" in kinds
    hard: dict[str, Any] = {"batches": BatchOptions(hard=0.5)} if "HardBatches" in kinds else {}
    return {
        "trainer": lambda folder: {"callbacks": [own(kind, folder) for kind in kinds], **csv_logger(folder)},
        "model": option(**FROZEN) if frozen else nothing,
        "data": option(**hard, **({"augmentation": []} if frozen else {})),
    }


for name in OWN:
    same = [TRAINED] if name in CHANGING else [near(1e-5) if name == "Compile" else SAME]
    works(OURS, f"callbacks.{name}", *same, RESUMED, quick=[2] if name == "EMA" else [], **settings_for(name))

for name in MODEL:
    for other in OWN:
        if other in MODEL and other <= name:
            continue  # once in either order
        both = f"callbacks.{name}, callbacks.{other}"
        line = next((line for kind, line in NOT_FROZEN.items() if {name, other} == {kind, "FrozenFeatures"}), "")
        if line:
            refused(OURS, both, line, **settings_for(name, other))
        else:
            ranks = [1, 2] if other in MODEL else [1]
            works(OURS, both, TRAINED, RESUMED, ranks=ranks, **settings_for(name, other))

OBSERVERS = [name for name in OWN if name not in (*MODEL, "HardBatches")]
works(OURS, f"callbacks: {', '.join(OBSERVERS)}", SAME, RESUMED, **settings_for(*OBSERVERS))

for name in OWN:
    settings = settings_for(name)
    sharded = {**settings, "trainer": lambda folder, made=settings["trainer"]: {**made(folder), "strategy": FSDP()}}
    if name == "EMA":
        refused(OURS, f"callbacks.{name}, FSDP", "FSDP has no whole weights for EMA to average", (2,), **sharded)
    else:
        checks = [TRAINED] if name in CHANGING else [near(1e-5)]
        works(OURS, f"callbacks.{name}, FSDP", *checks, RESUMED, ranks=[2], **sharded)


class OwnLoss(Loss):
    """A loss in its simplest form."""

    def whole_batch(self, pairs: WholeBatch) -> Tensor:
        logits = pairs.scale * pairs.image @ pairs.text.T
        target = torch.arange(len(logits))
        return (
            torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
        ) / 2


def pretrained(folder: Path) -> dict[str, Any]:
    """Weights to start from, written by each rank for itself."""
    from lit_clip.commands.wise_ft import save
    from lit_clip.models.clip import CLIP

    torch.manual_seed(3)
    path = folder / f"start_{os.environ.get('RANK', 0)}.ckpt"
    save(CLIP(CONFIG), path, {})
    return {"pretrained": str(path), "lora": LoRA(r=2)}


def by_part(folder: Path) -> dict[str, Any]:
    """A LoRA in one encoder, the other one whole, with rates of their own."""
    rates = {"image": 0.5, "head": {"lr": 2.0, "weight_decay": 0.0}, "temperature": 0.1, "layer_decay": 0.5}
    lora = LoRA(r=2, tower="text", head=True)
    return {**pretrained(folder), "lora": lora, "rates": rates}


SHARDED = {"trainer": strategy(FSDP)}
OPTIONS: dict[str, tuple[list[Check], dict[str, Settings]]] = {
    "model.micro_batch_size: 1": ([near(1e-5), RESUMED], {"model": option(micro_batch_size=1)}),
    "model.loss: of one's own": ([near(1e-5), RESUMED], {"model": lambda folder: {"loss": OwnLoss()}}),
    "model.lora": ([TRAINED, RESUMED], {"model": pretrained}),
    "model.freeze": ([TRAINED, RESUMED], {"model": option(**FROZEN)}),
    "model.rates, model.lora of one encoder": ([TRAINED, RESUMED], {"model": by_part}),
}
for name, (shown, values) in OPTIONS.items():
    works(OURS, name, *shown, **values)
    works(OURS, f"{name}, FSDP", *shown, ranks=[2], **values, **SHARDED)
