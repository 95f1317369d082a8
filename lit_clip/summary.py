"""What the terminal shows at the end of a run."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor


def metrics_table(metrics: Mapping[str, Tensor], baselines: Mapping[str, float]) -> Table:
    """Validation metrics, with what guessing reaches beside those that have such a baseline."""
    table = Table(title="Results")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("guessing", justify="right")
    for name in sorted(metrics):
        if name.startswith("train/"):
            continue
        value = float(metrics[name])
        if name in baselines:
            table.add_row(name, f"{100 * value:.2f} %", f"{100 * baselines[name]:.2f} %")
        else:
            table.add_row(name, f"{value:.4f}", "")
    return table


def print_summary(metrics: Mapping[str, Tensor], baselines: Mapping[str, float]) -> None:
    """Print the table if there is anything to tell."""
    table = metrics_table(metrics, baselines)
    if table.row_count:
        Console().print(table)


def print_next_steps(checkpoint: Path, log_dir: str | None) -> None:
    """Where the run's results are and how to look at them again."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"checkpoint: {_shown(checkpoint)}")
    if log_dir:
        folder = _shown(Path(log_dir))
        console.print(f"logs and pictures: {folder}")
        console.print(
            f"same numbers again: lit-clip validate --config {folder}/fit_config.yaml --ckpt_path {_shown(checkpoint)}"
        )
        console.print(f"curves: tensorboard --logdir {folder}")


def _shown(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
