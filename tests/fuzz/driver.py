"""Give hostile inputs to the targets, each batch in a process of its own, and keep what was found."""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count as counting
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.inputs import Input
from tests.fuzz.oracle import ROOT, Finding, is_ours
from tests.fuzz.targets import NAMES
from tests.fuzz.worker import Job, work
from tests.helpers import forks

LIMIT = 20.0  # seconds for one input on a busy machine
MEMORY = 2**30  # bytes that one input may use
TURN = 15.0  # seconds that a target has before it is the next one's turn
LONG = {"resumed_checkpoints": 3}  # turns at once: an input is a whole run of the command
START = 120.0  # seconds for the start of a process
SEPARATOR = "--"  # between a case's own name and the name of its file


@dataclass
class Found:
    """A finding, how often it was made, and the smallest input that leads to it."""

    target: str
    finding: Finding
    input: Input
    seed: int
    times: int = 0


@dataclass
class Summary:
    """What came of all inputs.

    Attributes:
        inputs: target -> number of inputs.
        outcomes: target -> outcome of a sample or refusal -> number.
        found: target and signature -> finding.
    """

    inputs: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    found: dict[tuple[str, str], Found] = field(default_factory=dict)

    def table(self) -> str:
        """Return a line for each target."""
        rows = [("target", "inputs", "used", "skipped", "refused", "found")]
        for name in sorted(self.inputs, key=list(self.inputs).index):
            outcomes = self.outcomes.get(name, Counter())
            causes = sum(target == name for target, _ in self.found)
            numbers = (self.inputs[name], outcomes["used"], outcomes["skipped"], outcomes["refused"], causes)
            rows.append((name, *map(str, numbers)))
        return "\n".join(f"{row[0]:22}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


class Driver:
    """Runs targets.

    Args:
        out: folder in which findings are kept; None: they are not.
        limit: seconds for one input.
        memory: bytes that one input may use.
    """

    def __init__(self, out: Path | None = None, limit: float = LIMIT, memory: int = MEMORY) -> None:
        self.out, self.limit, self.memory, self.summary = out, limit, memory, Summary()

    def fuzz(self, minutes: float, targets: Sequence[str] = NAMES, seed: int = 0) -> Summary:
        """Give made inputs to the targets in turn until the time is over."""
        forks.start_server()
        first = forks.CONTEXT.Process(target=int)  # has to wait until the server has imported everything
        first.start()
        first.join()
        end = time.monotonic() + 60 * minutes
        for turn in counting():
            for target in targets:
                left = end - time.monotonic()
                if left <= 0:
                    return self.summary
                self.batch(target, seed_of(seed, target, turn), min(TURN * LONG.get(target, 1), left), sys.maxsize)
        raise AssertionError

    def batch(
        self, target: str, seed: int, seconds: float, count: int, replayed: Iterable[Input] = (), again: bool = False
    ) -> None:
        """Give a batch of inputs to a target in a process of its own.

        An input that hangs is given ``again``, alone: a busy machine may have stood still.
        """
        known = frozenset(signature for name, signature in self.summary.found if name == target)
        folder = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
        log = folder / "log"
        (folder / "home").mkdir()
        job = Job(target, seed, seconds, count, self.limit, self.memory, known, tuple(replayed), folder / "home", log)
        ours, theirs = forks.CONTEXT.Pipe()
        forks.start_server()
        process = forks.CONTEXT.Process(target=work, args=(job, theirs))
        process.start()
        theirs.close()
        try:
            last = self._follow(ours, job)
            if last is not None:
                process.join(5)
                process.kill()
                process.join()
                finding = _death(process.exitcode, log)
                if again or finding.kind != "hang":
                    self._keep(target, finding, last, seed)
                    last = None
        finally:
            process.kill()
            process.join()
            shutil.rmtree(folder, ignore_errors=True)
        if last is not None:
            self.batch(target, seed, seconds, 1, [last], again=True)

    def _follow(self, connection: Connection, job: Job) -> Input | None:
        """Count what a process tells until it ends; return the input that ended it, None if it ended by itself."""
        target, last, wait = job.target, Input("start", b""), START
        while True:
            try:
                if not connection.poll(wait):
                    return last
                kind, *rest = connection.recv()
            except (EOFError, OSError):
                return last
            wait = self.limit + 10
            if kind == "end":
                return None
            if kind == "input":
                (last,) = rest
                self.summary.inputs[target] += 1
            elif kind == "outcome":
                outcomes, finding = rest
                self.summary.outcomes.setdefault(target, Counter()).update(outcomes)
                if finding is not None:
                    self._keep(target, finding, last, job.seed)
            else:
                signature, smallest = rest
                self.summary.found[target, signature].input = smallest
                self._save(self.summary.found[target, signature])

    def _keep(self, target: str, finding: Finding, given: Input, seed: int) -> None:
        key = (target, finding.signature)
        if key not in self.summary.found:
            self.summary.found[key] = Found(target, finding, given, seed)
            self._save(self.summary.found[key])
        self.summary.found[key].times += 1

    def _save(self, found: Found) -> None:
        if self.out is None:
            return
        folder = self.out / found.target
        folder.mkdir(parents=True, exist_ok=True)
        stem = blake2b(found.finding.signature.encode(), digest_size=5).hexdigest()
        for earlier in folder.glob(f"{stem}*"):
            earlier.unlink()
        file = folder / f"{stem}{SEPARATOR}{found.input.name}"
        file.write_bytes(found.input.data)
        story = {"target": found.target, "seed": found.seed, **found.finding._asdict()}
        story["again"] = f"python -m tests.fuzz --replay {file}"
        (folder / f"{stem}.story").write_text(json.dumps(story, indent=1), encoding="utf-8")


def _death(code: int | None, log: Path) -> Finding:
    """Return why a process ended in the middle of an input."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    story = text[max(text.rfind("Timeout ("), text.rfind("Fatal Python error"), len(text) - 8000, 0) :]
    if "Timeout (" in text or code == -signal.SIGKILL:
        kind = "hang"
    else:
        kind = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit with {code}"
    place = "? ?"
    for line in story.splitlines():  # File "x.py", line 3 in function
        words = line.strip().split('"')
        if len(words) == 3 and words[0] == "File " and is_ours(words[1]):
            number, _, function = words[2].removeprefix(", line ").partition(" in ")
            place = f"{Path(words[1]).relative_to(ROOT)}:{number} {function}"
            break
    return Finding(kind, place, "", story[-6000:] if kind.startswith("exit") else story[:6000])


def seed_of(seed: int, target: str, turn: int) -> int:
    """Return the seed of a batch."""
    return int.from_bytes(blake2b(f"{seed} {target} {turn}".encode(), digest_size=5).digest(), "big")


def read_case(path: Path) -> Input:
    """Read a case as it was found: its name after the separator is that of the file."""
    return Input(path.name.rpartition(SEPARATOR)[2], path.read_bytes())
