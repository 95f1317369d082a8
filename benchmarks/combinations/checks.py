"""Checks of a finished run, each with the words that say what it shows."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.combinations.runs import STEPS, Run, State


class Check(NamedTuple):
    """Something that a run must show.

    Attributes:
        words: what it shows, for the page.
        function: raises unless it does.
    """

    words: str
    function: Callable[[Run], None]


def assert_close(ours: State, theirs: State, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        found = ours[name].to(value.dtype)
        assert torch.allclose(found, value, rtol=0, atol=tolerance), (
            f"{name}: differs by {(found - value).abs().max():.3g}"
        )


def rounding(run: Run) -> float:
    """The tolerance of sums in another order: none for one process."""
    return 1e-5 if run.trainer.world_size > 1 else 0.0


def _same(run: Run) -> None:
    assert run.end.get("global_step", STEPS) == STEPS  # ranks that Lightning starts itself bring back weights only
    assert_close(run.weights, run.plain, rounding(run))


SAME = Check("the weights of the plain run", _same)


def near(tolerance: float) -> Check:
    """Check for another arithmetic: the weights are near those of the plain run, and it trained."""

    def check(run: Run) -> None:
        assert run.trainer.global_step == STEPS
        assert_close(run.weights, run.plain, tolerance)

    return Check(f"the weights of the plain run within {tolerance:g}", check)


def _trained(run: Run) -> None:
    assert run.trainer.global_step == STEPS
    assert all(bool(value.isfinite().all()) for value in run.weights.values())
    moved = max(float((run.weights[name].float() - value).abs().max()) for name, value in run.before.items())
    assert moved > 1e-4, f"no weight moved by more than {moved:.3g}"


TRAINED = Check("trains to the end", _trained)


def _resumed(run: Run) -> None:
    again = run.resumed()
    assert again.trainer.global_step == run.trainer.global_step
    for states in {"state_dict", "current_model_state"} & run.end.keys():
        assert_close(again.end[states], run.end[states], 0.0)
    for ours, theirs in zip(again.end["optimizer_states"], run.end["optimizer_states"], strict=True):
        assert ours["param_groups"] == theirs["param_groups"]
        for number, state in theirs["state"].items():
            assert_close(ours["state"][number], state, 0.0)


RESUMED = Check("resumes exactly", _resumed)


def stopped_at(step: int) -> Check:
    def check(run: Run) -> None:
        assert run.trainer.global_step == step

    return Check(f"stops after step {step}", check)


def shows(words: str) -> Callable[[Callable[[Run], None]], Check]:
    """Make a check of a function."""
    return lambda function: Check(words, function)


def file(pattern: str) -> Check:
    def check(run: Run) -> None:
        found = [path for path in Path(run.folder).rglob(pattern) if path.stat().st_size]
        assert found or run.trainer.global_rank, f"no {pattern} below {run.folder}"

    return Check(f"writes {pattern}", check)
