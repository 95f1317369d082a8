"""A terminal of 80 columns in which a command runs, and what it shows."""

import os
import pty
import re
import select
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import forks

CONTROL = re.compile(r"\x1b\[\??(\d*)([A-Za-z])")


def on_a_terminal(folder: Path, *words: str) -> str:
    """Return what ``lit-clip`` writes to a terminal of 80 columns."""
    forks.start_server()
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    program = forks.Program(forks.command, ["lit-clip", *words], folder, {**environment, "TERM": "xterm"})
    process = forks.CONTEXT.Process(target=forks.become, args=(program, os.ttyname(theirs), os.ttyname(theirs)))
    process.start()
    written = b""
    while process.is_alive() or _waiting(ours):
        if _waiting(ours):
            written += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    assert process.exitcode == 0, written.decode()
    return written.decode()


def screen(written: str) -> Sequence[str]:
    """Return the lines of a terminal so high that nothing is scrolled, after the text and its control sequences."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\x1b\[\??[\d;]*[A-Za-z]|[\r\n])", written):
        control = CONTROL.fullmatch(part)
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control:
            number, kind = control.groups()
            row = max(0, row - int(number or 1)) if kind == "A" else row
            lines[row] = "" if kind == "K" else lines[row]
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def _waiting(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0.05)[0])
