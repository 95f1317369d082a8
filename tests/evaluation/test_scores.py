"""Metrics of the paper's and DataComp's evaluation, each against a plain loop, the devkit's rule or scikit-learn."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation import scores as module
from lit_clip.evaluation.data import LabelledImages, Truth
from lit_clip.evaluation.overlap import clopper_pearson
from lit_clip.evaluation.overview import GroupMean, group_means, rows
from lit_clip.evaluation.published import datacomp_groups
from lit_clip.evaluation.scores import baseline, baselines, comparable, evaluate_scores
from lit_clip.evaluation.suite import read_suite
from lit_clip.evaluation.targets import Targets
from tests.conftest import ROOT

NAN = float("nan")


def labelled(*labels: int, classes: int = 3, **knowledge: Any) -> Targets:
    return Targets(torch.tensor(labels), classes, **knowledge)


def test_mean_per_class_equals_scikit_learns_balanced_accuracy() -> None:
    scores, labels = torch.randn(97, 8), torch.randint(1, 7, (97,))  # classes 0 and 7 have no images
    found = evaluate_scores("mean_per_class", scores, Targets(labels, 8))
    prediction = scores.argmax(1)
    seen = torch.isin(prediction, labels)  # scikit-learn counts a class that is only predicted
    prediction[~seen] = (labels[~seen] % 6) + 1
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, prediction))
    assert next(iter(found)) == "mean_per_class"


def test_an_image_with_a_nan_score_is_wrong_in_every_single_class_metric() -> None:
    scores = torch.tensor([[NAN, 0.0, 0.0], [1.0, NAN, 0.0], [1.0, 0.0, 0.0]])
    targets = labelled(0, 0, 0, candidates=[[0, 2], [0, 1], [0, 1]], accepted=[{0}] * 3, neighbours=[(0, [2]), (2, [])])
    assert evaluate_scores("top1", scores, targets)["top1"] == pytest.approx(1 / 3)
    assert evaluate_scores("lexicon", scores, targets)["lexicon"] == pytest.approx(1 / 3)
    assert evaluate_scores("pm", scores, targets)["pm0"] == 0.5
    wide = torch.zeros(1, 7)
    wide[0, 6] = NAN
    assert evaluate_scores("top1", wide, labelled(0, classes=7))["top5"] == 0


def test_mean_top1_top5_is_the_mean_of_both() -> None:
    scores, targets = torch.randn(53, 9), Targets(torch.randint(9, (53,)), 9)
    found = evaluate_scores("mean_top1_top5", scores, targets)
    assert found["mean_top1_top5"] == pytest.approx((found["top1"] + found["top5"]) / 2)
    assert 0 < found["top1"] < found["top5"]


def eleven_points(scores: list[float], right: list[bool]) -> float:
    """The definition in fractions: for each recall the best precision of any threshold that reaches it."""
    total = sum(right)
    points = []
    for threshold in sorted(set(scores)):
        found = [r for s, r in zip(scores, right, strict=True) if s >= threshold]
        points.append((Fraction(sum(found), total), Fraction(sum(found), len(found))))
    return float(sum(max(p for r, p in points if r >= Fraction(i, 10)) for i in range(11)) / 11)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("N", [1, 5, 83])
def test_map11_equals_a_plain_loop(N: int, ties: bool) -> None:
    C = 4
    scores = torch.randint(5, (N, C)).float() if ties else torch.randn(N, C)
    relevance = torch.randint(-1, 2, (N, C)).to(torch.int8)
    relevance[0, 0] = 1
    relevance[:, 3] = 0  # a class without images has no precision
    values = []
    for c in range(3):
        rows = [i for i in range(N) if relevance[i, c] >= 0]
        right = [bool(relevance[i, c] == 1) for i in rows]
        if any(right):
            values.append(eleven_points([float(scores[i, c]) for i in rows], right))
    targets = Targets(torch.full((N,), -1), C, relevance=relevance)
    found = evaluate_scores("map11", scores, targets)
    assert found == {"map11": pytest.approx(sum(values) / len(values))}


def test_voc2007_ranks_images_after_a_softmax_over_the_classes_and_no_other_metric_does() -> None:
    logits = torch.tensor(
        [[90.0, 80.0], [30.0, 10.0], [20.0, 10.0], [5.0, 50.0]]
    )  # image 0 has high cosines throughout
    relevance = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]], dtype=torch.int8)
    targets = Targets(torch.full((4,), -1), 2, relevance=relevance)
    likely = [[1 / (1 + math.exp(b - a)), 1 / (1 + math.exp(a - b))] for a, b in logits.tolist()]
    found = evaluate_scores("map11", comparable("map11", logits), targets)["map11"]
    assert comparable("map11", logits).numpy() == pytest.approx(np.array(likely), abs=1e-15)
    assert found > evaluate_scores("map11", logits, targets)["map11"]
    assert found == pytest.approx(
        np.mean([eleven_points([row[c] for row in likely], relevance[:, c].bool().tolist()) for c in range(2)])
    )
    assert comparable("roc_auc", logits) is logits


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("N", [2, 3, 101])
def test_roc_auc_is_scikit_learns(N: int, ties: bool) -> None:
    scores = torch.randint(3, (N, 2)).float() if ties else torch.randn(N, 2)
    labels = torch.randint(2, (N,))
    labels[:2] = torch.tensor([0, 1])
    found = evaluate_scores("roc_auc", scores, Targets(labels, 2))["roc_auc"]
    assert found == pytest.approx(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))


def test_a_nan_score_never_helps_roc_auc_or_precision() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, NAN], [0.0, 0.0], [0.0, -1.0]])
    assert evaluate_scores("roc_auc", scores, labelled(1, 1, 0, 0, classes=2))["roc_auc"] == 0.5
    assert evaluate_scores("roc_auc", scores, labelled(1, 0, 0, 0, classes=2))["roc_auc"] == pytest.approx(2 / 3)
    relevance = torch.tensor([[0], [1]], dtype=torch.int8)
    column = torch.tensor([[1.0], [NAN]])
    assert evaluate_scores("map11", column, Targets(torch.full((2,), -1), 1, relevance=relevance))["map11"] == 0.5


def test_pm0_counts_anchors_and_pm10_needs_their_neighbours_too() -> None:
    prediction = torch.tensor([0, 0, 1, 2, 1, 0])
    scores = torch.nn.functional.one_hot(prediction, 3).float()
    accepted = [{0}, {0, 1}, {0}, {2}, {1, 2}, {2}]  # right: 1, 1, 0, 1, 1, 0
    neighbours = [(0, [1]), (1, [0, 2]), (3, []), (5, [4])]
    targets = labelled(0, 0, 0, 2, 1, 2, neighbours=neighbours, accepted=accepted)
    found = evaluate_scores("pm", scores, targets)
    assert (found["pm0"], found["pm10"], found["pm"]) == (0.75, 0.5, 0.625)
    assert list(found)[0] == "pm"


def test_baseline_of_pm_is_the_best_constant_answer() -> None:
    accepted = [{0, 1}, {1}, {0}, {2}, {0, 2}]
    targets = labelled(0, 1, 0, 2, 0, neighbours=[(0, [1]), (2, [4]), (3, [4])], accepted=accepted)
    constant = [
        evaluate_scores("pm", torch.nn.functional.one_hot(torch.full((5,), c), 3).float(), targets)["pm"]
        for c in range(3)
    ]
    assert baseline("pm", targets) == pytest.approx(max(constant))
    assert len(set(constant)) > 1


def test_lexicon_accuracy_is_among_the_images_own_candidates() -> None:
    scores = torch.tensor([[5.0, 3.0, 3.0, 1.0]]).repeat(4, 1)
    candidates = [[2, 1], [3, 2], [3, 3], [0, 1, 2, 3]]
    targets = Targets(torch.tensor([1, 2, 3, 1]), 4, candidates=candidates)
    assert evaluate_scores("lexicon", scores, targets)["lexicon"] == 0.75  # a tie goes to the lower number
    assert baseline("lexicon", targets) == pytest.approx((1 / 2 + 1 / 2 + 1 + 1 / 4) / 4)


def rareact(scores: np.ndarray, rows: list[tuple[str, str, int, str, int]]) -> dict[str, float]:
    """The dataset's definition in loops with scikit-learn's precision; rows: verb, noun, code, film, class."""
    actions = {(verb, noun): number for verb, noun, _, _, number in rows}
    values = []
    for (verb, noun), number in actions.items():
        groups: dict[str, list[int]] = {"right": [], "hard": [], "wrong": []}
        for i, (v, n, code, _, _) in enumerate(rows):
            if (v, n) == (verb, noun):
                groups["right" if code == 1 else "wrong" if code == 0 else "hard"].append(i)
            elif code == 1:
                groups["hard" if v == verb or n == noun else "wrong"].append(i)
        if not groups["right"]:
            continue
        weight = []
        for group in groups.values():
            films = [rows[i][3] for i in group]
            weight += [1 / films.count(film) for film in films]
        order = [i for group in groups.values() for i in group]
        truth = [i in groups["right"] for i in order]
        values.append(average_precision_score(truth, scores[order, number], sample_weight=weight))
    return {"mwap": float(np.mean(values))}


def clips(count: int, seed: int, films: int) -> tuple[list[tuple[str, str, int, str, int]], Targets]:
    random = np.random.default_rng(seed)
    actions = [("cut", "phone"), ("cut", "book"), ("wash", "phone"), ("fry", "book"), ("fry", "shoe")]
    rows = []
    for i in range(count):
        number = int(random.integers(len(actions)))
        code = 1 if i == 0 else int(random.integers(5))
        rows.append((*actions[number], code, f"film{random.integers(films)}", number))
    annotations = {
        "verb": [verb for verb, _ in actions],
        "noun": [noun for _, noun in actions],
        "annotation": [row[2] for row in rows],
        "video": [row[3] for row in rows],
    }
    return rows, Targets(torch.tensor([row[4] for row in rows]), len(actions), annotations=annotations)


@pytest.mark.parametrize("count", [1, 17, 120])
@pytest.mark.parametrize("ties", [False, True])
def test_mwap_equals_the_datasets_definition(count: int, ties: bool) -> None:
    rows, targets = clips(count, count, films=9)
    scores = torch.randint(4, (count, 5)).float() if ties else torch.randn(count, 5)
    found = evaluate_scores("mwap", scores, targets)
    assert found["mwap"] == pytest.approx(rareact(scores.double().numpy(), rows)["mwap"])


def test_mwsap_is_the_mean_over_draws_of_one_clip_per_film() -> None:
    """Two right clips of one film and a wrong one: precision is 1 or 1/2, depending on the clip drawn."""
    annotations = {"verb": ["a"], "noun": ["b"], "annotation": [1, 1, 0], "video": ["x", "x", "y"]}
    scores = torch.tensor([[3.0], [1.0], [2.0]])
    found = evaluate_scores("mwap", scores, Targets(torch.zeros(3, dtype=torch.int64), 1, annotations=annotations))
    assert found["mwsap"] == pytest.approx(0.75, abs=4 * 0.25 / math.sqrt(module.SAMPLINGS))


def test_baselines_are_the_best_constant_answers_with_the_accuracies_that_a_metric_reports() -> None:
    targets = labelled(0, 0, 0, 1, 2, 2, 7, classes=9)
    accuracy = {"top1": pytest.approx(3 / 7), "top5": pytest.approx(1), "mean_per_class": 1 / 4}
    assert baselines("top1", targets) == accuracy
    assert baselines("mean_top1_top5", targets) == {"mean_top1_top5": pytest.approx((3 / 7 + 1) / 2), **accuracy}
    assert baseline("roc_auc", labelled(0, 0, 1, classes=2)) == 0.5
    assert baseline("within_km", targets) is None
    relevance = torch.tensor([[1, 0], [0, 0], [-1, 1], [0, 1]], dtype=torch.int8)
    several = Targets(torch.full((4,), -1), 2, relevance=relevance)
    assert baselines("map11", several) == {"map11": pytest.approx((1 / 3 + 1 / 2) / 2)}


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 7), (8991, 10000), (50, 50)])
def test_interval_equals_that_of_the_beta_distribution(right: int, n: int) -> None:
    low, high = clopper_pearson(right, n)
    assert low == pytest.approx(beta.ppf(0.0025, right, n - right + 1) if right else 0.0)
    assert high == pytest.approx(beta.ppf(0.9975, right + 1, n - right) if right < n else 1.0)


@pytest.mark.parametrize(
    ("metric", "targets", "scores", "message"),
    [
        ("top1", labelled(0, -1), torch.zeros(2, 3), "needs one class per image, but row 1 has none"),
        ("top1", Targets(torch.zeros(0, dtype=torch.int64), 3), torch.zeros(0, 3), "no images"),
        ("map11", labelled(0, 1), torch.zeros(2, 3), "map11 needs annotations"),
        ("roc_auc", labelled(0, 1), torch.zeros(2, 3), "roc_auc needs 2 classes, not 3"),
        ("roc_auc", labelled(1, 1, classes=2), torch.zeros(2, 2), "all images are of one class"),
        ("pm", labelled(0), torch.zeros(1, 3), "pm needs annotations"),
        ("recall@1", labelled(0), torch.zeros(1, 3), "recall@1 is not computed from class scores"),
        (
            "mwap",
            labelled(0, annotations={"verb": [], "noun": [], "annotation": []}),
            torch.zeros(1, 3),
            "mwap needs video in the set's annotations",
        ),
    ],
)
def test_targets_that_a_metric_is_not_defined_for_are_an_error(
    metric: Any, targets: Targets, scores: Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_scores(metric, scores, targets)


class Frames(LabelledImages):
    class_names = ["a", "b"]

    def __init__(self, labels: list[int]) -> None:
        self._labels = labels
        codes = {"verb": ["v", "w"], "noun": ["n", "m"], "annotation": [0, 1, 2, 3, 4], "video": list("abcde")}
        self.truth = Truth(
            neighbours=[(0, [1, 2]), (3, [2, 4])],
            accepted=[{label} for label in labels],
            coordinates=torch.arange(10).double().view(5, 2),
            annotations=codes,
        )

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise AssertionError("targets must not open images")

    def key(self, index: int) -> str:
        return f"frame{index}.jpg"

    def labels(self) -> list[int]:
        return self._labels


def test_targets_keep_only_the_rows_that_could_be_read() -> None:
    targets = Targets.of(Frames([0, 1, 0, 1, 0])).take([1, 2, 3, 4])
    assert targets.labels.tolist() == [1, 0, 1, 0]
    assert targets.classes == 2
    assert targets.neighbours == [(2, [1, 3])]  # the anchor in row 0 is gone, with its neighbours
    assert targets.accepted == [{1}, {0}, {1}, {0}]
    assert targets.coordinates is not None
    assert targets.coordinates[:, 0].tolist() == [2, 4, 6, 8]
    codes = {"verb": ["v", "w"], "noun": ["n", "m"], "annotation": [1, 2, 3, 4], "video": list("bcde")}
    assert targets.annotations == codes
    without_neighbour = Targets.of(Frames([0, 1, 0, 1, 0])).take([0, 2, 3])
    assert without_neighbour.neighbours == [(0, [1]), (2, [1])]


def test_a_label_out_of_range_in_a_set_is_an_error_that_names_the_image() -> None:
    with pytest.raises(InputError, match="frame3.jpg has label 2, but there are 2 classes"):
        Targets.of(Frames([0, 1, 0, 2, 0]))
    with pytest.raises(InputError, match="frame1.jpg has label -2, but there are 2 classes"):
        Targets.of(Frames([0, -2, 0, 1, 0]))
    assert Targets.of(Frames([0, 1, 0, 2, 0]), classes=3).classes == 3


@pytest.mark.parametrize("classes", [2, 9, 40])
def test_macro_f1_is_scikit_learns_over_the_classes_that_have_images(classes: int) -> None:
    scores, labels = torch.randn(61, classes), torch.randint(classes, (61,))
    labels[labels == classes - 1] = 0  # the last class is predicted but has no images
    found = evaluate_scores("macro_f1", scores, Targets(labels, classes))
    expected = f1_score(labels, scores.argmax(1), average="macro", labels=labels.unique(), zero_division=0.0)  # pyright: ignore[reportArgumentType]
    assert found["macro_f1"] == pytest.approx(expected)
    assert next(iter(found)) == "macro_f1"
    assert "top1" in found


ALL = "Average over 38 sets"


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
    groups = datacomp_groups()
    assert [len(members) for members in groups.values()] == [1, 6, 13, 3, 38]
    assert {name: entry.metric for name, entry in entries.items()} == groups[f"DataComp, {ALL}"]
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
    numbers = {name.removeprefix("datacomp_"): number / 100 for number, name in enumerate(list(sets)[:38])}
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
