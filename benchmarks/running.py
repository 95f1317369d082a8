"""Run programs, follow their output line by line, and stop and continue them."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Program:
    """A command in its own process group, killed at the end of the ``with`` block.

    Args:
        command: its words.
        path: a folder to add to its ``PYTHONPATH``.
    """

    def __init__(self, command: Sequence[str], path: Path | None = None) -> None:
        self.command = list(command)
        paths = [str(path)] if path else []
        paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.said: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # data workers are in the group too
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def lines(self) -> Iterator[str]:
        output: Any = self.process.stdout
        for line in output:
            self.said.append(line)
            yield line

    def wait_for(self, pattern: str) -> float:
        """Wait for a line that matches a regular expression, and return the time (``time.perf_counter``).

        Raises:
            RuntimeError: the program ended before; the message has the end of its output.
        """
        for line in self.lines():
            if re.search(pattern, line):
                return time.perf_counter()
        raise RuntimeError(f"{' '.join(self.command)} never printed {pattern!r}:\n{''.join(self.said[-20:])}")

    def processor_seconds(self) -> float:
        """Return the processor time so far, of the user and of the system, of the program and its workers (Linux)."""
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                fields = file.read_text().rpartition(")")[2].split()  # of proc(5), from the third
                ticks += sum(map(int, fields[11:15])) if int(fields[2]) == self.process.pid else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def pause(self) -> None:
        """Stop the program and its workers."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> float:
        """Continue the program, and return the time."""
        os.killpg(self.process.pid, signal.SIGCONT)
        return time.perf_counter()


def processor_seconds_until(command: Sequence[str], pattern: str, path: Path | None = None) -> float:
    """Return the processor time of a command and its workers until a matching line, then end it."""
    with Program(command, path) as program:
        program.wait_for(pattern)
        return program.processor_seconds()


def seconds_of_all(command: Sequence[str]) -> float:
    """Return the seconds that a command takes.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
    return time.perf_counter() - start
