"""Progress: lines where no bar can be drawn, at the right times and with the right numbers."""

import io
import sys

import pytest

from lit_clip.tools.console import can_draw, duration, from_totals, per_second, progress


class Clock:
    """A clock that a test sets."""

    time = 1000.0

    def __call__(self) -> float:
        return self.time


def run(steps: int, seconds: float, total: int = 100) -> None:
    """Do ``steps`` units, each in so many seconds."""
    clock = Clock()
    with progress("reading \x1b[2J", total, now=clock) as advance:
        for _ in range(steps):
            clock.time += seconds
            advance(1)


def test_the_first_line_is_after_5_seconds_and_then_there_is_one_every_30(capsys: pytest.CaptureFixture[str]) -> None:
    run(100, 0.75)
    assert capsys.readouterr().err.splitlines() == [
        "reading \\x1b[2J: 7 of 100, 1.33/s, 0:01:10 left",
        "reading \\x1b[2J: 47 of 100, 1.33/s, 0:00:40 left",
        "reading \\x1b[2J: 87 of 100, 1.33/s, 0:00:10 left",
        "reading \\x1b[2J: 100 in 0:01:15, 1.33/s",
    ]


def test_what_takes_less_than_5_seconds_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(100, 0.04)
    assert capsys.readouterr() == ("", "")


def test_the_last_line_has_the_number_done_where_the_total_was_the_most_or_unknown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(2, 10)
    run(2, 10, total=0)
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "1 of 100, 0.1/s, 0:16:30 left",
        "2 in 0:00:20, 0.1/s",
        "1, 0.1/s",
        "2 in 0:00:20, 0.1/s",
    ]


def test_ranks_other_than_the_first_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress("reading", 3, enabled=False, now=clock) as advance:
        clock.time += 60
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_totals_since_the_start_become_units_since_the_last_call() -> None:
    units: list[float] = []
    count = from_totals(units.append)
    for total in (3, 3, 10):
        count(total)
    assert units == [3, 0, 7]


def test_times_and_rates_are_short() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 360_000)] == ["0:00:00", "0:01:00", "1:00:00", "100:00:00"]
    assert per_second(123_456, 10, "samples") == "12,346 samples/s"
    assert per_second(1, 30) == "0.0333/s"
    assert per_second(1, 0) == per_second(0, 1) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_needs_a_terminal_that_can_redraw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert can_draw(Terminal())
    assert not can_draw(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not can_draw(Terminal())


def test_a_terminal_gets_a_bar_with_the_number_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("fits", 16) as advance:
        advance(15)
    assert "\x1b[" in sys.stderr.getvalue()
    assert "15/15" in sys.stderr.getvalue()
