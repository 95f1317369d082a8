"""Nothing from a file steers the terminal: no escape sequence, no markup, in whatever way it is printed."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from rich.table import Table

from lit_clip.commands.class_output import RankedClass, _as_csv, _as_json
from lit_clip.errors import UNPRINTABLE, InputError, printable
from lit_clip.tools.console import Console, Text, can_draw, duration, from_totals, per_second, plural, progress
from lit_clip.tools.html import render, write_page

HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "a\x08\x08b",
    "a\x00b",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "a\u2028b",
    "a\x7fb",
    "\udcff.png",
    "\ud800",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_reach_the_terminal_as_their_escapes(name: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True)
    console.print(name)
    console.print(Text(name))
    table = Table(title=Text(name))
    table.add_column(name)
    table.add_row(name)
    table.add_row(Text(name))
    console.print(table)
    shown = out.getvalue()
    assert not UNPRINTABLE.search(shown.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[3m", ""))
    shown.encode()
    assert "".join(shown.split()).count(printable(name)) == 6


def test_what_can_be_printed_is_unchanged() -> None:
    for text in ("photo of a tiger.png", "Straße\t東京 🦊\n", "[red]\\x1b", "עברית"):
        assert printable(text) == text
    listed = f"/home/{'long_name/' * 15}t.csv: has {', '.join(f'column_{number}' for number in range(150))}"
    assert str(InputError(listed)) == listed


@pytest.mark.parametrize("name", ["x" * 20_000, "a b" * 7_000, "\x1b" * 5_000, "a, " * 9_000])
def test_error_that_quotes_a_name_of_any_length_says_where_and_what_to_do(name: str) -> None:
    message = str(InputError(f"t.csv row 7: no such image file: {name}, nor {name}; set root to the folder of images"))
    assert len(message) < 2200 if ", " in name else len(message) < 500
    assert message.startswith("t.csv row 7: no such image file: ")
    assert message.endswith("; set root to the folder of images")
    assert message.isprintable()


def test_markup_and_names_of_emoji_in_a_name_are_text() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.print("[red]a[/red] :smile: [/nonsense]")
    table = Table()
    table.add_row("[bold]b :fox:")
    console.print(table)
    assert "[red]a[/red] :smile: [/nonsense]" in out.getvalue()
    assert "[bold]b :fox:" in out.getvalue()


def test_log_messages_warnings_and_tracebacks_are_escaped() -> None:
    program = (
        "import logging, warnings\n"
        "from lit_clip.tools.guarded_output import guard_messages\n"
        "guard_messages()\n"
        "logging.getLogger('x').warning('log %s', '\\x1b[31m')\n"
        "warnings.warn('warned \\x1b[32m')\n"
        "raise ValueError('raised \\x1b[33m')\n"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert "\x1b" not in ran.stderr
    for line in ("log \\x1b[31m", "warned \\x1b[32m", "ValueError: raised \\x1b[33m"):
        assert line in ran.stderr


def test_no_cell_of_a_csv_file_is_a_formula() -> None:
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1", "plain", "a=b"]
    results = {name: [RankedClass(name, 0.5)] for name in names}
    rows = list(csv.reader(io.StringIO(_as_csv(results), newline="")))[1:]
    assert not any(cell.startswith(tuple("=+-@\t\r\n\uff1d")) for row in rows for cell in row)
    assert [row[0].removeprefix("'") for row in rows] == names
    assert '"image": "=1+1"' in _as_json(results)  # programs find the names as they are


# HTML pages: text is escaped, missing values are errors, and characters that cannot be encoded are replaced.


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(
        '{% extends "base.html" %}{% from "macros.html" import table %}'
        "{% block body %}{{ table(rows, [title, 'count'], ['count']) }}{% endblock %}"
    )
    return path


def test_text_is_escaped_in_the_layout_and_in_macros(template: Path) -> None:
    page = render(template, title="<b>&", rows=[("<script>", 1)])
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert '<tr><td>&lt;script&gt;</td><td class="n">1</td></tr>' in page
    assert "<script" not in page


def test_a_missing_value_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="rows"):
        render(template, title="a page")


def test_a_lone_surrogate_is_replaced(template: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "out.html", template, title="\udcff", rows=[])
    assert "<title>?</title>" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_plural_adds_an_s_except_for_one() -> None:
    assert [plural(count, "image") for count in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]


# Progress: lines where no bar can be drawn, at the right times and with the right numbers.


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
    with progress("on another rank", 3, enabled=False, now=Clock()) as advance:
        advance(1)
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
