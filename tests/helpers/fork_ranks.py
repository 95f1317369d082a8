"""Run ``lit-clip`` so that the ranks that its first one starts are forks too, because importing torch takes seconds.

Lightning starts them with ``Popen`` when the first rank has threads already, and a process with threads is not forked
safely. So forks stand by from the beginning, and begin when Lightning would start a program.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies.launchers import subprocess_script

from tests.helpers import forks


class _Reserve:
    """A process for another rank; for Lightning it is a ``Popen``."""

    def __init__(self, earlier: Sequence["_Reserve"], function: Callable[[], None]) -> None:
        self.returncode: int | None = None
        mine, self._orders = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for reserve in (*earlier, self):
                os.close(reserve._orders)  # or it would not see the end of its own pipe
            _stand_by(mine, function)
        os.close(mine)

    def begin(self, command: Sequence[str], env: dict[str, str], cwd: str | None) -> "_Reserve":
        """Have it run the command, of which the interpreter is the first word, with an environment."""
        with open(self._orders, "wb") as orders:
            pickle.dump((list(command[1:]), env), orders)
        return self

    def poll(self) -> int | None:
        """Return the exit code; None: it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send it a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)


def _stand_by(orders: int, function: Callable[[], None]) -> None:
    """Wait for the command and the environment, run it and end."""
    with open(orders, "rb") as pipe:
        content = pipe.read()
    if not content:  # the first rank has ended before it started this one
        os._exit(0)
    sys.argv, environment = pickle.loads(content)
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = int(environment["LOCAL_RANK"])  # as Lightning sets it when it is imported
    code: Any = 0
    try:
        function()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def command_of_ranks(ranks: int, function: Callable[[], None] = forks.command) -> None:
    """Run a program, such as ``lit-clip``, as the first of several ranks."""
    reserves: list[_Reserve] = []
    for _ in range(ranks - 1):
        reserves.append(_Reserve(reserves, function))
    subprocess_script.subprocess = SimpleNamespace(  # pyright: ignore
        Popen=lambda command, env, cwd: reserves.pop(0).begin(command, env, cwd)
    )
    function()
