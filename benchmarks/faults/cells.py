"""Run one cell of the matrix: a fault over a source, a number of ranks and of data workers."""

import os
import random
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.faults.catalogue import BY_NAME, FAULTS, STORE_TIMEOUT, Fault, Scene
from benchmarks.faults.clock import turn_clock
from benchmarks.faults.runs import EVERY, STEPS, Run, Settings
from benchmarks.faults.server import Store
from benchmarks.faults.sources import write_sources
from tests.helpers import disks

SOURCES = ("table", "tars", "store")
RANKS = (1, 2, 3)
WORKERS = (0, 2)
REGULAR_LIMIT = 150.0  # seconds of a run that nothing happens to, on a busy machine
EXACT = 2  # ranks; with more, DDP's sums round differently after a resume, because it rebuilds its buckets
TOLERANCE = 1e-6  # of each weight then


class Cell(NamedTuple):
    """A cell: names of a fault and a source, and numbers of ranks and of data workers for each."""

    fault: str
    source: str
    ranks: int
    workers: int

    def __str__(self) -> str:
        return f"{self.fault}-{self.source}-{self.ranks}-{self.workers}"


class Outcome(NamedTuple):
    """What a cell came to.

    Attributes:
        outcome: ``same`` (the run went on), ``clear end`` (it ended in time, with the right exit code and line, and the
            resumed run is the same), ``skipped``, or ``other``.
        seconds: from the fault to the end of the run.
        message: its line about what happened; or why the outcome is another.
        ids_equal: whether each rank was given the same samples in the same order as without the fault.
        weights_equal: whether the last weights are those of the run without the fault.
    """

    outcome: str
    seconds: float = 0.0
    message: str = ""
    ids_equal: bool | None = None
    weights_equal: bool | None = None


class Expected(NamedTuple):
    """The run without a fault: the record of each rank, and the last weights."""

    steps: list[list[str]]
    weights: dict[str, torch.Tensor]


def all_cells() -> list[Cell]:
    """Return the whole matrix."""
    return [
        Cell(fault.name, source, ranks, workers)
        for fault in FAULTS
        for source in fault.sources
        for ranks in RANKS
        for workers in WORKERS
        if ranks >= fault.ranks and (workers or not fault.workers)
    ]


class Harness:
    """Runs cells; the runs without a fault are kept.

    Args:
        folder: for the data and for each cell's files.
        store: serves ``folder``'s data.
        seed: of the moment and the rank to hit.
    """

    def __init__(self, folder: Path, store: Store, seed: int = 0) -> None:
        self.folder, self.store, self.seed = folder, store, seed
        self._expected: dict[tuple[str, int], Expected] = {}
        self._no_disk = disks.why_no_disk()
        (folder / "data").mkdir()
        write_sources(folder / "data")

    def _data(self, source: str) -> str:
        if source == "store":
            return f"{self.store.url}/pairs.csv"
        return str(self.folder / "data" / ("pairs.csv" if source == "table" else "shards"))

    def _settings(self, cell: Cell, needs: str = "") -> Settings:
        place = self.folder / str(cell)
        (place / "run").mkdir(parents=True)
        return Settings(
            place / "run",
            place / "first",
            self._data(cell.source),
            cell.ranks,
            cell.workers,
            group_timeout=needs == "group_timeout",
            store_timeout=STORE_TIMEOUT if needs == "store_timeout" else None,
        )

    def expected(self, cell: Cell) -> Expected:
        """Return the run without a fault, which is the same for any number of data workers."""
        key = (cell.source, cell.ranks)
        if key not in self._expected:
            settings = self._settings(cell._replace(fault="none", workers=0))
            run = Run(settings)
            code = run.wait(REGULAR_LIMIT)
            run.kill()
            assert code == 0, run.output()
            self._expected[key] = Expected([run.steps(rank) for rank in run.ranks], _weights(settings.folder))
            assert all(len(steps) == STEPS for steps in self._expected[key].steps)
            shutil.rmtree(settings.folder.parent)
        return self._expected[key]

    def run(self, cell: Cell, point: int = 0) -> Outcome:
        """Run a cell; ``point`` chooses another moment.

        Whatever happens, no process, mount or file of it is left.
        """
        fault = BY_NAME[cell.fault]
        if fault.needs == "disk" and self._no_disk:
            return Outcome("skipped", message=self._no_disk)
        expected = self.expected(cell)
        chance = random.Random(f"{self.seed} {point} {cell}")
        place = self.folder / str(cell)
        try:
            with ExitStack() as stack:
                return self._run(cell, fault, expected, chance, stack)
        except AssertionError as error:
            return Outcome("other", message=str(error) or "assertion")
        finally:
            self.store.set("well")
            shutil.rmtree(place, ignore_errors=True)

    def _run(self, cell: Cell, fault: Fault, expected: Expected, chance: random.Random, stack: ExitStack) -> Outcome:
        scene = self._start(cell, fault, chance, stack)
        run, settings = scene.run, scene.run.settings
        run.wait_for_step(chance.randrange(2, 7))
        time.sleep(chance.random() * 0.06)
        start = time.monotonic()
        fault.act(scene)
        code = run.wait(fault.limit)
        seconds = time.monotonic() - start
        if code is None and fault.codes:
            return Outcome("other", seconds, f"had not ended after {fault.limit:g} s: {_last(run)}")
        problem, message = _judge(fault, code, run)
        if fault.sources == ("store",) and self.store.refused == 0:
            return Outcome("other", seconds, "the fault came too late")
        run.kill()
        ids, end, goes_on = _prefix(run, expected), run, fault.codes == (0,)
        if not goes_on:
            fault.undo(scene)
            end, kept = self._resume(run, stack, twice=fault.name == "clock_corrected")
            if end.wait(0) != 0:
                return Outcome("other", seconds, f"the resumed run failed: {_last(end)}", ids)
            problem = problem or ("" if kept else "a newer checkpoint was ignored")
        ids = ids and _rest(end, expected)
        folder = scene.disk.seen(settings.folder) if scene.disk else settings.folder
        weights = _close(_weights(folder), expected, cell.ranks)
        if problem or not ids or not weights:
            return Outcome("other", seconds, problem or message, ids, weights)
        return Outcome("same" if goes_on else "clear end", seconds, message, ids, weights)

    def _start(self, cell: Cell, fault: Fault, chance: random.Random, stack: ExitStack) -> Scene:
        """Start a run with what the fault needs; the stack ends both."""
        settings = self._settings(cell, fault.needs)
        disk = stack.enter_context(disks.mounted(settings.folder)) if fault.needs == "disk" else None
        clock = settings.folder.parent / "clock" if fault.needs == "clock" else None
        if clock is not None:
            turn_clock(clock, 0.0)
        run = Run(settings._replace(disk=disk.holder if disk else None, clock=clock))
        stack.callback(run.kill)
        return Scene(run, self.store, disk, clock, chance)

    def _resume(self, killed: Run, stack: ExitStack, twice: bool) -> tuple[Run, bool]:
        """Return the resumed run at its end, and whether it lost no more than the steps since the last checkpoint.

        With ``twice`` the resumed run is killed after another checkpoint and resumed again.
        """
        settings, kept = killed.settings._replace(group_timeout=False, store_timeout=None), True
        for name in ("second", "third") if twice else ("second",):
            run = Run(settings._replace(record=settings.record.with_name(name)))
            stack.callback(run.kill)
            if twice and name == "second":
                run.wait_for_step(STEPS - EVERY + 1)
                run.kill()
            else:
                run.wait(REGULAR_LIMIT)
            kept, killed = kept and _kept(killed, run), run
        return killed, kept


def _judge(fault: Fault, code: int | None, run: Run) -> tuple[str, str]:
    """Return what is wrong with the end of a run (empty: nothing), and the line that says what happened."""
    output = run.output()
    lines = [line for line in output.splitlines() if line.startswith("lit-clip: ")]
    found = next((line for line in lines if fault.line and re.search(fault.line, line)), "")
    if fault.codes and code not in fault.codes:
        return f"exit code {code} instead of {fault.codes[0]}: {_last(run)}", found
    if fault.line and not found:
        return f"no such line: {_last(run)}", found
    if "Traceback (most recent call last)" in output and fault.codes != (-9,):
        return f"a traceback: {found or _last(run)}", found
    return "", found


def _last(run: Run) -> str:
    lines = run.output().split("\n")
    ours = [line for line in lines if line.startswith("lit-clip: ")]
    return (ours or [line for line in lines if line.strip()] or [""])[-1]


def _prefix(run: Run, expected: Expected) -> bool:
    """Whether the samples up to the fault are the expected ones; the last line may have been cut."""
    return all(
        all(line == wanted for line, wanted in zip(run.steps(rank)[:-1], steps, strict=False))
        for rank, steps in zip(run.ranks, expected.steps, strict=True)
    )


def _rest(run: Run, expected: Expected) -> bool:
    """Whether a resumed run's samples are the expected ones from its first step on."""
    return all(
        run.steps(rank) == steps[STEPS - len(run.steps(rank)) :] and run.steps(rank)
        for rank, steps in zip(run.ranks, expected.steps, strict=True)
    )


def _kept(killed: Run, resumed: Run) -> bool:
    """Whether a resumed run began at the last checkpoint that the killed one can have finished."""
    begun = [line.split()[0] for line in killed.steps() if line.split()]
    first = [line.split()[0] for line in resumed.steps() if line.split()]
    if not begun or not first:
        return False
    done = max(int(begun[-1]) - 1, 0)  # the checkpoint after that step may not have been finished
    return int(first[0]) >= done // EVERY * EVERY


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights after the last step."""
    found = sorted(folder.rglob(f"*step={STEPS}.ckpt"), key=os.path.getmtime)
    assert found, f"no checkpoint of step {STEPS}"
    return torch.load(found[-1], weights_only=True)["state_dict"]


def _close(weights: dict[str, torch.Tensor], expected: Expected, ranks: int) -> bool:
    """Whether weights are the expected ones: bit for bit, or to ``TOLERANCE`` where DDP rounds differently."""
    if weights.keys() != expected.weights.keys():
        return False
    if ranks <= EXACT:
        return all(torch.equal(weights[name], value) for name, value in expected.weights.items())
    return all(bool((weights[name] - value).abs().max() <= TOLERANCE) for name, value in expected.weights.items())
