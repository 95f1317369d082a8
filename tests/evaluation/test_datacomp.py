"""DataComp's metrics and means, against scikit-learn and loops written after its scripts and WILDS's."""

from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score

from lit_clip.errors import InputError
from lit_clip.evaluation.datacomp import ALL, GROUPS, OTHER_METRICS, PREFIX
from lit_clip.evaluation.overview import GroupMean, group_means, rows
from lit_clip.evaluation.scores import baseline, evaluate_scores
from lit_clip.evaluation.suite import read_suite
from lit_clip.evaluation.targets import Targets
from tests.conftest import ROOT

NAN = float("nan")


@pytest.mark.parametrize("classes", [2, 9, 40])
def test_macro_f1_is_scikit_learns_over_the_classes_that_have_images(classes: int) -> None:
    scores, labels = torch.randn(61, classes), torch.randint(classes, (61,))
    labels[labels == classes - 1] = 0  # the last class is predicted but has no images
    found = evaluate_scores("macro_f1", scores, Targets(labels, classes))
    expected = f1_score(labels, scores.argmax(1), average="macro", labels=labels.unique(), zero_division=0.0)  # pyright: ignore[reportArgumentType]
    assert found["macro_f1"] == pytest.approx(expected)
    assert next(iter(found)) == "macro_f1"
    assert "top1" in found


def grouped(labels: torch.Tensor, groups: list[str], classes: int) -> Targets:
    return Targets(labels, classes, groups={"region": groups})


@pytest.mark.parametrize(("metric", "within"), [("worst_group_top1", 1), ("worst_group_top5", 5)])
def test_worst_group_is_the_lowest_mean_of_a_group_with_images(metric: Any, within: int) -> None:
    scores, labels = torch.randn(80, 11), torch.randint(11, (80,))
    groups = [str((n * n) % 7) for n in range(80)]  # 3, 5 and 6 do not occur
    right: dict[str, list[bool]] = {}
    for row, group in enumerate(groups):
        right.setdefault(group, []).append(int(labels[row]) in scores[row].topk(within).indices.tolist())
    expected = min(sum(of_group) / len(of_group) for of_group in right.values())
    found = evaluate_scores(metric, scores, grouped(labels, groups, 11))
    assert found[metric] == pytest.approx(expected)
    assert found[metric] < found[f"top{within}"]


def test_an_image_with_a_nan_is_wrong_in_its_group() -> None:
    scores = torch.tensor([[NAN, 0.0], [1.0, 0.0], [1.0, 0.0]])
    targets = grouped(torch.zeros(3, dtype=torch.int64), ["a", "a", "b"], 2)
    assert evaluate_scores("worst_group_top1", scores, targets)["worst_group_top1"] == 0.5
    assert evaluate_scores("macro_f1", scores, targets)["macro_f1"] == pytest.approx(2 * 2 / (2 + 3))


def test_baselines_are_those_of_the_best_single_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    targets = grouped(labels, ["a", "a", "b", "a", "b", "b"], 4)
    constant = [f1_score(labels, torch.full((6,), c), average="macro", labels=labels.unique()) for c in (0, 1, 3)]  # pyright: ignore[reportArgumentType]
    assert baseline("macro_f1", targets) == pytest.approx(max(constant))
    assert baseline("worst_group_top1", targets) == pytest.approx(1 / 3)  # class 0: 2 of 3, and 1 of 3
    assert baseline("worst_group_top5", targets) is None
    assert baseline("text_score", targets) is None


@pytest.mark.parametrize("groups", [None, {}, {"race": ["a"], "age": ["b"]}])
def test_worst_group_without_groups_of_one_kind_is_an_error(groups: Any) -> None:
    with pytest.raises(InputError, match="worst_group_top1"):
        evaluate_scores("worst_group_top1", torch.zeros(1, 2), Targets(torch.tensor([0]), 2, groups=groups))


def test_suite_has_the_38_sets_with_datacomps_metrics() -> None:
    entries = read_suite(ROOT / "configs/evaluation/datacomp.yaml")
    names = [name.removeprefix(PREFIX) for name in entries]
    assert sorted(names) == sorted(set(GROUPS[ALL]))
    assert [len(members) for members in GROUPS.values()] == [1, 6, 13, 3, 38]
    assert {
        name.removeprefix(PREFIX): entry.metric for name, entry in entries.items() if entry.metric != "top1"
    } == OTHER_METRICS
    for entry in entries.values():
        assert len(entry.tasks or ()) == 1
        assert entry.how_to_get


def results(**changed: Any) -> dict[str, dict[str, Any]]:
    """Results of all 38 sets: 0.00, 0.01, ... in the suite's order."""
    entries = read_suite(ROOT / "configs/evaluation/datacomp.yaml")
    found: dict[str, dict[str, Any]] = {}
    for number, (name, entry) in enumerate(entries.items()):
        assert entry.tasks
        value, metric = number / 100, entry.metric
        recalls = {"image_to_text_recall@1": value + 0.1, "text_to_image_recall@1": value - 0.1}
        recalls |= {"merged_image_to_text_recall@1": 0.9, "text_to_image_recall@5": 0.9}  # of no mean
        metrics = recalls if metric == "recall@1" else {metric: value}
        found[name] = {"metric": metric, "tasks": {entry.tasks[0]: {"value": value, "metrics": metrics}}}
    return {**found, **changed}


def means_of(sets: dict[str, dict[str, Any]]) -> dict[str, GroupMean]:
    means = group_means(rows({"sets": sets}), "zero_shot")
    return {mean.group.removeprefix("DataComp, "): mean for mean in means}


def test_means_are_those_of_aggregate_scores() -> None:
    sets = results(another={"metric": "top1", "tasks": {"zero_shot": {"value": 1.0}}})
    means = means_of(sets)
    assert list(means)[-1] == ALL
    assert means[ALL].ours == pytest.approx(sum(range(38)) / 100 / 38)
    assert (means[ALL].sets, means[ALL].missing) == (38, [])
    numbers = {name.removeprefix(PREFIX): number / 100 for number, name in enumerate(list(sets)[:38])}
    shifts = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
    expected = sum(numbers[name] for name in shifts) / 6
    assert means["ImageNet distribution shifts"].ours == pytest.approx(expected)
    assert means["ImageNet"].ours == numbers["imagenet1k"]
    retrieval = ("flickr30k", "mscoco_captions", "winogavil")  # the first two by the mean of both directions
    assert means["Retrieval"].ours == pytest.approx(sum(numbers[name] for name in retrieval) / 3)


@pytest.mark.parametrize(
    "entry",
    [
        {"metric": "top1", "tasks": {}},
        {"metric": "top1", "tasks": {"zero_shot": {"value": NAN}}},
        {"metric": "top1", "tasks": {"zero_shot": {}}},
        {"metric": "mean_per_class", "tasks": {"zero_shot": {"value": 0.5}}},
    ],
)
def test_without_one_set_its_groups_have_no_mean(entry: dict[str, Any]) -> None:
    means = means_of(results(datacomp_sun397=entry))
    missing = {group: mean.missing for group, mean in means.items() if mean.ours is None}
    assert missing == {"VTAB": ["datacomp_sun397"], ALL: ["datacomp_sun397"]}
    assert means_of({"datacomp_sun397": entry}) == {}
