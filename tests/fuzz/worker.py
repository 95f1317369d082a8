"""The process that gives inputs to a target: one input after another, each with limits of time and memory."""

import faulthandler
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from contextlib import chdir, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings

from lit_clip.errors import InputError
from lit_clip.tools.messages import one_line, user_error
from tests.fuzz.inputs import CANARY, SECRET, SECRET_NAME, Input, Target
from tests.fuzz.oracle import Finding, ForbiddenError, Guard, our_place, wrong_message
from tests.fuzz.targets import find_target

MEMORY = 3 * 2**30  # bytes that an input may have reserved
SHRINKING = 6  # seconds in which a finding is made smaller
WARNINGS = 20  # of one input are a flood


class Job(NamedTuple):
    """Work for a process.

    Attributes:
        target: its name.
        seed: of the inputs.
        seconds: after which it ends.
        count: of inputs after which it ends.
        limit: seconds for one input.
        memory: bytes that one input may use.
        known: signatures of earlier findings, which are only counted.
        replayed: inputs to use in place of made ones.
        folder: empty, for the process alone.
        log: file for its output.
    """

    target: str
    seed: int
    seconds: float
    count: int
    limit: float
    memory: int
    known: frozenset[str]
    replayed: tuple[Input, ...]
    folder: Path
    log: Path


class _Enough(KeyboardInterrupt):
    """Ends hypothesis, which passes on no other exception."""


class _Found(Exception):  # noqa: N818
    """A finding, for hypothesis."""


def work(job: Job, connection: Connection) -> None:
    """Become the process; each input and its outcome are sent through the connection."""
    output = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(HOME=str(job.folder), XDG_CACHE_HOME=str(job.folder / "cache"), OMP_NUM_THREADS="1")
    os.environ[SECRET_NAME] = SECRET
    os.environ.update(TMPDIR=str(job.folder), COLUMNS="200")
    import huggingface_hub.constants
    import torch

    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_OFFLINE = False  # the guard forbids the network; asking for it is a finding
    import tempfile

    tempfile.tempdir = None
    _Worker(job, connection).run()


def _limit_memory() -> None:
    reserved = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak_memory() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class _Worker:
    def __init__(self, job: Job, connection: Connection) -> None:
        self.job, self.connection = job, connection
        self.target: Target = find_target(job.target)
        self.known = set(job.known)
        self.log = job.log.open("a", encoding="utf-8")
        self.done = 0
        self.smallest: dict[str, Input] = {}  # signature -> the smallest input that was found to have it
        self.shrinking, self.since = "", 0.0
        self.end = 0.0
        sys.path.insert(0, "")  # as of `python -m`

    def run(self) -> None:
        with warnings.catch_warnings(record=True) as self.warnings:  # with the filters that users have
            self._run()
        self.connection.send(("end",))

    def _run(self) -> None:
        strategy = self.target.inputs()  # also prepares the whole files, which writes some
        self._start()
        if self.job.replayed:
            for each in self.job.replayed:
                self.attempt(each)
        else:
            number = 0
            while not self.done or (time.monotonic() < self.end and self.done < self.job.count):
                self._explore(strategy, number)
                number += 1

    def _start(self) -> None:
        self.guard = Guard()
        self.end = time.monotonic() + self.job.seconds
        _limit_memory()

    def _explore(self, strategy: Any, number: int) -> None:
        """Make inputs until one has a new finding, and make that smaller."""
        phases = [Phase.generate] if self.target.bytewise else [Phase.generate, Phase.shrink]
        left = max(1, self.job.count - self.done)

        @seed(self.job.seed * 1000 + number)
        @settings(
            max_examples=min(left, 10_000),
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(strategy)
        def use(made: Input) -> None:
            self._use(made)

        self.shrinking = ""
        try:
            with suppress(_Found, _Enough):
                use()
        except Exception as error:  # while an input is made; it ends the process, as a fault of the fuzzer
            vars(error).pop("__notes__", None)  # the whole strategy in 20,000 characters, at the end of the log
            raise
        if self.shrinking and self.target.bytewise:
            self._leave_out_bytes(self.shrinking)
        if self.shrinking:
            self.connection.send(("smallest", self.shrinking, self.smallest[self.shrinking]))

    def _use(self, made: Input) -> None:
        now = time.monotonic()
        over = now > self.since + SHRINKING if self.shrinking else now > self.end or self.done >= self.job.count
        if over and self.done:
            raise _Enough
        finding = self.attempt(made)
        if finding is None:
            return
        signature = finding.signature
        if signature not in self.known:
            self.known.add(signature)
            if not self.shrinking:
                self.shrinking, self.since = signature, time.monotonic()
            self.smallest[signature] = made
        if signature == self.shrinking:
            self._note(signature, made)
            raise _Found

    def _note(self, signature: str, made: Input) -> None:
        if len(made.data) <= len(self.smallest[signature].data):
            self.smallest[signature] = made

    def _leave_out_bytes(self, signature: str) -> None:
        """Leave out parts of an input as long as the finding stays."""
        best, since = self.smallest[signature], time.monotonic()
        size = len(best.data) // 2
        while size and time.monotonic() < since + SHRINKING:
            start, smaller = 0, False
            while start < len(best.data) and time.monotonic() < since + SHRINKING:
                made = best._replace(data=best.data[:start] + best.data[start + size :])
                found = self.attempt(made)
                if found is not None and found.signature == signature:
                    best, smaller = made, True
                else:
                    start += size
            size = size if smaller and size < len(best.data) else size // 2
        self.smallest[signature] = best

    def attempt(self, given_: Input) -> Finding | None:
        """Give one input to the target and tell the parent the outcome."""
        self.done += 1
        self.connection.send(("input", given_))
        folder = self.job.folder / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / f"{CANARY}.py").write_text("", encoding="utf-8")
        before = _peak_memory()
        faulthandler.dump_traceback_later(self.job.limit, exit=True, file=self.log)
        try:
            with chdir(folder):
                outcomes, finding = self._outcome(folder, given_)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if finding is None and _peak_memory() > before + self.job.memory:
            finding = Finding("memory", "? ?", f"{(_peak_memory() - before) >> 20} MB", "")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        ours = [str(each.message) for each in self.warnings]
        self.warnings.clear()
        if finding is None and len(ours) > WARNINGS:
            finding = Finding("flood of warnings", "? ?", ours[0][:200], "\n".join(ours[:5]))
        self.connection.send(("outcome", outcomes, finding))
        return finding

    def _outcome(self, folder: Path, given_: Input) -> tuple[list[str], Finding | None]:
        outcomes: list[str] = []
        finding = None
        with self.guard.watching(folder):
            try:
                outcomes = list(self.target.run(folder, given_))
            except (Exception, SystemExit) as error:
                finding = self._judged(error, folder, given_)
                outcomes = [] if finding else ["refused"]
        if self.guard.broken and not self.target.own:
            rule, what = self.guard.broken[0]
            stack = finding.traceback if finding else ""
            finding = Finding(rule, finding.place if finding else "? ?", what, stack)
        return outcomes, finding

    def _judged(self, error: Exception | SystemExit, folder: Path, given_: Input) -> Finding | None:
        """Return what is wrong with an exception; None: it is a refusal."""
        if isinstance(error, ForbiddenError) or (self.guard.broken and self.target.own):
            return None
        bug = isinstance(error, AssertionError | SystemExit)
        refusal = None if bug else user_error(error)
        story = "".join(traceback.format_exception(error))[-6000:]
        if refusal is None:
            return Finding(type(error).__name__, our_place(error.__traceback__), str(error)[:300], story)
        names = (given_.name, str(folder)) if self.target.named else ()
        # Other libraries' messages of several lines are made one by the command line.
        ours = refusal if isinstance(refusal, InputError) else InputError(one_line(refusal))
        problem = wrong_message(ours, names)
        if not problem:
            return None
        return Finding(problem, our_place(refusal.__traceback__), str(refusal)[:300], story)
