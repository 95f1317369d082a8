"""Steps in which several images of a thing are right for its texts: a plain loop."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks_things import COUNTS, DIVIDED, LOSSES, SIZES, table_of


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_value_and_gradients_equal_a_plain_loop_over_things(
    world: int, ranks: Callable[..., None], tmp_path: Path
) -> None:
    ranks("gradients", world, str(tmp_path / "errors.json"), table_of(tmp_path), script="ranks_things.py")
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    assert len(errors) == len(LOSSES) * len(COUNTS[world]) * len(SIZES)
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_value_and_gradients_of_means_of_images_equal_a_plain_loop(
    world: int, ranks: Callable[..., None], tmp_path: Path
) -> None:
    ranks("means", world, str(tmp_path / "errors.json"), script="ranks_things.py")
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    assert len(errors) == len(DIVIDED[world]) * len(SIZES)
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda item: -item[1])[:5]
