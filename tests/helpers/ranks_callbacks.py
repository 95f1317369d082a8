"""One rank of the suite callbacks' tests; the ``ranks`` fixture starts it in its own process."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from callbacks import LinearProbe, Proof, Retrieval, ZeroShot, ZeroShotSegmentation
from callbacks import proof as proofs
from datamodules import Captions, NoCaptions
from lit_clip import LitCLIP, distributed
from lit_clip.evaluation.prompts import Prompts, text_classifier
from lit_clip.evaluation.zero_shot import ensemble
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
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


if __name__ == "__main__":
    serve(globals())
