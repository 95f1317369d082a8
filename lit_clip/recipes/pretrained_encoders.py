"""Train two pretrained encoders on your own pairs within some minutes."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple, cast

import torch

from lit_clip.errors import InputError, require
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.models.layers import layer_groups
from lit_clip.recipes.recipe import POSITIVES, Choice, Facts, Recipe, Run
from lit_clip.recipes.speed import Speed, measure
from lit_clip.retrieval.retrieval_set import are_kinds
from lit_clip.tools.console import duration
from lit_clip.tools.hardware import Precision, best_device, computes_in_bfloat16, keep_freed_memory
from lit_clip.tools.untrusted import from_plain
from lit_clip.training.frozen_features import versions_of

LEVELS = [Freeze(UnlockLast(image), UnlockLast(text), batch_norm=True) for image, text in ((4, 1), (2, 1), (0, 0))]
DEEP = Freeze(UnlockLast(7), UnlockLast(1), batch_norm=True)  # for names of kinds, if there is time for all steps
MOST_VERSIONS = 8  # augmented, of each image
VALIDATIONS = 6  # of a run
LEAST = 40  # steps for which blocks are trained: fewer only move what the heads alone have found
SHARE = 0.9  # of the time, to plan with
# Seconds of a run before its first step, of a validation and its checkpoints, and of the heads alone (callbacks.Proof).
START, VALIDATION, HEADS = 15.0, 2.0, 20.0
EPOCHS, OPTIMIZER = ("trainer.max_epochs",), ("model.optimizer.class_path",)
SCHEDULE = ("model.lr_scheduler.class_path",)


class Rule(NamedTuple):
    """Settings for one kind of captions; docs/evidence/recipes.md has the measurements."""

    captions: str
    batch: int  # samples of a step on all ranks, if there are four times as many
    rate: float
    seen: int  # samples in all, but each at least and at most so many times
    fewest: int
    most: int


# Of names of kinds there are few, each of many images; a sentence is of one image or of few.
KINDS = Rule("names of kinds", 64, 3e-4, 60_000, 3, 80)
SENTENCES = Rule("sentences", 192, 1e-3, 60_000, 10, 20)


class Work(NamedTuple):
    """Samples of an epoch: images, each with its captions."""

    samples: int
    captions: float  # of a sample
    batch: int  # samples
    steps: int  # of a run, if there is time
    least: int  # steps for which blocks are trained


class Plan(NamedTuple):
    """Amount of training, and the time that it takes."""

    freeze: Freeze
    versions: int
    steps: int
    encoding: float  # seconds
    training: float  # seconds
    fits: bool  # into the time


class PretrainedEncoders(Recipe):
    """Train the heads of two pretrained encoders, and last blocks if time allows, on stored features.

    Batch and learning rate follow a rule: :data:`KINDS` where images share few captions, otherwise :data:`SENTENCES`.
    All captions of an image are in one step. Number of trainable blocks, steps and augmented versions of each image
    are the largest that the measured speed allows, up to the rule's. Not for encoders without frozen layers.

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
        data.adopt(module)
        device = torch.device("cpu") if run.given.get("trainer.accelerator") == "cpu" else best_device()
        precision: Precision = "bf16-mixed" if computes_in_bfloat16(device.type) else "32-true"
        module.to(device)
        keep_freed_memory(device)  # as the run does, which is several times faster by it
        seconds = 60 * self.minutes
        augmented = data.augmentation != []
        rule, together = rule_for(facts), together_for(run)
        work = work_for(facts, rule, together, run.given_batch)
        work = work._replace(batch=run.given_batch or run.divisible(work.batch))
        levels = _levels(run, rule)
        speeds = [(freeze, measure(module, data, precision, freeze, augmented)) for freeze in levels]
        left = SHARE * seconds - run.seconds() - START
        plan = plan_for(facts, work, speeds, left, augmented)
        if plan.encoding + plan.training > left + (1 - SHARE) * seconds:
            raise InputError(too_short(self.minutes, run.seconds() + START, plan, facts))
        limit = max(60, int(left + (1 - SHARE) * seconds - plan.encoding))
        encoded, trained = f"encoded in {_told(plan.encoding)}", f"trained in {_told(plan.training)}"
        every = max(1, plan.steps // VALIDATIONS)
        steps = plan.steps // every * every  # a validation, and what is saved after it, are at the end
        passes = steps * work.batch / work.samples
        step = Choice("data.captions.per_image", "together", f"{work.captions:.1f} captions an image")
        return [
            *([step] if together and not run.is_given("data.captions.per_image") else []),
            Choice("data.global_batch_size", work.batch, f"captions are {rule.captions}", ("data.batch_size",)),
            Choice("model.optimizer.lr", rule.rate, f"captions are {rule.captions}", OPTIMIZER),
            Choice("model.lr_scheduler.warmup_steps", max(1, steps // 10), f"a tenth of {steps:,} steps", SCHEDULE),
            Choice("model.freeze", asdict(plan.freeze), "as many last blocks as there is time for"),
            Choice("model.loss", POSITIVES, "equal captions are no negatives of each other"),
            Choice("trainer.callbacks.FrozenFeatures.augmentations", plan.versions, encoded),
            Choice("trainer.max_steps", steps, f"{passes:.1f} times each image, {trained}", EPOCHS),
            Choice("trainer.val_check_interval", every, f"{steps // every} validations", EPOCHS),
            Choice("trainer.check_val_every_n_epoch", None, "validations are counted in steps", EPOCHS),
            Choice("trainer.max_time", f"00:{duration(limit).zfill(8)}", f"{self.minutes:g} minutes in all"),
        ]


def _levels(run: Run, rule: Rule) -> Sequence[Freeze]:
    """Return the levels of freezing to choose from, the deepest first; only the user's, if one is set."""
    if run.is_given("model.freeze"):
        return [from_plain(Freeze, run.module.hparams["freeze"] or {}, "model.freeze")]
    blocks = sum(group.name.startswith("blocks.") for group in layer_groups(run.module.model, "image"))
    deep = rule is KINDS and blocks > cast(UnlockLast, DEEP.image).unlock_last
    return [DEEP, *LEVELS] if deep else LEVELS


def rule_for(facts: Facts) -> Rule:
    """Return the rule for captions."""
    return KINDS if are_kinds(facts.captions, facts.pairs) else SENTENCES


def together_for(run: Run) -> bool:
    """Return whether a step has all captions of an image: if images have several, and no given setting forbids it."""
    if run.is_given("data.captions.per_image"):
        return run.per_image == "together"
    one_caption = run.given.get("data.images.per_thing") in ("two", "together")
    listed = run.data.lists_captions and not one_caption and not run.is_given("model.loss")
    return listed and run.data.captions_if_together >= 1.5


def work_for(facts: Facts, rule: Rule, together: bool, batch: int | None = None) -> Work:
    """Return the training work of a run with enough time."""
    samples = facts.images if together else facts.pairs
    captions = max(facts.pairs, facts.captions) / facts.images if together else 1.0
    batch = batch or max(2, min(rule.batch, samples // 4))
    seen = min(rule.most * samples, max(rule.fewest * samples, rule.seen))
    least = max(LEAST, math.ceil(rule.fewest * samples / batch)) if rule is KINDS else LEAST  # else not measured
    return Work(samples, captions, batch, math.ceil(seen / batch), least)


def plan_for(
    facts: Facts, work: Work, speeds: Sequence[tuple[Freeze, Speed]], seconds: float, augmented: bool = True
) -> Plan:
    """Return the plan that fits a time with most trainable blocks, then most steps and augmented versions.

    Of ``speeds``, with the most trainable blocks first, the first is taken for which the least steps fit; for
    :data:`DEEP` all steps must. If nothing fits the plan is the smallest.
    """
    validated = facts.validation * facts.images / facts.pairs
    least = min(work.steps, work.least)

    def planned(level: tuple[Freeze, Speed], versions: int, fewest: int) -> Plan:
        """Return the plan with this number of versions and as many steps as fit, at least ``fewest``."""
        freeze, speed = level
        encoding = (facts.images * versions + validated) * speed.image + facts.captions * speed.text
        step = work.batch * (speed.image_step + work.captions * speed.text_step)
        seen = facts.images * versions_of(facts.images, versions)
        heads = seen * speed.image_step + max(facts.pairs, facts.captions) * speed.text_step
        forward = validated * speed.image_step + facts.validation * speed.text_step
        # A step has a backward pass, of twice the work; callbacks.Proof validates at the start and the end.
        fixed = HEADS + heads / 3 + (VALIDATIONS + 2) * (VALIDATION + forward / 3)
        steps = max(fewest, min(work.steps, int((seconds - encoding - fixed) / step)))
        training = steps * step + fixed
        return Plan(freeze, versions if augmented else 0, steps, encoding, training, encoding + training <= seconds)

    def fits(level: tuple[Freeze, Speed]) -> bool:
        return planned(level, 1, work.steps if level[0] is DEEP else least).fits

    level = next(filter(fits, speeds), speeds[-1])
    passes = max(1, work.steps * work.batch // work.samples)
    for versions in range(min(MOST_VERSIONS, passes) if augmented else 1, 1, -1):
        wanted = max(2, versions_of(facts.images, versions))  # rather than steps
        plan = planned(level, versions, work.steps if versions > wanted else least)
        if plan.fits:
            return plan
    return planned(level, 1, 1)


def too_short(minutes: float, used: float, plan: Plan, facts: Facts) -> str:
    """Return a message about the missing time, after ``used`` seconds; the plan is the smallest one."""
    needed = (used + plan.encoding + plan.training) / 60
    return (
        f"recipe.minutes: {used / 60:.1f} of {minutes:g} are used by the start, and {facts.images:,} images and "
        f"{facts.captions:,} captions take {_told(plan.encoding + plan.training)} more on this machine; "
        f"give {max(math.ceil(needed), math.floor(minutes) + 1)}, or fewer pairs"
    )


def _told(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.1f} minutes"
