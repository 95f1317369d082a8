"""Train two pretrained encoders on pairs of one's own within some minutes."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from rich.table import Table

from lit_clip.embedding.precision import Precision
from lit_clip.errors import InputError, require
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.recipes.head_search import Speed, Trial, gentlest, measure, sample_of, try_heads
from lit_clip.recipes.recipe import Choice, Facts, Recipe, Run
from lit_clip.tools.console import Console, duration
from lit_clip.tools.hardware import best_device, computes_in_bfloat16
from lit_clip.tools.untrusted import coerced

LEVELS = [Freeze(UnlockLast(image), UnlockLast(text), batch_norm=True) for image, text in ((4, 1), (2, 1), (0, 0))]
RATES = (3e-4, 1e-3, 3e-3)
BATCHES = (16, 32, 64, 256, 1024)
PAIRS_SEEN, FEWEST_EPOCHS, MOST_EPOCHS = 60_000, 3, 40
MOST_VERSIONS = 8  # augmented, of each image
FEWEST_STEPS = 120  # of a run, if a batch that was tried allows it
SHARE, SEARCH = 0.85, 0.15  # of the time: to plan with, and to search in at most
START, EPOCH = 15.0, 2.0  # seconds of a run before its first step, and of an epoch's validation and checkpoints


class Plan(NamedTuple):
    """How much is trained, and how long it takes."""

    freeze: Freeze
    versions: int
    epochs: int
    encoding: float  # seconds
    training: float  # seconds
    fits: bool  # into the time


Levels = Sequence[tuple[Freeze, Speed]]
POSITIVES = {"class_path": "lit_clip.losses.Contrastive", "init_args": {"duplicates": "positives"}}


class PretrainedEncoders(Recipe):
    """Train the heads of two pretrained encoders, and their last blocks if there is time, on stored features.

    The heads alone are trained on a part of the images for seconds with several batches and learning rates. Of those
    whose recall on the other images is within a standard error of the best, the largest batch and then the smallest
    rate are chosen. Number of trainable blocks, augmented versions of each image and epochs are the largest that the
    measured speed allows. Not for encoders without frozen layers.

    Args:
        minutes: of the whole command, on this machine; training ends when they are over.
    """

    measures = True

    def __init__(self, minutes: float = 10.0) -> None:
        require(minutes > 0, f"recipe.minutes: {minutes:g} must be above 0")
        self.minutes = minutes

    def choose(self, run: Run) -> list[Choice]:
        facts, module, data = run.facts, run.module, run.data
        require(facts.pairs >= 8, f"recipe: {facts.pairs} pairs are too few to train on; add some")
        data.preprocessing, data.tokenize = module.preprocessing, module.tokenize
        device = torch.device("cpu") if run.given.get("trainer.accelerator") == "cpu" else best_device()
        precision: Precision = "bf16-mixed" if computes_in_bfloat16(device.type) else "32-true"
        module.to(device)
        seconds = 60 * self.minutes
        augmented = data.augmentation != []
        trials = self._search(run, precision, seconds * SEARCH)
        speeds = [(freeze, measure(module, data, precision, freeze, augmented)) for freeze in _levels(run)]
        left = SHARE * seconds - run.seconds() - START
        plan = plan_for(facts, speeds, left, augmented)
        if plan.encoding + plan.training > left + (1 - SHARE) * seconds:
            raise InputError(too_short(self.minutes, run.seconds() + START, plan, facts))
        long = [trial for trial in trials if plan.epochs * (facts.pairs // trial.batch) >= FEWEST_STEPS]
        best = gentlest(long or trials or [Trial(_batches(facts)[-1], RATES[1], 0.0, 0, 0.0)])
        batch = run.divisible(best.batch)
        steps = plan.epochs * run.steps_per_epoch(run.given_batch or batch)
        tried = f"gentlest of the best of {len(trials)} tried" if trials else "not searched"
        limit = max(60, int(left + (1 - SHARE) * seconds - plan.encoding))
        whole = f"{self.minutes:g} minutes in all"
        encoded, trained = f"encoded in {_told(plan.encoding)}", f"trained in {_told(plan.training)}"
        return [
            Choice("data.global_batch_size", batch, tried, ("data.batch_size",)),
            Choice("model.optimizer.lr", best.rate, tried),
            Choice("model.lr_scheduler.warmup_steps", max(1, steps // 10), f"a tenth of {steps:,} steps"),
            Choice("model.freeze", asdict(plan.freeze), "last blocks for which there is time"),
            Choice("model.loss", POSITIVES, "equal captions are no negatives of each other"),
            Choice("trainer.callbacks.FrozenFeatures.augmentations", plan.versions, encoded),
            Choice("trainer.max_epochs", plan.epochs, trained, ("trainer.max_steps",)),
            Choice("trainer.max_time", f"00:{duration(limit).zfill(8)}", whole),
        ]

    def _search(self, run: Run, precision: Precision, seconds: float) -> list[Trial]:
        settings = [(batch, rate) for batch in _batches(run.facts) for rate in RATES]
        sample = sample_of(run.module, run.data, precision, seconds / 2, run.seed)
        if sample is None:
            return []
        trials = try_heads(run.module.model, sample, settings, 120, seconds / 2, run.seed)
        table = Table(title=f"Heads trained for 120 steps on {2 * len(sample.image) // 3} images, judged by the others")
        for column in ("pairs per step", "learning rate", "recall@1", "seconds"):
            table.add_column(column, justify="right")
        for trial in trials:
            table.add_row(f"{trial.batch:,}", f"{trial.rate:g}", f"{100 * trial.recall:.1f} %", f"{trial.seconds:.1f}")
        Console().print(table)
        return trials


def _levels(run: Run) -> Sequence[Freeze]:
    """Return what to freeze, to choose from; as set, if the user has set it."""
    if not run.is_given("model.freeze"):
        return LEVELS
    return [coerced(Freeze, run.module.hparams["freeze"], "model.freeze") or Freeze()]


def _batches(facts: Facts) -> list[int]:
    """Return the batches to try: an epoch has at least three steps."""
    return [batch for batch in BATCHES if 3 * batch <= facts.pairs][-2:] or [max(2, facts.pairs // 3)]


def plan_for(facts: Facts, speeds: Levels, seconds: float, augmented: bool = True) -> Plan:
    """Return the most trainable blocks, then epochs and augmented versions, that fit into a time.

    Of ``speeds``, with the most trainable blocks first, the first is taken of which a third of the epochs fits. If
    nothing fits it is the smallest.
    """
    wanted = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(PAIRS_SEEN / facts.pairs)))
    validated = facts.validation * facts.images / facts.pairs

    def planned(level: tuple[Freeze, Speed], versions: int, epochs: int) -> Plan:
        freeze, speed = level
        versions = max(1, min(versions, round(epochs * facts.captions_per_image)))
        encoding = (facts.images * versions + validated) * speed.image + facts.captions * speed.text
        training = epochs * (facts.pairs * speed.step + EPOCH)
        return Plan(freeze, versions if augmented else 0, epochs, encoding, training, encoding + training <= seconds)

    least = max(1, wanted // 3)
    level = next((each for each in speeds if planned(each, 1, least).fits), speeds[-1])
    most = MOST_VERSIONS if augmented else 1
    sizes = [
        *((1, epochs) for epochs in range(1, max(2, least))),
        (1, least),
        *((2, epochs) for epochs in range(least, wanted)),
        *((n, wanted) for n in range(2, MOST_VERSIONS + 1)),
    ]
    plans = [planned(level, min(versions, most), epochs) for versions, epochs in sizes]
    return next((plan for plan in reversed(plans) if plan.fits), plans[0])


def too_short(minutes: float, used: float, plan: Plan, facts: Facts) -> str:
    """Return what a time lacks of which so many seconds are used; the plan is the smallest there is."""
    whole = used + plan.encoding + plan.training
    needed = math.ceil((whole / 60 - SEARCH * minutes) / (1 - SEARCH))  # with more time the search takes more
    return (
        f"recipe.minutes: {used / 60:.1f} of {minutes:g} are used by the start and the search, and {facts.images:,} "
        f"images and {facts.captions:,} captions take {_told(plan.encoding + plan.training)} more on this machine; "
        f"give {max(needed, math.floor(minutes) + 1)}, or fewer pairs"
    )


def _told(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.1f} minutes"
