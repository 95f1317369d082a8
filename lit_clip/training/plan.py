"""What the terminal shows before and after a run: its plan, contradictions in its settings, and how to go on."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.models.flops import forward_flops
from lit_clip.models.layers import SCALARS, TOWERS, tower_blocks, tower_parameters
from lit_clip.models.lora import is_added
from lit_clip.tools.console import Console, plural
from lit_clip.tools.parts import Description, shown
from lit_clip.tools.weight_files import read_mapped
from lit_clip.training.activation_checkpointing import is_checkpointed
from lit_clip.training.checks import check_counts, check_parts, check_run
from lit_clip.training.lightning.loop_counts import resumed_counts
from lit_clip.training.lightning.resume_checks import check_restorable
from lit_clip.training.lightning.run_folder import newest_config, shown_path
from lit_clip.training.optimizers import state_per_weight
from lit_clip.training.schedules import batches_per_epoch, resumed_after, total_steps

FEW_FOR_BATCH_NORM = 16
FEW_STEPS = 100  # after a warm-up


class Work(NamedTuple):
    """Cost of one encoder."""

    forward: int | None  # FLOPs of one sample; None if they cannot be counted
    trainable: bool  # any of its parameters


@dataclass
class RunPlan:
    """A run in numbers; None for a number that is unknown before the start."""

    trainable: int  # number of parameters
    frozen: int
    image: Work
    text: Work  # for a text of full length
    batch_norm: bool  # whether an encoder updates its statistics
    devices: int  # ranks on each node
    nodes: int
    batch: int | None  # pairs per step on each rank
    micro_batch: int | None  # pairs encoded at once, as set
    checkpointed: float  # share of the blocks that compute their activations again
    steps_per_epoch: int | None
    steps: int | None  # of the whole run
    warmup: int | None  # steps; None for a schedule without that setting
    parts: dict[str, Description]  # optimizer, lr_scheduler and loss
    moments: int | None  # numbers that the optimiser keeps for each weight
    max_steps: int | None  # as set
    max_epochs: int | None
    trial: bool = False  # a fast_dev_run, whose settings need not agree
    captions: float = 1.0  # of an image in a step, on average; above 1 the numbers of pairs here are those of images

    @property
    def world(self) -> int:
        """World size."""
        return self.devices * self.nodes

    @property
    def global_batch(self) -> int | None:
        """Pairs per step over all ranks."""
        return self.batch and self.batch * self.world

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step."""
        return math.ceil(self.batch * self.captions / self.micro_batch) if self.batch and self.micro_batch else 1

    @property
    def passes(self) -> float:
        """Cost of a trainable encoder's step in forward passes: 1, 2 for the gradients, and recomputation.

        All micro-batches but the last are computed twice, and a checkpointed block once more.
        """
        return 3 + (self.micro_batches - 1) / self.micro_batches + self.checkpointed

    @property
    def flops(self) -> tuple[float, float] | None:
        """Forward and training FLOPs of one pair; the captions of an image share its cost.

        In training a frozen encoder costs its forward pass, and a partly frozen one counts in full.
        """
        if self.image.forward is None or self.text.forward is None:
            return None
        image, text = self.image.forward / self.captions, self.text.forward
        of_image, of_text = (self.passes if work.trainable else 1 for work in (self.image, self.text))
        return image + text, image * of_image + text * of_text

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and the optimiser's moments in float32."""
        return 4 * (self.frozen + self.trainable) + 4 * (1 + (self.moments or 0)) * self.trainable


def measure_run(module: Any, trainer: Trainer) -> RunPlan:
    """Return the plan of a :class:`lit_clip.LitCLIP` and its trainer; the data module must be set up.

    To be called before the strategy wraps the module: the sizes of shards say nothing.
    """
    data: Any = getattr(trainer, "datamodule", None)
    per_epoch = batches_per_epoch(trainer)
    hparams, parts, model = module.hparams, module.parts, module.model
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    blocks = [block for tower in TOWERS for block in tower_blocks(model, tower)]
    norms = (layer for layer in model.modules() if isinstance(layer, _BatchNorm))
    return RunPlan(
        trainable=sum(size for size, trainable in sizes if trainable),
        frozen=sum(size for size, trainable in sizes if not trainable),
        **dict(zip(TOWERS, tower_work(model), strict=True)),
        batch_norm=any(layer.training for layer in norms),
        devices=trainer.num_devices,
        nodes=trainer.num_nodes,
        batch=getattr(data, "train_batch_size", None),
        micro_batch=hparams.micro_batch_size,
        checkpointed=sum(map(is_checkpointed, blocks)) / len(blocks),
        steps_per_epoch=per_epoch,
        trial=bool(getattr(trainer, "fast_dev_run", False)),
        steps=None if per_epoch is None else total_steps(trainer, *resumed_after(trainer)),
        warmup=parts["lr_scheduler"]["init_args"].get("warmup_steps"),
        parts=parts,
        moments=state_per_weight(module.optimization.optimizer),
        max_steps=trainer.max_steps if trainer.max_steps >= 0 else None,
        max_epochs=trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None,
        captions=getattr(data, "captions_per_image", 1.0),
    )


def tower_work(model: Any) -> tuple[Work, Work]:
    """Return the costs of the image encoder and the text encoder."""
    images, texts = torch.zeros(1, *model.preprocessing.shape), torch.full((1, model.context_length), 5)  # no padding
    flops = [forward_flops(tower, x) for tower, x in ((model.visual, images), (model.text_encoder, texts))]
    trainable = [any(p.requires_grad for p in tower_parameters(model, tower).values()) for tower in TOWERS]
    image, text = (Work(*both) for both in zip(flops, trainable, strict=True))
    return image, text


def print_plan_of(trainer: Any, module: Any, data: Any, resumed: str | None = None) -> None:
    """Print the plan as at the start of a run, or of one ``resumed`` from a checkpoint; start no processes.

    What ``fit`` refuses before its first step is refused.
    """
    check_parts(trainer)
    check_counts(trainer)
    trainer.datamodule, data.trainer, module.trainer = data, trainer, trainer  # as fit does
    trainer.strategy.connect(module)
    data.prepare_data()
    data.setup("fit")
    for callback in (each for each in trainer.callbacks if getattr(each, "changes_model", False)):
        callback.setup(trainer, module, "fit")
    if resumed:
        checkpoint = {**read_mapped(Path(resumed)), "callbacks": {}}  # whose folders are not known yet
        check_restorable(checkpoint, trainer, resumed)
        module.resumed_after = resumed_counts(checkpoint, None)
    trainer.precision_plugin.convert_module(module)
    check_run(module)
    if trainer.is_global_zero:
        print_plan(measure_run(module, trainer))
        if fine_tunes(module.hparams):
            print_trained(module.optimization.groups(module), module.model)


def fine_tunes(settings: Mapping[str, Any]) -> bool:
    """Return whether a run trains its parts in different ways."""
    return any(settings.get(name) for name in ("freeze", "rates", "lora"))


def print_plan(plan: RunPlan) -> None:
    """Print the table, then the contradictions."""
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
    work = "unknown; an encoder cannot be counted"
    if plan.flops is not None:
        forward, training = (_scaled(number, 1000, ["", "k", "M", "G", "T"]) for number in plan.flops)
        work = f"{forward} forward, {training} in training ({plan.passes:g} x); texts of full length"
    rows.append(("FLOPs per pair", work))
    kept = "weights, gradients, moments" if plan.moments is not None else "weights, gradients"
    state = _bytes(plan.state_bytes)
    rows.append((kept, f"{state} on each rank without sharding" if plan.world > 1 else state))
    if plan.batch is not None:
        rows.append((f"{_unit(plan)} per step", _pairs_a_step(plan)))
    if plan.steps is not None:
        rows.append(("steps", f"{plan.steps:,}, {plan.steps_per_epoch:,} per epoch"))
    if plan.steps is not None and plan.warmup is not None:
        of_run = "longer than the run" if plan.warmup > plan.steps else f"{plan.warmup / plan.steps:.1%} of the run"
        rows.append(("warm-up", f"{plural(plan.warmup, 'step')}, {of_run}"))
    if plan.steps is not None and plan.global_batch is not None:
        rows.append((f"{_unit(plan)} seen", f"{plan.steps * plan.global_batch:,}"))
    titles = {"loss": "loss", "optimizer": "optimiser", "lr_scheduler": "schedule"}
    return rows + [(title, shown(plan.parts[name])) for name, title in titles.items()]


def _pairs_a_step(plan: RunPlan) -> str:
    nodes = f" x {plan.nodes} nodes" if plan.nodes > 1 else ""
    ranks = f" = {plan.batch:,} x {plan.devices} ranks{nodes}" if plan.world > 1 else ""
    parts = f", encoded in {plan.micro_batches} micro-batches" if plan.micro_batches > 1 else ""
    captions = f", each with all of its {plan.captions:.2g} captions on average" if plan.captions > 1 else ""
    return f"{plan.global_batch:,}{ranks}{captions}{parts}"


def _unit(plan: RunPlan) -> str:
    return "images" if plan.captions > 1 else "pairs"


def _bytes(number: float) -> str:
    return _scaled(number, 1024, ["bytes", "KiB", "MiB", "GiB"])


def _scaled(number: float, base: int, units: list[str]) -> str:
    while number >= base and len(units) > 1:
        number, units = number / base, units[1:]
    return f"{number:.3g} {units[0]}".strip()


def contradictions(plan: RunPlan) -> Iterator[str]:
    """Yield the contradictions in a plan, each as a sentence with the setting to change."""
    batch = plan.batch
    yield from _short_run(plan)
    ends = (plan.max_epochs or 0) * (plan.steps_per_epoch or 0)
    if ends and plan.max_steps not in (None, ends):
        by_steps = plan.max_steps is not None and plan.max_steps < ends
        first, unreached = ("max_steps", "max_epochs") if by_steps else ("max_epochs", "max_steps")
        yield (
            f"trainer.max_steps {plan.max_steps} and max_epochs {plan.max_epochs} ({ends} steps) disagree: "
            f"{first} ends the run; leave {unreached} out"
        )
    pairs = round((batch or 0) * plan.captions)
    if plan.micro_batch and batch and plan.micro_batch > pairs:
        yield (
            f"model.micro_batch_size {plan.micro_batch} exceeds the {pairs} pairs per step of each rank: it has no "
            "effect"
        )
    if plan.batch_norm and batch and batch // plan.micro_batches < FEW_FOR_BATCH_NORM:
        yield (
            f"BatchNorm computes its statistics over {batch // plan.micro_batches} pairs: set batch_size and "
            f"model.micro_batch_size to at least {FEW_FOR_BATCH_NORM}"
        )


def _short_run(plan: RunPlan) -> Iterator[str]:
    """Warn about a run that ends within its warm-up, or soon after a long one."""
    steps, warmup = plan.steps, plan.warmup
    if not steps or not warmup or steps - warmup >= FEW_STEPS or 10 * warmup <= steps:
        return
    lower = "lower --model.lr_scheduler.warmup_steps (in Python lr_scheduler=partial(WarmupCosine, warmup_steps=...))"
    if warmup >= steps:
        yield f"the run has {plural(steps, 'step')} and warm-up takes {warmup}: {lower}"
    else:
        longer = "max_steps" if plan.max_steps == steps else "max_epochs"
        left = plural(steps - warmup, "step")
        yield f"the run has only {left} after its {warmup} of warm-up: raise trainer.{longer}, or {lower}"


RECALL = "val/mean_recall"


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title)
    table.add_column(first, overflow="fold")  # names that differ at their end stay whole on a narrow terminal
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def print_summary(
    metrics: Mapping[str, Tensor],
    baselines: Mapping[str, float],
    before: Mapping[str, float] | None = None,
    alike: str = "",
) -> None:
    """Print a table of the logged validation metrics with their baselines, unless it would be empty.

    Metrics of ``before``, from before training, add two columns: the value before and the change. A note says that
    recalls of ``alike`` features are void.
    """
    table = _table("Results", "metric", "value", "baseline", *(("before", "change") if before else ()))
    # recall@5 before recall@10
    natural = {name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in metrics}
    names = sorted((name for name in metrics if not name.startswith(("train/", "lr-"))), key=natural.__getitem__)
    for name in names:
        value = float(metrics[name])
        scale, form, unit = 1, ".4f", ""
        if name in baselines and not name.endswith("/loss"):  # a share
            scale, form, unit = 100, ".2f", " %"
        row = [name, f"{scale * value:{form}}{unit}"]
        row.append(f"{scale * baselines[name]:{form}}{unit}" if name in baselines else "")
        if before and name in before:
            row += [f"{scale * before[name]:{form}}{unit}", f"{scale * (value - before[name]):+{form}}"]
        table.add_row(*row)
    notes = []
    if any("/merged_" in name for name in names):
        notes.append("merged: captions repeat, and equal ones count as one")
        if RECALL in names:
            notes.append("val/mean_recall is the one number to compare: a mean of merged recalls")
    if alike:
        notes.append(f"all {alike} have the same features: the recalls say nothing")
    table.caption = "\n".join(notes) or None
    if names:
        Console().print(table)


def print_trained(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """Print the optimiser's parameter groups, and the frozen parts of the model."""
    added = {id(parameter) for name, parameter in model.named_parameters() if is_added(name)}
    table = _table("Trained", "part", "kind", "parameters", "learning rate", "weight decay")
    for group in groups:
        kinds = {"LoRA" if id(parameter) in added else "full" for parameter in group["params"]}
        parameters = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("initial_lr", group["lr"])
        decay = f"{group['weight_decay']:g}" if "weight_decay" in group else "-"  # torch.optim.Rprop has none
        table.add_row(group["name"], " and ".join(sorted(kinds)), f"{parameters:,}", f"{rate:.2e}", decay)
    frozen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = "temperature" if name in SCALARS else "image" if name.startswith("visual.") else "text"
        frozen[part] += 0 if parameter.requires_grad else parameter.numel()
    for part, parameters in (+frozen).items():
        table.add_row(part, "frozen", f"{parameters:,}", "", "")
    Console().print(table)


def print_next_steps(checkpoint: Path, folder: Path | None, lines: Sequence[str] = ()) -> None:
    """Print where a run's results are, how to validate again, and further lines that are not empty."""
    console = Console(soft_wrap=True)
    console.print(f"checkpoint: {shown_path(checkpoint)}")
    if folder:
        console.print(f"logs and images: {shown_path(folder)}")
    if config := newest_config(folder):
        console.print(f"validate again: {_command('validate', config, checkpoint)}")
    for line in filter(None, lines):
        console.print(line)


def resume_command(checkpoint: Path, folder: Path | None) -> str:
    """Return the command that resumes a run from a checkpoint; without a configuration, instructions."""
    if config := newest_config(folder):
        return _command("fit", config, checkpoint)
    option = shlex.join(["--ckpt_path", str(shown_path(checkpoint))])
    return f"the same command and {option} (in Python trainer.fit(..., ckpt_path=...))"


def _command(name: str, config: Path, checkpoint: Path) -> str:
    words = ["lit-clip", name, "--config", shown_path(config), "--ckpt_path", shown_path(checkpoint)]
    return shlex.join(map(str, words))
