"""Programs whose output is read as it comes: when they said what, and stopping them meanwhile."""

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
    """A command in a process group of its own, which ends with the ``with`` block.

    Args:
        command: the words.
        path: a folder that it imports from as well.
    """

    def __init__(self, command: Sequence[str], path: Path | None = None) -> None:
        self.command, self.started = list(command), time.perf_counter()
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
        """The time (``time.perf_counter``) at which a line came that has a match of the regular expression.

        Raises:
            RuntimeError: the program ended before, with the end of what it said.
        """
        for line in self.lines():
            if re.search(pattern, line):
                return time.perf_counter()
        raise RuntimeError(f"{' '.join(self.command)} never said {pattern!r}:\n{''.join(self.said[-20:])}")

    def pause(self) -> None:
        """Stop it and its workers where they are."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> float:
        """Let it go on, and say when."""
        os.killpg(self.process.pid, signal.SIGCONT)
        return time.perf_counter()


def seconds_until(command: Sequence[str], pattern: str, path: Path | None = None) -> float:
    """From the start of a command to the line with a match; it is ended then."""
    with Program(command, path) as program:
        return program.wait_for(pattern) - program.started


def seconds_of_all(command: Sequence[str]) -> float:
    """From the start of a command to its end.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
    return time.perf_counter() - start
