"""One rank of the suite callbacks' tests; the ``ranks`` fixture starts it in its own process."""

import json
import os
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


def write_agreed(trainer: Trainer, output: str, *prefixes: str) -> None:
    """Validate, check that all ranks have the same metrics, and write them on rank 0."""
    trainer.validate(make_module(), NoCaptions(), verbose=False)
    found = {name: value for prefix in prefixes for name, value in numbers(trainer, prefix).items()}
    for other in distributed.gather_objects([found]):
        assert other == found
    if trainer.global_rank == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")


def evaluate(folder: Path, suite: str) -> dict[str, dict[str, float]]:
    """Return the metrics of ``fit``, evaluated at each validation and at each step; check that all ranks agree."""
    rank, _ = distributed.rank_and_world()
    results = {}
    for name, steps in (("epochs", None), ("steps", 1)):
        os.environ["LOCAL_RANK"] = str(rank)  # keeps Lightning from starting processes; it removes the variable
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
        tasks = ("zero_shot/", "linear_probe/", "retrieval/")
        results[name] = {key: value for task in tasks for key, value in numbers(trainer, task).items()}
        for other in distributed.gather_objects([results[name]]):
            assert other == results[name]
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
    rank, _ = distributed.rank_and_world()
    os.environ["LOCAL_RANK"] = str(rank)
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
    write_agreed(trainer, output, "zero_shot/", "linear_probe/")


def run(output: str, folder: str, suite: str) -> None:
    """Run :func:`classify`, then write the results of :func:`evaluate` on rank 0."""
    classify(Path(folder))
    results = evaluate(Path(folder), suite)
    if distributed.rank_and_world()[0] == 0:
        Path(output).write_text(json.dumps(results), encoding="utf-8")


def places(output: str, folder: str, suite: str) -> None:
    """Write the metrics of :class:`ZeroShotSegmentation` under ``validate`` on rank 0; check that all ranks agree."""
    rank, _ = distributed.rank_and_world()
    os.environ["LOCAL_RANK"] = str(rank)
    trainer = make_trainer(Path(folder), [ZeroShotSegmentation(suite, folder)])
    write_agreed(trainer, output, "segmentation/", "pointing/")


def proof(output: str, table: str, start: str, classes: str) -> None:
    """Train one step with all 60 pairs, and write what :class:`Proof` compares, which rank 0 prints.

    ``start`` is a checkpoint, or a folder of a text encoder beside which a new image encoder gets a head.
    """
    rank, world = distributed.rank_and_world()
    os.environ["LOCAL_RANK"] = str(rank)
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
    trainer = make_trainer(Path(output).parent, [Proof([classes])], max_steps=1, enable_checkpointing=False)
    trainer.fit(module, data)
    if rank == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")


# One rank of the throughput test; the ``ranks`` fixture starts it in its own process.


def throughput(output: str, table: str) -> None:
    """Train for an epoch of two steps on all 8 pairs; every rank has the same metrics, and rank 0 writes them."""
    rank, world = distributed.rank_and_world()
    os.environ["LOCAL_RANK"] = str(rank)  # keeps Lightning from starting processes
    module = make_module()
    options = {"max_epochs": 1, "log_every_n_steps": 2, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = make_trainer(Path(output).parent, [Throughput()], **options)
    with patch("callbacks.throughput.device_peak", lambda trainer: 1e9):  # which Lightning's table lacks
        trainer.fit(module, data_for(module, Path(table), 4 // world))
    metrics = numbers(trainer, "train/")
    for name in ("train/loss", "train/in_batch_accuracy"):
        metrics.pop(name)
    for other in distributed.gather_objects([metrics]):
        assert other == metrics
    if rank == 0:
        Path(output).write_text(json.dumps(metrics), encoding="utf-8")


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
