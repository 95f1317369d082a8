"""Tables and lines that the terminal shows around a run."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from lit_clip.tools.console import Console
from lit_clip.training.lightning.run_folder import newest_config, shown


def metrics_table(
    metrics: Mapping[str, Tensor], baselines: Mapping[str, float], before: Mapping[str, float] | None = None
) -> Table:
    """Return a table of validation metrics, with the baseline of those that have one.

    Args:
        metrics: the logged metrics.
        baselines: baselines by metric.
        before: metrics before training; adds two columns, the value before and the change.
    """
    table = Table(title="Results")
    table.add_column("metric")
    for column in ("value", "baseline", *(("before", "change") if before else ())):
        table.add_column(column, justify="right")
    names = sorted((name for name in metrics if not name.startswith(("train/", "lr-"))), key=_natural)
    for name in names:
        value, scale, form, unit = float(metrics[name]), 1, ".4f", ""
        if name in baselines and not name.endswith("/loss"):  # a share
            scale, form, unit = 100, ".2f", " %"
        row = [name, f"{scale * value:{form}}{unit}"]
        row.append(f"{scale * baselines[name]:{form}}{unit}" if name in baselines else "")
        if before and name in before:
            row += [f"{scale * before[name]:{form}}{unit}", f"{scale * (value - before[name]):+{form}}"]
        table.add_row(*row)
    if any("/merged_" in name for name in names):
        table.caption = "merged: captions repeat, and equal ones count as one"
    return table


def _natural(name: str) -> list[str | int]:
    """Return a sort key that puts recall@5 before recall@10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def print_summary(
    metrics: Mapping[str, Tensor], baselines: Mapping[str, float], before: Mapping[str, float] | None = None
) -> None:
    """Print :func:`metrics_table` unless it is empty."""
    table = metrics_table(metrics, baselines, before)
    if table.row_count:
        Console().print(table)


def print_parameter_groups(groups: Sequence[Mapping[str, Any]], frozen: int) -> None:
    """Print the optimiser's parameter groups.

    Args:
        groups: the optimiser's.
        frozen: number of frozen parameters.
    """
    table = Table(title="Parameter groups")
    table.add_column("group")
    for column in ("parameters", "learning rate", "weight decay"):
        table.add_column(column, justify="right")
    for group in groups:
        parameters = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("initial_lr", group["lr"])
        decay = f"{group['weight_decay']:g}" if "weight_decay" in group else "-"  # torch.optim.Rprop has none
        table.add_row(group["name"], f"{parameters:,}", f"{rate:.2e}", decay)
    table.add_row("frozen", f"{frozen:,}", "", "")
    Console().print(table)


def print_next_steps(
    checkpoint: Path, folder: Path | None, curves: Sequence[str], best: Mapping[str, Path] | None = None
) -> None:
    """Print where a run's results are and how to look at them again.

    Args:
        checkpoint: the last one.
        folder: the run's folder.
        curves: commands, files and addresses that show the curves, one for each logger.
        best: the best checkpoint by each watched metric.
    """
    console = Console(soft_wrap=True)
    console.print(f"checkpoint: {shown(checkpoint)}")
    for metric, file in (best or {}).items():
        console.print(f"best {metric}: {shown(file)}")
    config = newest_config(folder)
    if folder:
        console.print(f"logs and images: {shown(folder)}")
    if config:
        words = ["lit-clip", "validate", "--config", str(shown(config)), "--ckpt_path", str(shown(checkpoint))]
        console.print(f"validate again: {shlex.join(words)}")
    for line in curves:
        console.print(f"curves: {line}")


def resume_command(checkpoint: Path, folder: Path | None) -> str:
    """Return the command that resumes a run from a checkpoint; without a configuration, how to resume it.

    Args:
        checkpoint: the file to resume from.
        folder: the run's folder, which may hold its configuration.
    """
    config = newest_config(folder)
    if config is None:
        option = shlex.join(["--ckpt_path", str(shown(checkpoint))])
        return f"the same command and {option} (in Python trainer.fit(..., ckpt_path=...))"
    words = ["lit-clip", "fit", "--config", str(shown(config)), "--ckpt_path", str(shown(checkpoint))]
    return shlex.join(words)
