"""Recipes that depend on the number of training pairs: fine-tune a model, or train one from scratch.

Each is a table whose rows docs/evidence/recipes.md measured, up to 3,000 pairs for fine-tuning and 50,000 from scratch;
the rows behind them come from the paper's rates, and say so.
"""

import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.recipes.recipe import POSITIVES, Choice, Recipe, Run

FEWEST_STEPS = 150  # of a run, of which a tenth is warm-up: 100 steps and more have the full rate
WARMUP, LONGEST_WARMUP = 0.1, 2_000  # share of the run, and steps (the paper's table 18)
VALIDATIONS = 10  # of a run, and fewer than twice as many: with small data one takes longer than an epoch
EPOCHS = ("trainer.max_epochs", "trainer.max_steps")


class Row(NamedTuple):
    """Settings for fewer training pairs than a limit."""

    below: float
    batch: int  # pairs per step on all ranks
    epochs: int  # more of them, if a run had fewer than FEWEST_STEPS
    rate: float
    source: str = "measured"  # of the row


FINE_TUNING = (
    Row(250, 32, 30, 3e-4),
    Row(1_000, 64, 20, 3e-4),
    Row(10_000, 128, 10, 3e-4),
    Row(100_000, 256, 5, 1e-4, "not measured"),
    Row(1_000_000, 256, 2, 3e-5, "not measured"),
    Row(math.inf, 256, 1, 1e-5, "half the paper's rate for one more epoch"),
)
FROM_SCRATCH = (
    Row(250, 32, 60, 1e-3),
    Row(1_000, 64, 60, 1e-3),
    Row(2_000, 128, 50, 1e-3),
    Row(10_000, 256, 50, 1e-3),
    Row(100_000, 256, 25, 1e-3),
    Row(1_000_000, 256, 10, 1e-3, "not measured"),
    Row(math.inf, 256, 10, 5e-4, "the paper's rate"),
)


class Sizes(NamedTuple):
    """Settings of a run."""

    batch: int
    epochs: int
    every: int  # epochs between two validations
    steps: int
    warmup: int
    rate: float
    source: str


def sizes(
    pairs: int,
    rows: Sequence[Row],
    batch: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    per_epoch: int | None = None,
) -> Sizes:
    """Return the settings for a number of training pairs; given settings stay as they are.

    ``per_epoch`` are the steps of an epoch, if they are fewer than the batches that there are pairs for.
    A batch is never larger than the data, and a run has at least :data:`FEWEST_STEPS` steps and a validation at its
    end, unless epochs are given.
    """
    row = next(each for each in rows if pairs < each.below)
    batch = max(1, min(row.batch, pairs)) if batch is None else batch
    per_epoch = per_epoch or max(1, pairs // batch)
    every = 1
    if epochs is None:
        epochs = max(row.epochs, math.ceil(FEWEST_STEPS / per_epoch))
        every = max(1, epochs // VALIDATIONS)
        epochs = math.ceil(epochs / every) * every
    steps = epochs * per_epoch if steps is None else steps
    return Sizes(batch, epochs, every, steps, min(LONGEST_WARMUP, round(WARMUP * steps)), row.rate, row.source)


class FineTuning(Recipe):
    """Fine-tune a pretrained model on any number of pairs: with fewer pairs, smaller batches and more epochs.

    Where captions or images repeat, equal ones are no negatives of each other; BatchNorm keeps its statistics.
    """

    def choose(self, run: Run) -> list[Choice]:
        model = run.module.model
        choices = _choices(run, FINE_TUNING)
        if any(isinstance(layer, _BatchNorm) for layer in model.modules()):
            choices.append(Choice("model.freeze.batch_norm", True, "its statistics stay those of pretraining"))
        if model.logit_bias is None:  # of a SigLIP the loss is the sigmoid's
            choices += _duplicates(run)
        return choices


class FromScratch(Recipe):
    """Train a model from scratch on any number of pairs; with pretrained weights, choose as FineTuning does."""

    def choose_without_pairs(self, run: Run) -> list[Choice]:
        rate = 1e-4 if run.given.get("model.pretrained") is not None else 1e-3
        why = "the number of pairs is not known"
        return [
            Choice("trainer.max_epochs", 25, why, ("trainer.max_steps", "trainer.max_time")),
            Choice("model.lr_scheduler.warmup_steps", 50, why, ("model.lr_scheduler.class_path",)),
            Choice("model.optimizer.lr", rate, why, ("model.optimizer.class_path",)),
        ]

    def choose(self, run: Run) -> list[Choice]:
        if run.given.get("model.pretrained") is not None:
            return FineTuning().choose(run)
        return [*_choices(run, FROM_SCRATCH), *_duplicates(run)]


def _choices(run: Run, rows: Sequence[Row]) -> list[Choice]:
    """Return the choices that follow from the number of pairs, and from given batch, epochs and steps."""
    pairs = run.facts.pairs
    batch = run.given_batch
    takes_batch = "global_batch_size" in inspect.signature(type(run.data)).parameters
    if batch is None and not takes_batch:  # a data module of one's own
        whole = getattr(run.data, "batch_size", 0) is None  # then it is divided among the ranks
        batch = run.data.train_batch_size * (1 if whole else run.world)
    batch = batch or run.divisible(sizes(pairs, rows).batch)
    limits = (run.count("trainer.max_epochs"), run.count("trainer.max_steps"))
    found = sizes(pairs, rows, batch, *limits, run.steps_per_epoch(batch))
    schedule, optimizer = ("model.lr_scheduler.class_path",), ("model.optimizer.class_path",)
    of_data = Choice("data.global_batch_size", found.batch, f"of {pairs:,} pairs", ("data.batch_size",))
    return [
        *([of_data] if takes_batch else []),
        Choice("trainer.max_epochs", found.epochs, f"{found.steps:,} steps", EPOCHS[1:]),
        Choice(
            "trainer.check_val_every_n_epoch",
            found.every,
            "about ten validations",
            (*EPOCHS, "trainer.val_check_interval"),
        ),
        Choice("model.lr_scheduler.warmup_steps", found.warmup, f"a tenth of {found.steps:,} steps", schedule),
        Choice("model.optimizer.lr", found.rate, f"for {pairs:,} pairs: {found.source}", optimizer),
    ]


def _duplicates(run: Run) -> list[Choice]:
    facts = run.facts
    if min(facts.captions, facts.images) >= facts.pairs and run.per_image != "together":
        return []
    repeated = f"{facts.pairs:,} pairs have {facts.captions:,} captions and {facts.images:,} images"
    return [Choice("model.loss", POSITIVES, repeated)]
