"""Tables and lines that the terminal shows around a run."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor


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
    for name in sorted(metrics):
        if name.startswith(("train/", "lr-")):
            continue
        value, scale, form, unit = float(metrics[name]), 1, ".4f", ""
        if name in baselines:
            scale, form, unit = 100, ".2f", " %"
        row = [name, f"{scale * value:{form}}{unit}"]
        row.append(f"{100 * baselines[name]:.2f} %" if name in baselines else "")
        if before and name in before:
            row += [f"{scale * before[name]:{form}}{unit}", f"{scale * (value - before[name]):+{form}}"]
        table.add_row(*row)
    return table


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
        table.add_row(group["name"], f"{parameters:,}", f"{rate:.2e}", f"{group['weight_decay']:g}")
    table.add_row("frozen", f"{frozen:,}", "", "")
    Console().print(table)


def print_next_steps(checkpoint: Path, log_dir: str | None) -> None:
    """Print where a run's results are and how to look at them again."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"checkpoint: {_shown(checkpoint)}")
    if log_dir:
        folder = _shown(Path(log_dir))
        console.print(f"logs and images: {folder}")
        console.print(
            f"validate again: lit-clip validate --config {folder}/fit_config.yaml --ckpt_path {_shown(checkpoint)}"
        )
        console.print(f"curves: tensorboard --logdir {folder}")


def resume_command(checkpoint: Path, log_dir: str | None) -> str:
    """Return the command that resumes a run from a checkpoint."""
    config = Path(log_dir, "fit_config.yaml") if log_dir else None
    if config is None or not config.exists():
        return f"the same command and {shlex.join(['--ckpt_path', str(_shown(checkpoint))])}"
    words = ["lit-clip", "fit", "--config", str(_shown(config)), "--ckpt_path", str(_shown(checkpoint))]
    return shlex.join(words)


def _shown(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
