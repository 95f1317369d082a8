"""Notes and progress, on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def stderr() -> Console:
    """Return the console for notes and progress; standard output is for results only."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def progress(description: str, total: int, enabled: bool = True) -> Iterator[Any]:
    """Show a progress bar on standard error.

    Yields:
        A function to call with the number of units done since the last call.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)
