"""The contract of a loss: every loss, ours or a user's, equals a plain loop on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks_losses import CASES, COUNTS, PARTS_ELSEWHERE, save_teacher


@pytest.mark.parametrize(
    ("world", "parts"),
    [
        (1, ["features", "each step"]),
        (3, ["features", "own step"]),
        # Three ranks have all that two have.
        pytest.param(2, ["features", "each step"], marks=pytest.mark.slow),
        pytest.param(3, ["each step"], marks=pytest.mark.slow),
    ],
)
def test_value_and_gradients_equal_a_plain_loop_over_all_pairs(
    world: int, parts: list[str], ranks: Callable[..., None], tmp_path: Path
) -> None:
    """Gradients of features, scale, bias and a loss's own parameters, and of the model after a DDP step.

    Cases and loops are in ``helpers/ranks_losses.py``: uneven pairs, a rank without pairs, micro-batches, hard
    negatives.
    """
    teacher = save_teacher(tmp_path)
    ranks("losses", world, str(tmp_path / "errors.json"), teacher, *parts, script="ranks_losses.py")
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    steps = len(CASES) - len(PARTS_ELSEWHERE) * ("own step" in parts) if parts != ["features"] else 0
    assert len(errors) == len(CASES) * len(COUNTS[world]) * ("features" in parts) + steps
    assert max(errors.values()) < 1e-8, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_a_step_gathers_the_texts_once_and_reduces_their_gradient_once(
    ranks: Callable[..., None], tmp_path: Path
) -> None:
    """Four collectives of the softmax loss and two of the sigmoid loss; duplicates take one or two more to find."""
    ranks("collectives", 2, str(tmp_path / "names.json"), script="ranks_losses.py")
    found = json.loads((tmp_path / "names.json").read_text(encoding="utf-8"))
    one, two = ["allgather_base"], ["allreduce", "allreduce"]  # the second pair is a log-sum-exp
    for counts, scatter in (((4, 4), "reduce_scatter_base"), ((5, 3), "allreduce")):
        for policy, ids in {"negatives": 0, "ignored": 1, "positives": 2}.items():
            softmax = one * (1 + ids) + two
            assert found[f"softmax {policy}, {counts}"] == [*softmax, scatter]
            with_hard = found[f"softmax {policy}, hard negatives, {counts}"]
            assert with_hard[:-1] == [*softmax, *one, scatter]
            assert with_hard[-1] in ("reduce_scatter_base", "allreduce")
            assert found[f"sigmoid {policy}, {counts}"] == [*one * (1 + min(ids, 1)), scatter]
