"""The plan of a run as a table, with what contradicts itself in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_clip.tools.console import Console
from lit_clip.tools.parts import shown
from lit_clip.tools.weight_files import read_mapped
from lit_clip.training.checks import check_counts, contradictions
from lit_clip.training.lightning.loop_counts import resumed_counts
from lit_clip.training.lightning.resume_checks import check_restorable
from lit_clip.training.plan import RunPlan, measure_run
from lit_clip.training.summary import print_trained

SEVERAL = 2  # rows of an image, on average
FEW_PAIRS = 3_500  # docs/evidence/recipes.md: pretrained encoders were measured with up to 3,068 pairs,
SMALL_DATA = 60_000  # training from scratch with up to 50,000;
MANY_EPOCHS = 16_000  # between 5,000 and 50,000, of which 65 and 12 epochs were the most that were measured
BATCH_MATTERS = 2_000  # with 5,000 and 50,000 256 pairs a step were best, with 500 the batch hardly mattered


def print_plan_of(trainer: Any, module: Any, data: Any, resumed: str | None = None) -> None:
    """Print the plan as the start of a run does, or of one ``resumed`` from a checkpoint, and start no processes."""
    check_counts(trainer)
    trainer.datamodule, data.trainer = data, trainer  # as fit does
    trainer.strategy.connect(module)
    data.prepare_data()
    data.setup("fit")
    for callback in (each for each in trainer.callbacks if getattr(each, "changes_model", False)):
        callback.setup(trainer, module, "fit")
    if resumed:
        checkpoint = {**read_mapped(Path(resumed)), "callbacks": {}}  # whose folders are not known yet
        check_restorable(checkpoint, trainer, resumed)
        module.resumed_after = resumed_counts(checkpoint, None)
    if trainer.is_global_zero:
        print_plan(measure_run(module, trainer))
        if fine_tunes(module.hparams):
            print_trained(module.optimization.groups(module), module.model)


def fine_tunes(settings: Mapping[str, Any]) -> bool:
    """Return whether a run's parts are trained in different ways."""
    return any(settings.get(name) for name in ("freeze", "rates", "lora"))


def print_plan(plan: RunPlan) -> None:
    """Print the table, and below it the contradictions."""
    table = Table(title="Plan", show_header=False)
    for row in plan_rows(plan):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for sentence in contradictions(plan) if not plan.trial else ():
        console.print(f"warning: {sentence}", style="yellow", soft_wrap=True)


def plan_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """Return the rows of the plan's table."""
    rows = [("parameters", f"{plan.trainable:,} trainable, {plan.frozen:,} frozen")]
    forward, training = plan.forward_flops, plan.training_flops
    if forward is not None and training is not None:
        work = f"{_short(forward)} forward, {_short(training)} in training ({plan.passes:g} x); texts of full length"
        rows.append(("FLOPs per pair", work))
    else:
        rows.append(("FLOPs per pair", "unknown; an encoder cannot be counted"))
    kept = "weights, gradients, moments" if plan.moments is not None else "weights, gradients"
    several = plan.world > 1
    rows.append((kept, _bytes(plan.state_bytes) + " on each rank without sharding" * several))
    if plan.loss_bytes is not None:
        tiled, dense = plan.loss_bytes
        # For a small batch the matrix is smaller.
        instead = f" (with a similarity matrix: {_bytes(dense)})" if dense > tiled else ""
        rows.append(("memory of the loss", _bytes(tiled) + " on each rank" * several + instead))
        rows.append((f"{_unit(plan)} per step", _pairs_a_step(plan)))
    if plan.steps is not None:
        rows.append(("steps", f"{plan.steps:,}, {plan.steps_per_epoch:,} per epoch"))
    if plan.steps is not None and plan.warmup is not None:
        of_run = "longer than the run" if plan.warmup > plan.steps else f"{plan.warmup / plan.steps:.1%} of the run"
        rows.append(("warm-up", f"{plan.warmup:,} step{'s' * (plan.warmup != 1)}, {of_run}"))
    if plan.steps is not None and plan.global_batch is not None:
        rows.append((f"{_unit(plan)} seen", f"{plan.steps * plan.global_batch:,}" + _left_out(plan)))
    if (plan.rows_per_image or 0) >= SEVERAL:
        rows.append(("captions", _several_captions(plan)))
    if (
        plan.pairs is not None
        and plan.pairs <= SMALL_DATA
        and not (plan.pretrained or plan.pretrained_encoders or plan.frozen)
    ):
        rows.append((f"training {_unit(plan)}", _small_data(plan.pairs)))
    rows.append(("loss", shown(plan.loss)))
    rows.append(("optimiser", shown(plan.optimizer)))
    rows.append(("schedule", shown(plan.lr_scheduler)))
    return rows


def _pairs_a_step(plan: RunPlan) -> str:
    nodes = f" x {plan.nodes} nodes" if plan.nodes > 1 else ""
    ranks = f" = {plan.batch:,} x {plan.devices} ranks{nodes}" if plan.world > 1 else ""
    parts = f", encoded in {plan.parts} micro-batches" if plan.parts > 1 else ""
    captions = f", each with all of its {plan.captions:.2g} captions on average" if plan.captions > 1 else ""
    return f"{plan.global_batch:,}{ranks}{captions}{parts}"


def _unit(plan: RunPlan) -> str:
    return "images" if plan.captions > 1 else "pairs"


def _left_out(plan: RunPlan) -> str:
    if plan.pairs is None or not plan.global_batch or plan.steps_per_epoch != plan.pairs // plan.global_batch:
        return ""
    return f"; {plan.pairs % plan.global_batch:,} of {plan.pairs:,} are left out of an epoch"


def _several_captions(plan: RunPlan) -> str:
    times = f"{plan.rows_per_image:.2g}"
    return (
        f"{times} of each image on average, so an epoch passes it {times} times; --data.captions.per_image one passes "
        "it once, in each epoch with another caption, and together once with all of them"
    )


def _small_data(pairs: int) -> str:
    few = " are few: pretrained encoders name new images far better (docs/encoders.md)" if pairs <= FEW_PAIRS else ""
    batch = "with 256 pairs a step " if pairs >= BATCH_MATTERS else ""
    how = f"{batch}at a rate of 1e-3 in {12 if pairs > MANY_EPOCHS else 65} epochs or more"
    return f"{pairs:,}{few}; from scratch RN-tiny-64 learned most, {how} (docs/evidence/recipes.md)"


def _short(number: float) -> str:
    return _scaled(number, 1000, ["", "k", "M", "G", "T"])


def _bytes(number: float) -> str:
    return _scaled(number, 1024, ["bytes", "KiB", "MiB", "GiB"])


def _scaled(number: float, base: int, units: list[str]) -> str:
    while number >= base and len(units) > 1:
        number, units = number / base, units[1:]
    return f"{number:.3g} {units[0]}".strip()
