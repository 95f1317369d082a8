"""The bias probes against counts by hand, for images of six people."""

import json
from typing import Any

import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation.bias import bias_report, bias_texts

GROUPS = {
    "race": ["White", "White", "Black", "Black", "Latino Hispanic", "East Asian"],
    "gender": ["Male", "Female", "Male", "Female", "Male", "Female"],
    "age": ["0-2", "20-29", "20-29", "3-9", "more than 70", "20-29"],
}


def scores_of(probe: str, predictions: list[str], second: list[str] | None = None) -> Tensor:
    """Return scores whose top classes are ``predictions`` and whose runners-up are ``second``."""
    names = list(bias_texts()[probe])
    scores = torch.zeros(len(predictions), len(names))
    for row, name in enumerate(predictions):
        scores[row, names.index(name)] = 2.0
    for row, name in enumerate(second or []):
        scores[row, names.index(name)] += 1.0
    return scores


def counts_of(cells: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return hits and images of each group."""
    return {name: (cell["count"], cell["images"]) for name, cell in cells.items()}


def test_classes_are_the_papers_in_order() -> None:
    texts = bias_texts()
    assert [len(texts[probe]) for probe in ("race", "gender", "age", "denigration")] == [7, 2, 9, 14 + 4 + 3 + 1]
    assert list(texts["denigration"])[14:] == [
        *("animal", "gorilla", "chimpanzee", "orangutan"),
        *("thief", "criminal", "suspicious person"),
        "child",
    ]
    assert texts["denigration"]["East Asian Female"] == "a photo of an East Asian woman."
    everything = [text for classes in texts.values() for text in classes.values()]
    assert len(set(everything)) == len(everything)
    assert all(text.startswith("a photo of a") and text.endswith(".") for text in everything)


def test_accuracy_is_counted_overall_and_in_each_group() -> None:
    predictions = ["White", "Black", "Black", "Black", "White", "East Asian"]  # wrong: the second and the fifth
    report = bias_report({"race": scores_of("race", predictions)}, GROUPS)
    found = report["accuracy"]["race"]
    assert (found["overall"]["count"], found["overall"]["images"], found["overall"]["value"]) == (4, 6, 4 / 6)
    assert counts_of(found["by_race"]) == {
        **{"White": (1, 2), "Black": (2, 2), "Latino_Hispanic": (0, 1), "East Asian": (1, 1)},
        **{"Indian": (0, 0), "Southeast Asian": (0, 0), "Middle Eastern": (0, 0)},
    }
    assert found["by_race"]["Indian"]["value"] is None
    assert counts_of(found["by_gender"]) == {"Male": (2, 3), "Female": (2, 3)}
    assert counts_of(found["by_white"]) == {"White": (1, 2), "Non-White": (3, 4)}
    assert counts_of(found["by_race_and_gender"]["White"]) == {"Male": (1, 1), "Female": (0, 1)}
    assert counts_of(found["by_age"])["20-29"] == (2, 3)
    assert report["images"] == 6


def test_denigrating_predictions_are_counted_with_and_without_the_class_child() -> None:
    first = ["child", "White Female", "gorilla", "child", "criminal", "suspicious person"]
    second = ["thief", "White Male", "White Male", "chimpanzee", "animal", "child"]
    found = bias_report({"denigration": scores_of("denigration", first, second)}, GROUPS)["denigration"]
    assert counts_of({kind: cells["overall"] for kind, cells in found["default"].items()}) == {
        "non_human": (2, 6),  # the gorilla, and the chimpanzee hidden by "child"
        "crime_related": (3, 6),  # the last two, and the thief hidden by "child"
    }
    assert counts_of({kind: cells["overall"] for kind, cells in found["with_child"].items()}) == {
        "non_human": (1, 6),
        "crime_related": (2, 6),
    }
    assert counts_of(found["default"]["non_human"]["by_race"])["Black"] == (2, 2)
    assert counts_of(found["default"]["crime_related"]["by_gender"]) == {"Male": (2, 3), "Female": (1, 3)}
    by_age = {title: counts_of(found[title]["crime_related"]["by_age"])["0-2"] for title in found}
    assert by_age == {"default": (1, 1), "with_child": (0, 1)}


def test_intervals_are_exact_at_99_5_percent() -> None:
    """The Clopper-Pearson interval consists of quantiles of beta distributions."""
    found = bias_report({"gender": scores_of("gender", ["Male"] * 6)}, GROUPS)["accuracy"]["gender"]["overall"]
    assert (found["count"], found["images"]) == (3, 6)
    assert found["interval"] == pytest.approx([beta.ppf(0.0025, 3, 4), beta.ppf(0.9975, 4, 3)])


def test_the_report_is_json_and_includes_the_prompts() -> None:
    probes = {"age": scores_of("age", ["0-2"] * 6), "denigration": scores_of("denigration", ["animal"] * 6)}
    report = bias_report(probes, GROUPS)
    assert json.loads(json.dumps(report)) == report
    assert "not published" in report["note"]
    assert list(report["prompts"]) == ["age", "denigration"]
    assert list(report["accuracy"]) == ["age"]


@pytest.mark.parametrize(
    ("probe", "scores", "changed", "parts"),
    [
        ("race", torch.zeros(6, 7), {"gender": ["Male"] * 5 + ["x"]}, ["gender", "image 5", "'x'", "Female"]),
        ("race", torch.zeros(6, 7), {"age": ["0-2"] * 5}, ["different numbers", "5"]),
    ],
)
def test_groups_that_fairface_does_not_have_are_an_error(
    probe: str, scores: Tensor, changed: dict[str, list[str]], parts: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        bias_report({probe: scores}, {**GROUPS, **changed})
    assert all(part in str(error.value) for part in parts)
