"""One rank of the suite callbacks' tests; the ``ranks`` fixture starts it in its own process."""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

import callbacks
from callbacks import LinearProbe, Proof, Retrieval, Throughput, ZeroShot, ZeroShotSegmentation
from callbacks import proof as proofs
from datamodules import Captions, NoCaptions
from lit_clip import LitCLIP, distributed
from lit_clip.evaluation.prompts import Prompts, text_classifier
from lit_clip.evaluation.zero_shot import ensemble
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.tools import hardware
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.ranks import serve
from tests.helpers.small_sets import data_for, make_module, make_trainer, numbers
from tests.helpers.towers import shaken


def agreed(trainer: Trainer, *prefixes: str) -> dict[str, float]:
    """Return the metrics with these prefixes, after checking that all ranks have the same."""
    found = {name: value for prefix in prefixes for name, value in numbers(trainer, prefix).items()}
    for other in distributed.gather_objects([found]):
        assert other == found
    return found


def evaluate(folder: Path, suite: str) -> dict[str, dict[str, float]]:
    """Return the metrics of ``fit``, evaluated at each validation and at each step; check that all ranks agree."""
    results = {}
    for name, steps in (("epochs", None), ("steps", 1)):
        # A larger step gives all images nearly the same features, whose ranking is then decided by rounding.
        module = make_module(optimizer=partial(PaperAdamW, lr=1e-4))
        callbacks = [
            ZeroShot(suite=suite, data_root=str(folder), batch_size=7, examples=0, every_n_steps=steps),
            Retrieval(suite, str(folder), batch_size=7, every_n_steps=steps),
            LinearProbe(suite, str(folder), ["shades"], l2=1.0, batch_size=7, every_n_steps=steps),
        ]
        # One step with all pairs, so that the weights do not depend on the number of ranks.
        trainer = make_trainer(folder, callbacks, max_steps=1, enable_checkpointing=False)
        trainer.fit(module, data_for(module, folder / "captions.csv", 8 // distributed.rank_and_world()[1]))
        results[name] = agreed(trainer, "zero_shot/", "linear_probe/", "retrieval/")
    return results


def classify(folder: Path) -> None:
    """Check that the ranks together build, and load from the cache, the classifier that each would build alone."""
    model, prompts = make_module().model.eval(), Prompts(["a", "b", "c"], [["red"], ["green", "blue ball"], ["pink"]])
    tokens = model.tokenizer([text for texts in prompts.texts for text in texts])
    rank_local = ensemble(model, tokens, [1, 2, 1])
    for batch_size in (1, 4):  # a single batch leaves the second rank without one
        shared = text_classifier(model, prompts, batch_size=batch_size)
        torch.testing.assert_close(shared, rank_local, rtol=0, atol=1e-6)
    cache = folder / f"texts_{distributed.rank_and_world()[0]}"  # only the first rank's cache is used
    shared = text_classifier(model, prompts, cache)
    setattr(model, "encode_text", None)  # noqa: B010 # encoding again would fail
    assert torch.equal(text_classifier(model, prompts, cache), shared)


class Unreduced(Metric):
    """Sum of the highest probabilities, in a plain attribute, which torchmetrics could not sum over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        assert preds.shape == (len(target), 7)
        self.total += float(preds.double().amax(dim=1).sum())

    def compute(self) -> float:
        return self.total


def metrics(output: str, folder: str, suite: str) -> None:
    """Write the metrics of torchmetrics that ``validate`` logs on rank 0; check that all ranks agree."""
    auroc = "torchmetrics.classification.MulticlassAUROC"
    given = {
        "auroc": {"class_path": auroc, "init_args": {"average": "macro"}},
        "ece": partial(MulticlassCalibrationError, n_bins=15),
        "matrix": MulticlassConfusionMatrix,
        "own": Unreduced(),
    }
    options = {"data_root": folder, "only": ["shades"], "batch_size": 7}
    callbacks = [
        ZeroShot(suite=suite, examples=0, metrics=given, **options),
        LinearProbe(suite, l2=1.0, metrics={"auroc": auroc}, **options),
    ]
    trainer = make_trainer(Path(folder), callbacks, logger=CSVLogger(folder, "csv", ""))
    trainer.validate(make_module(), NoCaptions(), verbose=False)
    found = agreed(trainer, "zero_shot/", "linear_probe/")
    if trainer.global_rank == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")


def run(folder: str, suite: str) -> dict[str, dict[str, float]]:
    """Run :func:`classify`, and return the results of :func:`evaluate`."""
    classify(Path(folder))
    return evaluate(Path(folder), suite)


def places(folder: str, suite: str) -> dict[str, float]:
    """Return the metrics of :class:`ZeroShotSegmentation` under ``validate``."""
    trainer = make_trainer(Path(folder), [ZeroShotSegmentation(suite, folder)])
    trainer.validate(make_module(), NoCaptions(), verbose=False)
    return agreed(trainer, "segmentation/", "pointing/")


def proof(table: str, start: str, classes: str) -> list[list[Any]]:
    """Train one step with all 60 pairs, and return what :class:`Proof` compares, which rank 0 prints.

    ``start`` is a checkpoint, or a folder of a text encoder beside which a new image encoder gets a head.
    """
    _, world = distributed.rank_and_world()
    torch.manual_seed(0)
    options = {"optimizer": partial(PaperAdamW, lr=1e-3), "lr_scheduler": partial(WarmupCosine, warmup_steps=0)}
    if Path(start).is_dir():
        text = HuggingFaceTextConfig(start, context_length=16)
        module = LitCLIP(CLIPConfig(16, TimmConfig("test_efficientnet", image_size=32), text), **options)
        shaken(module.model)
    else:
        module = LitCLIP(pretrained=start, **options)
    data = Captions(table, table, batch_size=60 // world, num_workers=0, augmentation=[])
    found: list[list[Any]] = []
    proofs.table_of = lambda rows, start: found.extend([row.what, row.images, row.before, row.after] for row in rows)
    make_trainer(Path(), [Proof([classes])], max_steps=1, enable_checkpointing=False).fit(module, data)
    return found


# One rank of the throughput test; the ``ranks`` fixture starts it in its own process.


def throughput(table: str) -> dict[str, float]:
    """Return the metrics of an epoch of two steps on all 8 pairs, which are the same on every rank."""
    _, world = distributed.rank_and_world()
    module = make_module()
    options = {"max_epochs": 1, "log_every_n_steps": 2, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = make_trainer(Path(), [Throughput()], **options)
    with patch("callbacks.throughput.device_peak", lambda trainer: 1e9):  # which Lightning's table lacks
        trainer.fit(module, data_for(module, Path(table), 4 // world))
    names = ("samples_per_second", "data_wait_share", "tokens_per_second", "padded_tokens_per_second", "mfu")
    return agreed(trainer, *(f"train/{name}" for name in names))


# One rank of the test that counts a step's collectives; the ``ranks`` fixture starts it in its own process.


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


def count(table: str) -> dict[int, Counter[str]]:
    """Train 8 steps as on GPUs, of which the 5th is logged, and return each step's collectives."""
    _, world = distributed.rank_and_world()
    hardware.runs_ahead = lambda device: True
    counter = Collectives()
    used = callbacks.defaults(callbacks.TrainingMonitor(), callbacks.Throughput(), counter)
    options = {"max_epochs": 1, "log_every_n_steps": 5, "limit_val_batches": 0, "enable_checkpointing": False}
    module = make_module()
    make_trainer(Path(), used, **options).fit(module, data_for(module, Path(table), 4 // world))
    return counter.found


if __name__ == "__main__":
    serve(globals())
