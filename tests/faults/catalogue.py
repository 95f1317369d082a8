"""The faults: what is done to a run, and what it has to do then."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.faults.clock import turn_clock
from tests.faults.disks import Disk
from tests.faults.runs import Run
from tests.faults.server import Store

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


def _with_disk(action: Callable[[Disk], object]) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        assert scene.disk is not None
        action(scene.disk)

    return act


def _store(mode: str, seconds: float | None = None) -> Callable[[Scene], None]:
    return lambda scene: scene.store.set(mode, seconds)


LOST = r"another process (has ended|did not answer)|the first process of this machine has ended"
GONE = (-signal.SIGKILL,)
WEB = ("store",)
FAULTS = (
    Fault("kill_run", "kill -9 of all processes", lambda s: s.run.signal(signal.SIGKILL), 10, GONE),
    Fault("kill_rank", "kill -9 of the last rank", lambda s: s.hit(signal.SIGKILL, s.last_rank), 20, (2,), LOST, ranks=2),
    Fault("kill_first", "kill -9 of the first rank", lambda s: s.hit(signal.SIGKILL, 0), 20, GONE, LOST, ranks=2),
    Fault(
        *("sigterm", "SIGTERM to one rank", lambda s: s.hit(signal.SIGTERM, s.any_rank), 20),
        *((128 + signal.SIGTERM,), r"SIGTERM: saved step \d+; resume with: "),
    ),
    Fault("pause", f"SIGSTOP of one rank, SIGCONT after {PAUSE:g} s", _pause, 60),
    Fault(
        *("stop_rank", "SIGSTOP of the last rank for ever", lambda s: s.hit(signal.SIGSTOP, s.last_rank), 30),
        *((2,), LOST),
        ranks=2,
        needs="group_timeout",
    ),
    Fault(
        *("stop_first", "SIGSTOP of the first rank for ever", lambda s: s.hit(signal.SIGSTOP, 0), 30, (), LOST),
        ranks=2,
        needs="group_timeout",
    ),
    Fault(
        *("disk_full", "the disk of the run's folder becomes full", _with_disk(Disk.fill), 20, (2,)),
        *(r"No space left on device|disk is full", _with_disk(Disk.free)),
        needs="disk",
    ),
    Fault(
        *("read_only", "the run's folder becomes read-only", _with_disk(lambda disk: disk.remount("ro")), 20, (2,)),
        *("Read-only file system", _with_disk(lambda disk: disk.remount("rw"))),
        needs="disk",
    ),
    Fault("clock_forward", "the clock jumps a day forwards", _turn(DAY), 60, needs="clock"),
    Fault("clock_back", "the clock jumps a day backwards", _turn(-DAY), 60, needs="clock"),
    Fault(
        *("clock_corrected", "kill -9 of all processes with the clock a day ahead, which is then corrected"),
        *(_kill_in_the_future, 10, GONE),
        undo=_turn(0.0),
        needs="clock",
    ),
    Fault(
        *("kill_worker", "kill -9 of one data worker", _kill_worker, 20, (2,), r"data worker.*memory|memory.*data worker"),
        workers=True,
    ),
    Fault("slow", "the store takes 0.2 s for each answer", _store("slow"), 90, sources=WEB),
    Fault("429", f"the store answers 429 for {RECOVERY:g} s", _store("429", RECOVERY), 60, sources=WEB),
    Fault("500", f"the store answers 500 for {RECOVERY:g} s", _store("500", RECOVERY), 60, sources=WEB),
    Fault("reset", f"the store resets connections for {RECOVERY:g} s", _store("reset", RECOVERY), 60, sources=WEB),
    Fault("cut", f"the store breaks off its answers for {RECOVERY:g} s", _store("cut", RECOVERY), 60, sources=WEB),
    Fault(
        *("silent", f"the store does not answer for {RECOVERY + STORE_TIMEOUT:g} s"),
        *(_store("silent", RECOVERY + STORE_TIMEOUT), 60),
        sources=WEB,
        needs="store_timeout",
    ),
    *(
        Fault(
            *(f"{mode}_forever", f"the store {text} for ever", _store(mode), 60, (2,)),
            *(rf"https?://\S+: cannot be fetched .*{reason}", _store("well")),
            sources=WEB,
            needs="store_timeout",
        )
        for mode, text, reason in (
            ("429", "answers 429", "429"),
            ("reset", "resets connections", "(?i:disconnect|reset|connect)"),
            ("silent", "does not answer", "(?i:time|answer)"),
        )
    ),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
