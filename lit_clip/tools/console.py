"""Write notes and progress to standard error, and results to standard output."""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import rich.console
import rich.text
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from lit_clip.errors import printable

FIRST, EVERY = 5.0, 30.0  # seconds until the first line of progress, and between lines


class Console(rich.console.Console):
    """rich's console for text from files: no markup, no emoji names, and all text :func:`printable`.

    Where the output is no terminal it is at least ``file_width`` wide. Options are rich's.
    """

    def __init__(self, *, file_width: int = 0, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if file_width and not self.is_terminal:
            self.width = max(self.width, file_width)

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Text(rich.text.Text):
    """rich's text, made :func:`printable` before its width is measured."""

    def __init__(self, text: str = "", *arguments: Any, **options: Any) -> None:
        super().__init__(printable(text), *arguments, **options)


def stderr() -> Console:
    """Return the console for notes and progress; standard output is for results only."""
    return Console(stderr=True, soft_wrap=True)


def write_results(text: str) -> None:
    """Write a command's results to standard output: unchanged, but :func:`printable` on a terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be Unicode
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)


def can_draw(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can redraw a progress bar, regardless of ``FORCE_COLOR``."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, such as ``0:02:09``."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def in_words(seconds: float) -> str:
    """Return a time to two digits in its largest unit, such as ``3.6 s``, ``12 minutes`` or ``1.5 days``."""
    for unit, size, limit in (("s", 1, 60), ("minutes", 60, 3600), ("hours", 3600, 86400), ("days", 86400, math.inf)):
        if seconds < limit or limit == math.inf:
            number = f"{seconds / size:.2g}" if seconds < 10 * size else f"{seconds / size:,.0f}"
            return f"{number} {unit.rstrip('s') or unit if number == '1' else unit}"
    raise AssertionError


def per_second(count: float, seconds: float, unit: str = "") -> str:
    """Return a rate to three digits, such as ``61.7 samples/s``; nothing if no time has passed."""
    if not count or seconds <= 0:
        return ""
    rate = count / seconds
    return f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'}{unit and f' {unit}'}/s"


def plural(count: int, noun: str) -> str:
    """Return ``1 image`` or ``2 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_in_bytes(number: float) -> str:
    """Return a number of bytes to three digits, such as ``1.25 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


class ProgressLog:
    """Progress as whole lines on standard error, for places without a progress bar, such as a job's log.

    The first line is due after ``FIRST`` seconds, and then one every ``EVERY``; ``started`` says whether there was one
    yet.
    """

    def __init__(self, title: str, now: Callable[[], float] = time.monotonic) -> None:
        self.title = title
        self.started = False
        self._now = now
        self._start = now()
        self._next = self._start + FIRST

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    @property
    def due(self) -> bool:
        """Whether the next line is due."""
        return self._now() >= self._next

    def write(self, *parts: str) -> None:
        """Write a line; empty parts are left out."""
        sys.stderr.write(printable(f"{self.title}: {', '.join(filter(None, parts))}") + "\n")
        sys.stderr.flush()
        self.started, self._next = True, self._now() + EVERY


@contextmanager
def progress(
    description: str, total: int, enabled: bool = True, now: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[float], None]]:
    """Show progress on standard error: a bar on a terminal, otherwise lines (:class:`ProgressLog`).

    Yields a function to call with the number of units done since the last call, of ``total`` at most. ``enabled`` is
    false on ranks other than the first.
    """
    if not enabled:
        yield lambda units: None
    elif can_draw(sys.stderr):
        with _bar(description, total) as advance:
            yield advance
    else:
        done, log = 0.0, ProgressLog(description, now)

        def count(units: float) -> None:
            nonlocal done
            done += units
            if log.due and done != total:  # the last line is below
                left = f"{duration(log.seconds / done * (total - done))} left" if 0 < done < total else ""
                of = f" of {total:,}" if total else ""
                log.write(f"{done:,.0f}{of}", per_second(done, log.seconds), left)

        yield count
        if log.started:
            log.write(f"{done:,.0f} in {duration(log.seconds)}", per_second(done, log.seconds))


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[float], None]]:
    title, times = TextColumn("{task.description}", markup=False), (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (title, BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)
        done = bar.tasks[0].completed
        bar.update(task, total=done, visible=done > 0)  # nothing was left to do, or less than the most


def from_totals(advance: Callable[[float], None]) -> Callable[[float], None]:
    """Return a function that takes totals since the start, and calls :func:`progress`'s ``advance``."""
    done = 0.0

    def count(total: float) -> None:
        nonlocal done
        advance(total - done)
        done = total

    return count
