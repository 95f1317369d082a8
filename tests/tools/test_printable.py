"""Nothing from a file steers the terminal: no escape sequence, no markup, in whatever way it is printed."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from lit_clip.commands.class_output import RankedClass, _as_csv, _as_json
from lit_clip.errors import UNPRINTABLE, InputError, printable
from lit_clip.tools.console import Console, Text

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


@pytest.mark.parametrize("name", ["x" * 20_000, "a b" * 7_000, "\x1b" * 5_000, "a, " * 9_000])
def test_error_that_quotes_a_name_of_any_length_says_where_and_what_to_do(name: str) -> None:
    message = str(InputError(f"t.csv row 7: no such image file: {name}, nor {name}; set root to the folder of images"))
    assert len(message) < 2200 if ", " in name else len(message) < 500
    assert message.startswith("t.csv row 7: no such image file: ")
    assert message.endswith("; set root to the folder of images")
    assert message.isprintable()


def test_usual_names_are_quoted_whole() -> None:
    listed = f"/home/{'long_name/' * 15}t.csv: has {', '.join(f'column_{number}' for number in range(150))}"
    assert str(InputError(listed)) == listed


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
