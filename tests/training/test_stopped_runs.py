"""A run stopped up to three times, anywhere and by anything, ends as the run that nothing stopped: bit for bit."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.small_sets import write_table
from tests.helpers.stopped_runs import PAIRS, STEPS, check

TRAINERS: list[dict[str, Any]] = [
    {},
    {"limit_val_batches": 0},
    {"check_val_every_n_epoch": 2},
    {"val_check_interval": 0.5},
    {"val_check_interval": 2},
    {"val_check_interval": 7, "check_val_every_n_epoch": None},
    {"limit_train_batches": 3},
    {"max_steps": 13},
    {"max_steps": 13, "max_epochs": -1, "check_val_every_n_epoch": 2},
]
SAVERS: list[dict[str, Any]] = [
    *({"every_n_train_steps": steps} for steps in (1, 2, STEPS, 7)),
    {},  # after each validation
    {"every_n_epochs": 2},
    {"save_on_train_epoch_end": True},
]
PARTS = ["", "ema", "hard batches", "stored features"]
Case = tuple[str, list[list[Any]]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A run's settings as JSON, and up to three stops in the order of their steps."""
    run = [draw(st.sampled_from(TRAINERS)), draw(st.sampled_from(SAVERS)), draw(st.sampled_from(PARTS))]
    run.append(draw(st.sampled_from([None, 1])))
    stop = st.tuples(
        st.sampled_from(["kill", "save", "term"]),
        st.sampled_from(["step", "step", "validation", "epoch"]),
        st.integers(1, 4 * STEPS - 1),
    )
    stops = draw(st.lists(stop, min_size=1, max_size=3))
    return json.dumps(run), sorted(map(list, stops), key=lambda each: each[2])


SECOND_RESUME = (
    json.dumps([{}, {"every_n_train_steps": STEPS}, "", None]),
    [["kill", "step", STEPS], ["kill", "step", 2 * STEPS + 1]],
)
SAVED_IN_A_LAST_STEP = (json.dumps([{}, {}, "", None]), [["save", "step", STEPS - 1]])
NO_DEADLINE: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stopped")
    yield folder
    shutil.rmtree(folder)  # a gigabyte of checkpoints


@pytest.fixture(scope="module")
def table(folder: Path) -> str:
    return str(write_table(folder, PAIRS))


@example(SECOND_RESUME)
@example(SAVED_IN_A_LAST_STEP)
@example((json.dumps([{"limit_val_batches": 0}, {"every_n_train_steps": STEPS}, "", None]), [["kill", "step", STEPS]]))
@given(cases())
@settings(max_examples=2, derandomize=True, **NO_DEADLINE)
def test_a_run_that_is_stopped_and_resumed_ends_as_the_run_that_nothing_stopped(
    folder: Path, table: str, case: Case
) -> None:
    assert check(folder, table, *case) == []


@pytest.mark.slow
@given(cases())
@settings(max_examples=300, **NO_DEADLINE)
def test_any_run_that_is_stopped_and_resumed_ends_as_the_run_that_nothing_stopped(
    folder: Path, table: str, case: Case
) -> None:
    assert check(folder, table, *case) == []


def of_two_ranks(number: int) -> st.SearchStrategy[list[Case]]:
    """A known case and a number of others, one after the other on the same ranks."""
    return st.lists(cases(), min_size=number, max_size=number).map(lambda drawn: [SECOND_RESUME, *drawn])


def check_two_ranks(folder: Path, table: str, drawn: list[Case]) -> None:
    run_lightning_ranks(
        2, folder, str(ROOT / "tests/helpers/stopped_runs.py"), str(folder), table, json.dumps(drawn), timeout=300
    )
    for rank in range(2):
        assert json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) == [[] for _ in drawn]


@given(of_two_ranks(1))
@settings(max_examples=1, derandomize=True, **NO_DEADLINE)
def test_two_ranks_that_are_stopped_and_resumed_end_as_those_that_nothing_stopped(
    folder: Path, table: str, drawn: list[Case]
) -> None:
    check_two_ranks(folder, table, drawn)


@pytest.mark.slow
@given(of_two_ranks(2))
@settings(max_examples=40, **NO_DEADLINE)
def test_any_two_ranks_that_are_stopped_and_resumed_end_as_those_that_nothing_stopped(
    folder: Path, table: str, drawn: list[Case]
) -> None:
    check_two_ranks(folder, table, drawn)
