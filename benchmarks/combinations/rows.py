"""Rows of the table, and how they are added."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, loggers

from benchmarks.combinations.checks import Check
from benchmarks.combinations.runs import SAVED_AT, Run

Settings = Callable[[Path], dict[str, Any]]
GROUPS = (
    TRAINER := "Options of the trainer",
    STRATEGIES := "Strategies and plugins",
    CALLBACKS := "Lightning's callbacks",
    LOGGERS := "Loggers and profilers",
    OURS := "lit_clip's callbacks and options",
)


def nothing(folder: Path) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Row:
    """A setting and its outcome.

    Attributes:
        group: heading of the page.
        name: as a user writes it.
        trainer: settings of the trainer, given a folder to write to.
        model: settings of ``LitCLIP``.
        data: settings of the data module.
        checks: of a run that works.
        refused: part of the line that refuses it; empty if it works.
        covers: names of Lightning that need no other row.
        world: number of ranks.
        devices: ``trainer.devices``.
        environment: variables of the processes.
        launched: whether Lightning starts the ranks.
        quick: whether it is run by ``make test``.
        saved_at: step of the checkpoint to resume from.
    """

    group: str
    name: str
    trainer: Settings = nothing
    model: Settings = nothing
    data: Settings = nothing
    checks: Sequence[Check] = ()
    refused: str = ""
    covers: Sequence[str] = ()
    world: int = 1
    devices: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    launched: bool = False
    quick: bool = False
    saved_at: int = SAVED_AT


PLAIN = Row("plain", "plain")
ROWS: list[Row] = []


def works(
    group: str, name: str, *checks: Check, ranks: Sequence[int] = (1, 2), quick: Sequence[int] = (), **settings: Any
) -> None:
    """Add a row that works for each number of ranks."""
    for world in ranks:
        row = {"world": world, "devices": world, "quick": world in quick, **settings}
        ROWS.append(Row(group, name, checks=checks, **row))


def refused(group: str, name: str, line: str, ranks: Sequence[int] = (1,), **settings: Any) -> None:
    """Add a row that is refused with a line that contains ``line``; the first is quick."""
    for world in ranks:
        row = {"world": world, "devices": world, "quick": world == ranks[0], **settings}
        ROWS.append(Row(group, name, refused=line, **row))


def using(*made: Callable[[], Callback] | type[Callback]) -> Settings:
    """Settings with callbacks that are made for each run."""
    return lambda folder: {"callbacks": [make() for make in made]}


def option(**values: Any) -> Settings:
    return lambda folder: values


def columns(run: Run) -> str:
    """Return the names of all metrics that a CSV logger has written."""
    return " ".join(path.read_text().partition("\n")[0] for path in run.folder.rglob("metrics.csv"))


def csv_logger(folder: Path) -> dict[str, Any]:
    return {"logger": loggers.CSVLogger(folder), "log_every_n_steps": 1}


def strategy(make: Callable[[], Any], **values: Any) -> Settings:
    return lambda folder: {"strategy": make(), **values}


def callback(make: Callable[[Path], Callback], **values: Any) -> Settings:
    return lambda folder: {**values, "callbacks": [make(folder)]}
