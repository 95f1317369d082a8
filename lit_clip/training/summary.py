"""Tables and lines on the terminal before and after a run."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from lit_clip.models.layers import SCALARS
from lit_clip.models.lora import is_added
from lit_clip.tools.console import Console
from lit_clip.training.lightning.run_folder import newest_config, shown

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
    console.print(f"checkpoint: {shown(checkpoint)}")
    if folder:
        console.print(f"logs and images: {shown(folder)}")
    if config := newest_config(folder):
        console.print(f"validate again: {_command('validate', config, checkpoint)}")
    for line in filter(None, lines):
        console.print(line)


def resume_command(checkpoint: Path, folder: Path | None) -> str:
    """Return the command that resumes a run from a checkpoint; without a configuration, instructions."""
    if config := newest_config(folder):
        return _command("fit", config, checkpoint)
    option = shlex.join(["--ckpt_path", str(shown(checkpoint))])
    return f"the same command and {option} (in Python trainer.fit(..., ckpt_path=...))"


def _command(name: str, config: Path, checkpoint: Path) -> str:
    return shlex.join(["lit-clip", name, "--config", str(shown(config)), "--ckpt_path", str(shown(checkpoint))])
