"""Results of an evaluation: what is read from a file is what the report needs."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_clip.errors import InputError
from lit_clip.evaluation.predictions import predictions_entry, write_predictions
from lit_clip.evaluation.results import Results, read_results

WHOLE: dict[str, Any] = {"value": 0.5, "metrics": {"top1": 0.5}, "confusions": [("cat", "dog", 3)], "errors": []}


def test_a_damaged_result_in_the_cache_is_computed_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.sets["pets"] = {"tasks": {}}
    results.add("pets", "zero_shot", "key", WHOLE)
    assert results.cached("pets", "zero_shot", "key") == json.loads(json.dumps(WHOLE))
    assert results.cached("pets", "zero_shot", "other key") is None
    results.add("pets", "zero_shot", "key", {**WHOLE, "metrics": ["top1"]})
    assert results.cached("pets", "zero_shot", "key") is None


def test_a_result_whose_predictions_are_not_its_own_is_computed_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.sets["pets"] = {"tasks": {}}
    kept = predictions_entry(tmp_path, "pets", "zero_shot", {"key": ["a", "b"]}, ())
    results.add("pets", "zero_shot", "key", {**WHOLE, **kept})
    assert results.cached("pets", "zero_shot", "key") is not None
    write_predictions(tmp_path, "pets", "zero_shot", {"key": ["a", "c"]})
    assert results.cached("pets", "zero_shot", "key") is None
    (tmp_path / kept["predictions"]).unlink()
    assert results.cached("pets", "zero_shot", "key") is None


def test_a_damaged_result_of_another_run_is_one_line_before_the_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"model": {}, "sets": {"pets": {"tasks": {"zero_shot": {"confusions": [3]}}}}}))
    with pytest.raises(InputError, match=r"results.json: .*damaged \(sets.pets.tasks.*confusions"):
        read_results(tmp_path)
