"""Notes and progress, on standard error, and results."""

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
import rich.text
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from lit_clip.errors import printable


class Console(rich.console.Console):
    """rich's console, for text from files: no markup, no names of emoji, and all text :func:`printable`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Text(rich.text.Text):
    """rich's text, :func:`printable` before its width is measured."""

    def __init__(self, text: str = "", *arguments: Any, **options: Any) -> None:
        super().__init__(printable(text), *arguments, **options)


def stderr() -> Console:
    """Return the console for notes and progress; standard output is for results only."""
    return Console(stderr=True, soft_wrap=True)


def write_results(text: str) -> None:
    """Write a command's results to standard output: unchanged, but :func:`printable` on a terminal."""
    if sys.stdout.isatty():
        sys.stdout.write(printable(text))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be Unicode
    sys.stdout.write(text)


@contextmanager
def progress(description: str, total: int, enabled: bool = True) -> Iterator[Any]:
    """Show a progress bar on standard error.

    Yields:
        A function to call with the number of units done since the last call.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)
