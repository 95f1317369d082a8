"""The faults: what is done to a run, and what it has to do then."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.clock import turn_clock
from benchmarks.faults.recorder import BUSY
from benchmarks.faults.runs import Run
from benchmarks.faults.server import SLOW, Store
from tests.helpers.disks import Disk

DAY = 86400.0
PAUSE = 2.0  # seconds
STORE_TIMEOUT = 3.0  # seconds until a request counts as unanswered, where a cell sets it
RECOVERY = 1.5  # seconds until a store works again


class Scene(NamedTuple):
    """What a fault may touch.

    Attributes:
        run: the run.
        store: the web server.
        disk: the run's disk, where the fault needs one.
        clock: the file that turns the run's clock, where the fault needs one.
        random: for the rank to hit.
    """

    run: Run
    store: Store
    disk: Disk | None
    clock: Path | None
    random: random.Random

    def hit(self, signum: int, rank: int) -> int:
        """Send a rank a signal and return its process."""
        pid = self.run.pid_of(rank)
        os.kill(pid, signum)
        return pid

    @property
    def any_rank(self) -> int:
        """A random rank."""
        return self.random.choice(self.run.ranks)

    @property
    def last_rank(self) -> int:
        """The last rank."""
        return self.run.ranks[-1]


class Fault(NamedTuple):
    """A fault and what must follow.

    Attributes:
        name: for the command line and the table.
        text: what is done.
        act: does it.
        limit: seconds within which the run must have ended, or come to its regular end.
        codes: the exit codes of the first rank that are right; 0: the run goes on to its end.
        line: regular expression of the line that says what happened; empty: none is possible or needed.
        undo: makes the resumed run possible.
        sources: where it makes sense.
        ranks: the least number of ranks.
        workers: whether it needs data workers.
        needs: ``disk``, ``clock``, ``group_timeout`` or ``store_timeout``.
    """

    name: str
    text: str
    act: Callable[[Scene], object]
    limit: float
    codes: tuple[int, ...] = (0,)
    line: str = ""
    undo: Callable[[Scene], object] = lambda scene: None
    sources: tuple[str, ...] = ("table", "tars", "store")
    ranks: int = 1
    workers: bool = False
    needs: str = ""


def _pause(scene: Scene) -> None:
    pid = scene.hit(signal.SIGSTOP, scene.any_rank)
    time.sleep(PAUSE)
    os.kill(pid, signal.SIGCONT)


def _kill_worker(scene: Scene) -> None:
    os.kill(scene.random.choice(scene.run.data_workers(scene.any_rank)), signal.SIGKILL)


def _kill_while_the_first_is_busy(scene: Scene) -> None:
    """Kill the last rank while the first one is in a long step, after which it would notice."""
    scene.run.make_busy(0)
    scene.hit(signal.SIGKILL, scene.last_rank)


def _turn(seconds: float) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        assert scene.clock is not None
        turn_clock(scene.clock, seconds)

    return act


def _kill_in_the_future(scene: Scene) -> None:
    """Kill a run whose clock was a day ahead: the files that it leaves are newer than anything written later."""
    _turn(DAY)(scene)
    time.sleep(0.3)
    scene.run.signal(signal.SIGKILL)
    scene.run.wait(10)
    ahead = time.time() + DAY
    for path in scene.run.settings.folder.rglob("*"):
        os.utime(path, (ahead, ahead))


def _fill(scene: Scene) -> None:
    assert scene.disk is not None
    with scene.run.held():
        scene.disk.fill()


def _free(scene: Scene) -> None:
    assert scene.disk is not None
    scene.disk.free()


def _protect(scene: Scene) -> None:
    assert scene.disk is not None
    with scene.run.held():
        scene.disk.protect(scene.run.settings.folder / "lightning_logs")


def _unprotect(scene: Scene) -> None:
    assert scene.disk is not None
    scene.disk.unprotect(scene.run.settings.folder / "lightning_logs")


def _store(mode: str, seconds: float | None = None) -> Callable[[Scene], None]:
    return lambda scene: scene.store.set(mode, seconds)


LOST = r"another process (has ended|did not answer)|the first process of this machine has ended"
GONE = (-signal.SIGKILL,)
USER_ERROR = (2,)
WEB = ("store",)

PROCESSES = (
    Fault("kill_run", "kill -9 of all processes", lambda scene: scene.run.signal(signal.SIGKILL), 10, GONE),
    Fault(
        "kill_rank",
        "kill -9 of the last rank",
        lambda scene: scene.hit(signal.SIGKILL, scene.last_rank),
        limit=20,
        codes=USER_ERROR,
        line=LOST,
        ranks=2,
    ),
    Fault(
        "kill_rank_meanwhile",
        f"kill -9 of the last rank while the first one is in a step of {BUSY:g} s",
        _kill_while_the_first_is_busy,
        limit=20,
        codes=USER_ERROR,
        line=LOST,
        sources=("tars",),
        ranks=2,
    ),
    Fault(
        "kill_first",
        "kill -9 of the first rank",
        lambda scene: scene.hit(signal.SIGKILL, 0),
        limit=20,
        codes=GONE,
        line=LOST,
        ranks=2,
    ),
    Fault(
        "sigterm",
        "SIGTERM to one rank",
        lambda scene: scene.hit(signal.SIGTERM, scene.any_rank),
        limit=20,
        codes=(128 + signal.SIGTERM,),
        line=r"SIGTERM: saved step \d+; resume with: ",
    ),
    Fault("pause", f"SIGSTOP of one rank, SIGCONT after {PAUSE:g} s", _pause, 60),
    Fault(
        "stop_rank",
        "SIGSTOP of the last rank for ever",
        lambda scene: scene.hit(signal.SIGSTOP, scene.last_rank),
        limit=30,
        codes=USER_ERROR,
        line=LOST,
        ranks=2,
        needs="group_timeout",
    ),
    Fault(
        "stop_first",
        "SIGSTOP of the first rank for ever",
        lambda scene: scene.hit(signal.SIGSTOP, 0),
        limit=30,
        codes=(),
        line=LOST,
        ranks=2,
        needs="group_timeout",
    ),
    Fault(
        "kill_worker",
        "kill -9 of one data worker",
        _kill_worker,
        limit=20,
        codes=USER_ERROR,
        line="a data worker was killed, probably because memory ran out",
        workers=True,
    ),
)

MACHINE = (
    Fault(
        "disk_full",
        "the disk of the run's folder becomes full",
        _fill,
        limit=20,
        codes=USER_ERROR,
        line="No space left on device",
        undo=_free,
        needs="disk",
    ),
    Fault(
        "read_only",
        "the run's folder becomes read-only",
        _protect,
        limit=20,
        codes=USER_ERROR,
        line="Read-only file system",
        undo=_unprotect,
        needs="disk",
    ),
    Fault("clock_forward", "the clock jumps a day forwards", _turn(DAY), 60, needs="clock"),
    Fault("clock_back", "the clock jumps a day backwards", _turn(-DAY), 60, needs="clock"),
    Fault(
        "clock_corrected",
        "kill -9 of all processes with the clock a day ahead, which is then corrected; the resumed run is killed too",
        _kill_in_the_future,
        limit=10,
        codes=GONE,
        undo=_turn(0.0),
        needs="clock",
    ),
)


def _recovers(name: str, text: str, seconds: float = RECOVERY, needs: str = "") -> Fault:
    return Fault(name, f"the store {text} for {seconds:g} s", _store(name, seconds), 60, sources=WEB, needs=needs)


def _for_ever(mode: str, text: str, reason: str) -> Fault:
    return Fault(
        f"{mode}_forever",
        f"the store {text} for ever",
        _store(mode),
        limit=60,
        codes=USER_ERROR,
        line=rf"https?://\S+: cannot be fetched .*{reason}",
        undo=_store("well"),
        sources=WEB,
        needs="store_timeout",
    )


STORES = (
    Fault("slow", f"the store takes {SLOW:g} s for each answer", _store("slow"), 90, sources=WEB),
    _recovers("429", "answers 429"),
    _recovers("500", "answers 500"),
    _recovers("reset", "resets connections"),
    _recovers("cut", "breaks off its answers"),
    _recovers("silent", "does not answer", RECOVERY + STORE_TIMEOUT, needs="store_timeout"),
    _for_ever("429", "answers 429", "429"),
    _for_ever("reset", "resets connections", "(?i:disconnect|reset|connect)"),
    _for_ever("silent", "does not answer", "(?i:time|answer)"),
)
FAULTS = (*PROCESSES, *MACHINE, *STORES)
BY_NAME = {fault.name: fault for fault in FAULTS}
