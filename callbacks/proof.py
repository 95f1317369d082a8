"""Measure a model before its first step and at the end of the run, on images that it does not train on."""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import BadSample, require
from lit_clip.evaluation.before_after import (
    HELD_OUT,
    Measured,
    PairFeatures,
    compare,
    gather_pairs,
    measure,
    table_of,
    worse_line,
)
from lit_clip.evaluation.heads_alone import features_before_heads, heads_of, train_heads
from lit_clip.models.clip import CLIP
from lit_clip.models.running import evaluation_mode
from lit_clip.module import LitCLIP
from lit_clip.tools.console import Console
from lit_clip.tools.html import thumbnail
from lit_clip.tools.untrusted import convert, entries
from lit_clip.tools.weight_files import read_mapped
from lit_clip.training.frozen_features import versions_of
from lit_clip.training.lightning.fsdp import FSDP
from lit_clip.training.lightning.run_folder import run_folder, shown_path
from .print_results import recommended
from .random_states import random_states, restore_random_states

STORED, DECODED = 30_000, 1_500  # pairs that heads alone learn from: with stored features, and with decoded images
MOST_POINTS = 1_000  # of a curve


class Proof(Callback):
    """Compare the model before and after training, on held-out pairs and on what it should still do.

    ``fit`` then ends with a table of paired 95 % intervals, before it a line for what is worse, and a page
    ``report.html`` with curves and examples in the run's folder. Before is the model as it starts; of two encoders with
    new heads it is what training the heads alone reaches. After are the weights that the last lines of the run say to
    take. The training is the same to the last bit; a resumed run has the first measurement in its checkpoint.

    Args:
        rest: what the model should still do: folders of class folders (zero-shot), or tables of pairs (recall@1).
            None: of a trained model, the share of each held-out image's 10 nearest ones that stay among them.
        examples: images on the page.
    """

    comes_last = True  # of all callbacks: what it prints is the end of a run

    def __init__(self, rest: list[str] | None = None, examples: int = 20) -> None:
        require(examples >= 0, f"Proof.examples: {examples} must be at least 0")
        self.rest, self.examples = rest or [], examples
        self._active, self._start = False, ""
        self._before: dict[str, Measured] = {}
        self._curves: dict[str, list[tuple[int, Any]]] = {}
        self._rest: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        fitting: Any = trainer
        if stage != "fit" or fitting.fast_dev_run:
            return
        reason = "limit_val_batches is 0" if not fitting.limit_val_batches else ""
        reason = "its weights are sharded" if isinstance(trainer.strategy, FSDP) else reason
        if getattr(getattr(fitting, "datamodule", None), "val_source", None) is None:
            reason = "its data have no pairs to validate"
        self._active = not reason
        if reason:
            rank_zero_info(f"Proof: the run is not compared with the model before: {reason}")
        if self._active and self.rest:
            from .proof_rest import Rest

            self._rest = Rest(self.rest)

    def state_dict(self) -> dict[str, Any]:
        curves = {
            name: [(step, float(value)) for step, value in points if math.isfinite(value)]
            for name, points in self._curves.items()
        }
        before = {name: each._asdict() for name, each in self._before.items()}
        return {"start": self._start, "before": before, "curves": curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        types = {"start": str, "before": dict[str, object], "curves": dict[str, list[tuple[int, float]]]}
        convert(state_dict, entries(types, total=True), "callbacks.Proof")
        self._start, self._curves = state_dict["start"], dict(state_dict["curves"])
        self._before = {name: Measured.from_state(each, name) for name, each in state_dict["before"].items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._active or self._before:
            return
        if trainer.global_step:
            rank_zero_info("Proof: the run is not compared with the model before: it began without this callback")
            return
        module, states = cast(LitCLIP, pl_module), random_states()
        with evaluating(trainer, module):
            first = any(type(each).__name__ == "HeadsFirst" for each in cast(Any, trainer).callbacks)
            heads = {} if module.starts_trained or first else heads_alone(trainer, module)
            self._start = "the heads alone" if heads or first else "the model as it started"
            with _weights(module.model, heads):
                self._before, _ = self._measured(trainer, module, module.starts_trained and not self.rest)
        restore_random_states(states)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % (cast(Any, trainer).log_every_n_steps or sys.maxsize) == 0:
            self._note(trainer, "train/loss")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in ("val/loss", "val/mean_recall") if trainer.global_step else ():
            self._note(trainer, name)

    def _note(self, trainer: Trainer, name: str) -> None:
        """Add a point to a curve without synchronising the device; thin out a long curve."""
        value = trainer.callback_metrics.get(name)
        if self._before and value is not None:
            points = self._curves.setdefault(name, [])
            points.append((trainer.global_step, value.detach().clone()))
            del points[: len(points) if len(points) > MOST_POINTS else 0 : 2]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._active or not self._before:
            return
        module, before = cast(LitCLIP, pl_module), self._before[HELD_OUT]
        with evaluating(trainer, module), _weights(module.model, _recommended_weights(trainer, module)):
            after, pairs = self._measured(trainer, module, "near" in before.more)
        folder = run_folder(trainer)  # every rank must ask
        if not trainer.is_global_zero:
            return
        rows, console = compare(self._before, after), Console(soft_wrap=True)
        worse = worse_line(rows, self._start)
        if worse:
            console.print(worse)
        Console().print(table_of(rows, self._start))
        if after[HELD_OUT].digest != before.digest:
            console.print("Proof: the held-out pairs are not those of the run's beginning")
        elif folder:
            from lit_clip.evaluation.report.run_page import examples_of, write_run_page  # imports matplotlib

            examples = examples_of(pairs, before, after[HELD_OUT], self.examples)
            _add_images(examples, cast(Any, trainer).datamodule.val_source)
            curves = self.state_dict()["curves"]
            write_run_page(folder / "report.html", rows, self._start, worse, curves, examples)
            console.print(f"report: {shown_path(folder / 'report.html')}")

    def _measured(
        self, trainer: Trainer, module: LitCLIP, neighbours: bool
    ) -> tuple[dict[str, Measured], PairFeatures]:
        """Measure the current model on all ranks' pairs and on the other sets."""
        data, empty = cast(Any, trainer).datamodule, torch.zeros(0, module.model.config.embed_dim, device=module.device)
        loader, most = data.val_dataloader(), cast(Any, trainer).limit_val_batches
        batches = islice(loader, most if isinstance(most, int) else int(most * len(loader)))

        def encode(batch: CaptionBatch) -> tuple[Tensor, Tensor]:
            found = module.predict_step(batch, 0)
            return found["image"], found["text"]

        pairs = gather_pairs(encode, map(trainer.strategy.batch_to_device, batches), data.tokenize, (empty, empty))
        rest = self._rest.measured(module.model) if self._rest else {}
        return {HELD_OUT: measure(pairs, self._before.get(HELD_OUT), neighbours), **rest}, pairs


@contextmanager
def evaluating(trainer: Trainer, module: LitCLIP) -> Iterator[None]:
    """Compute as in validation: evaluation mode, without gradients, under the trainer's autocast."""
    distributed.same_buffers(module.model)
    with evaluation_mode(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        yield


@contextmanager
def _weights(model: CLIP, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace some of the model's weights while the block runs."""
    kept = {name: value.clone() for name, value in model.state_dict().items() if name in state}
    model.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(kept, strict=False)


def heads_alone(trainer: Trainer, module: LitCLIP) -> dict[str, Tensor]:
    """Return the weights from training the heads of two encoders alone; empty for other models."""
    heads, data = heads_of(module.model), cast(Any, trainer).datamodule
    if heads is None:
        return {}

    def features(epoch: int) -> PairFeatures:
        batches = map(trainer.strategy.batch_to_device, data.training_once(STORED, DECODED, epoch))
        return features_before_heads(module.model, batches, heads, texts=not epoch)

    first, stored = features(0), data.stored_images
    versions = versions_of(len(first.keys), stored.rows.versions if stored and stored.stored else 1)
    more = [features(epoch).image for epoch in range(1, versions)]
    return train_heads(module.model, heads, first, more, data.seed)


def _recommended_weights(trainer: Trainer, module: LitCLIP) -> dict[str, Tensor]:
    """Return the weights that the run recommends; empty if the model already has them."""
    file = recommended(trainer, module)
    if distributed.maximum(int(file is None or not file.is_file())):
        return {}
    return read_mapped(cast(Path, file))["state_dict"]


def _add_images(examples: list[dict[str, Any]], source: Any) -> None:
    """Add small copies of the images to the examples, by their keys."""
    wanted = {each["key"]: each for each in examples}
    for row in range(len(source)) if wanted else ():
        try:
            each = wanted.pop(source.text(row, None).key, None)
            if each is not None:
                each["image"] = thumbnail(source.load(row, None).image)
        except BadSample:
            continue
    for each in examples:
        each.setdefault("image", "")
