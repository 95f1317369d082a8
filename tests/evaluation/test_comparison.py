"""Comparisons of runs, and intervals, against plain loops over their images."""

import json
import math
import random
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_clip.errors import InputError
from lit_clip.evaluation.comparison import (
    OtherRun,
    mcnemar,
    other_runs,
    paired_differences,
    seed_groups,
)
from lit_clip.evaluation.intervals import UnitScores, intervals, mean_interval
from lit_clip.evaluation.predictions import predictions_entry, write_predictions
from lit_clip.evaluation.report.page import report_values

KEYS = [f"{number}.png" for number in range(60)]
TRUTH = np.array([number % 3 if number < 30 else 0 for number in range(60)], dtype=np.int32)


def run_of(folder: Path, right: list[float], metric: str = "top1", task: str = "zero_shot", **columns: Any) -> OtherRun:
    """Write a run whose images have these scores, and return it."""
    score = np.array(right, dtype=np.float32)
    table: dict[str, Any] = {
        "fold": np.zeros(60, dtype=np.int16),
        "key": KEYS,
        "truth": TRUTH,
        "score": score,
        **columns,
    }
    write_predictions(folder, "a", task, table)
    value = float(score.mean())
    if metric == "mean_per_class":
        value = statistics.fmean(float(score[label == TRUTH].mean()) for label in range(3))
    entry = {"metric": metric, "tasks": {task: {"value": value, "metrics": {metric: value}}}}
    results = {"model": {"name": folder.name}, "sets": {"a": entry}}
    (folder / "results.json").write_text(json.dumps(results))
    return OtherRun("", folder, results)


def answers(seed: int, share: float) -> list[float]:
    generator = random.Random(seed)
    return [float(generator.random() < share) for _ in range(60)]


def plain_p(only_ours: int, only_theirs: int) -> float:
    """McNemar's exact test: the probability of a split as uneven as this one among fair coins."""
    n = only_ours + only_theirs
    probability = [math.comb(n, k) / 2**n for k in range(n + 1)]
    return sum(p for k, p in enumerate(probability) if abs(k - n / 2) >= abs(only_ours - n / 2) - 1e-9)


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (1, 0), (5, 5), (9, 2), (30, 11)])
def test_mcnemars_p_is_that_of_fair_coins(ours: int, theirs: int) -> None:
    a = np.array([1] * ours + [0] * theirs + [1, 0] * 7)
    b = np.array([0] * ours + [1] * theirs + [1, 0] * 7)
    assert mcnemar(a, b) == pytest.approx(plain_p(ours, theirs) if ours + theirs else 1.0)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_differences_are_paired_by_image(tmp_path: Path, metric: str) -> None:
    ours, theirs = answers(0, 0.8), answers(1, 0.5)
    run, other = run_of(tmp_path / "x", ours, metric), run_of(tmp_path / "y", theirs, metric)
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": other})
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    classes = [[gap for gap, label in zip(gaps, TRUTH, strict=True) if label == c] for c in range(3)]
    strata = classes if metric == "mean_per_class" else [gaps]
    assert found.difference == pytest.approx(statistics.fmean(map(statistics.fmean, strata)))
    generator, draws = random.Random(0), []
    for _ in range(4000):
        draws.append(statistics.fmean(statistics.fmean(generator.choices(each, k=len(each) - 1)) for each in strata))
    draws.sort()
    assert found.interval == pytest.approx((draws[10], draws[-11]), abs=0.03)
    assert found.p_value == pytest.approx(plain_p(gaps.count(1), gaps.count(-1)))
    assert (found.run, found.set, found.task, found.metric, found.images) == ("y", "a", "zero_shot", metric, 60)
    assert json.loads(json.dumps(asdict(found)))["difference"] == found.difference


def test_images_in_another_order_are_paired_by_key(tmp_path: Path) -> None:
    right = answers(0, 0.7)
    run = run_of(tmp_path / "x", right)
    other = run_of(tmp_path / "y", right[::-1], key=KEYS[::-1], truth=TRUTH[::-1])
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": other})
    assert (found.difference, found.interval, found.p_value) == (
        0.0,
        None,
        1.0,
    )  # an interval without width looks certain


def test_a_difference_whose_interval_has_no_width_is_neither_certain_nor_bold(tmp_path: Path) -> None:
    """With one image of each class nothing varies within classes, however few images there are."""
    truth, metric = np.arange(60, dtype=np.int32), "mean_per_class"
    runs = []
    for name, right in (("x", 40), ("y", 38)):
        run = run_of(tmp_path / name, [float(number < right) for number in range(60)], truth=truth)
        value = right / 60
        run.results["sets"]["a"] = {"metric": metric, "tasks": {"zero_shot": {"metrics": {metric: value}}}}
        runs.append(run)
    found = paired_differences(runs[0].results, tmp_path / "x", {"y": runs[1]})
    assert (found[0].difference, found[0].interval, found[0].p_value) == (pytest.approx(2 / 60), None, 0.5)
    ((cells, clear),) = report_values(runs[0].results, tmp_path, {"y": {}}, None, found)["comparisons"]["y"]["lines"]
    assert (cells, clear) == (["a", "zero-shot, mean per class", "+3.3", "", "0.5000", "60"], False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": [*KEYS[:-2], "x.png", "y.png"]}, "other images: 2 only here, 2 only there"),
        ({"truth": TRUTH[::-1].copy()}, "the same images have other labels"),
        ({"score": np.ones(60, dtype=np.float32)}, "are not those of its results.json; evaluate it again"),
        ({"score": ["right"] * 60}, "are not those of its results.json; evaluate it again"),
    ],
)
def test_runs_that_cannot_be_paired_say_why(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    run = run_of(tmp_path / "x", answers(0, 0.8))
    other = run_of(tmp_path / "y", answers(1, 0.5))
    table = {"fold": np.zeros(60, dtype=np.int16), "key": KEYS, "truth": TRUTH, "score": np.array(answers(1, 0.5))}
    write_predictions(tmp_path / "y", "a", "zero_shot", table | change)
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": other})
    assert reason in found.reason
    assert found.difference is None


def test_missing_predictions_and_other_metrics_are_named(tmp_path: Path) -> None:
    run = run_of(tmp_path / "x", answers(0, 0.8))
    other = run_of(tmp_path / "y", answers(1, 0.5))
    (tmp_path / "y/predictions/a/zero_shot.parquet").unlink()
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": other})
    assert found.reason.startswith("no predictions/a/zero_shot.parquet in ")
    run = run_of(tmp_path / "x", answers(0, 0.8), "roc_auc")
    write_predictions(tmp_path / "x", "a", "zero_shot", {"key": KEYS, "truth": TRUTH})
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": run})
    assert found.reason == "roc_auc is not a mean over images"
    other = run_of(tmp_path / "z", answers(1, 0.5), "mean_per_class")
    (found,) = paired_differences(run.results, tmp_path / "x", {"z": other})
    assert found.reason == "its metric is roc_auc here and mean_per_class there"
    assert paired_differences(run.results, tmp_path / "x", {"y": OtherRun("", tmp_path, {"sets": {"b": {}}})}) == []


def test_scores_of_folds_are_averaged_without_a_p_value(tmp_path: Path) -> None:
    """Folds may share images, as STL10's do, so their images are not counted together."""
    fold = np.repeat([0, 1], 30).astype(np.int16)
    ours, theirs = answers(0, 0.9), answers(1, 0.4)
    keys = KEYS[:30] * 2
    run = run_of(tmp_path / "x", ours, fold=fold, key=keys)
    other = run_of(tmp_path / "y", theirs, fold=fold, key=keys)
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": other})
    assert found.difference == pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs))
    assert found.p_value is None
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] > 0.3  # that of 30 images, not of 60


def test_retrieval_is_compared_by_query_and_direction(tmp_path: Path) -> None:
    runs = []
    for name, ranks in (("x", [0, 0, 4, 0, 9, 0]), ("y", [1, 0, 0, 0, 2, 3])):
        columns = {
            "direction": ["image_to_text"] * 2 + ["text_to_image"] * 4,
            "key": ["a", "b", "a#0", "a#1", "b#0", "b#1"],
            "rank": np.array(ranks, dtype=np.int32),
        }
        write_predictions(tmp_path / name, "a", "retrieval", columns)
        hits = [float(rank == 0) for rank in ranks]
        metrics = {"image_to_text_recall@1": sum(hits[:2]) / 2, "text_to_image_recall@1": sum(hits[2:]) / 4}
        runs.append({"sets": {"a": {"tasks": {"retrieval": {"value": 0.5, "metrics": metrics}}}}})
    found = paired_differences(runs[0], tmp_path / "x", {"y": OtherRun("", tmp_path / "y", runs[1])})
    assert [each.metric for each in found] == ["image_to_text_recall@1", "text_to_image_recall@1"]
    assert [each.difference for each in found] == [0.5, 0.0]
    assert [each.p_value for each in found] == [1.0, 1.0]
    assert [each.images for each in found] == [2, 4]


def test_runs_are_not_compared_if_equal_keys_are_of_images_with_other_captions(tmp_path: Path) -> None:
    """Keys of images can be the numbers of their rows."""
    columns = {"direction": ["image_to_text"] * 2, "key": ["0", "1"], "rank": np.array([0, 3], dtype=np.int32)}
    judged = {"x": [("0", ["a cat"]), ("1", ["two cats"])], "y": [("0", ["a dog"]), ("1", ["two dogs"])]}
    judged["z"] = judged["x"][::-1]  # in another order
    runs: dict[str, dict[str, Any]] = {}
    for name, truth in judged.items():
        entry = predictions_entry(tmp_path / name, "a", "retrieval", columns, truth)
        task = {"metrics": {"image_to_text_recall@1": 0.5}, **entry}
        runs[name] = {"sets": {"a": {"tasks": {"retrieval": task}}}}
    others = {name: OtherRun("", tmp_path / name, runs[name]) for name in "yz"}
    other, same = paired_differences(runs["x"], tmp_path / "x", others)[::2]
    assert (other.difference, same.difference) == (None, 0.0)
    assert other.reason.startswith("images with the same keys have other captions")


def test_predictions_of_another_run_with_the_same_mean_are_stale(tmp_path: Path) -> None:
    right = answers(0, 0.8)
    run, other = run_of(tmp_path / "x", right), run_of(tmp_path / "y", right)
    table = {"key": KEYS, "truth": TRUTH, "score": np.array(right)}
    result = other.results["sets"]["a"]["tasks"]["zero_shot"]
    result |= predictions_entry(tmp_path / "y", "a", "zero_shot", table, ())
    run.results["sets"]["a"]["tasks"]["zero_shot"]["judged"] = result["judged"]
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": other})
    assert found.difference == 0
    write_predictions(tmp_path / "y", "a", "zero_shot", table | {"score": np.array(right[::-1])})
    (found,) = paired_differences(run.results, tmp_path / "x", {"y": other})
    assert found.reason.endswith("are not those of its results.json; evaluate it again")


def test_a_name_groups_the_seeds_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a1", "b0", "b1", "lr=1e-3", "plain"):
        run_of(Path(name), answers(0, 0.5))
    others = other_runs(["this=a1", "b=b0", "b=b1", "lr=1e-3", "plain/results.json", "named=plain"], Path("out"))
    assert list(others) == ["this: a1", "b: b0", "b: b1", "lr=1e-3", "plain/results.json", "named"]
    assert seed_groups(others) == {"this": ["this: a1"], "b": ["b: b0", "b: b1"]}
    assert others["plain/results.json"].folder == Path("plain")
    assert {each.run for each in paired_differences(others["b: b0"].results, Path("b0"), others)} == {*others} - {
        "this: a1"
    }  # seeds of the run's own recipe
    for wrong, message in (("b=nowhere", "nowhere: there is no such file"), ("=b0", "=b0: there is no such file")):
        with pytest.raises(InputError, match=message):
            other_runs([wrong], Path("out"))
    for twice in (["b=b0", "b=b0"], ["b=b0", "b=b0/results.json"], ["plain", "plain/results.json"]):
        with pytest.raises(InputError, match=r"--compare (b0|plain).*: given twice"):
            other_runs(twice, Path("out"))


def test_the_run_itself_is_not_among_the_others_by_place_or_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s1", "b", "this run"):
        run_of(Path(name), answers(0, 0.5))
    Path("link").symlink_to("s1")
    for itself in ("s1", "this=s1", "x=s1/results.json", "link"):
        with pytest.raises(InputError, match=r"--compare .*: this is --output, .*; leave it out"):
            other_runs(["b", itself], tmp_path / "s1")
    for named in ("this run=b", "this run", "this run/results.json"):
        with pytest.raises(InputError, match="'this run' names the evaluated run; choose another NAME=PATH"):
            other_runs([named], Path("s1"))
    assert list(other_runs(["mine=this run"], Path("s1"))) == ["mine"]


def plain_bootstrap(strata: list[list[float]], draws: int) -> tuple[float, float]:
    """Draw images of each stratum with replacement, one by one, and one less than it has."""
    generator, means = random.Random(0), []
    for _ in range(draws):
        drawn = [generator.choices(stratum, k=len(stratum) - 1) for stratum in strata]
        means.append(sum(sum(stratum) / len(stratum) for stratum in drawn) / len(drawn))
    means.sort()
    return means[int(0.0025 * draws)], means[int(0.9975 * draws)]


@pytest.mark.parametrize(
    "strata",
    [
        [[0.0] * 20 + [0.5] * 25 + [1.0] * 15],
        [[0.0] * 3 + [1.0] * 9, [0.0] * 25 + [1.0] * 5, [1.0] * 4],
        [[-1.0] * 6 + [0.0] * 30 + [1.0] * 14],
        [[0.0, 1.0]] * 40,  # drawing two of two would make its interval a third too narrow
    ],
    ids=["halves", "classes", "differences", "small classes"],
)
def test_other_means_have_the_interval_of_a_plain_bootstrap(strata: list[list[float]]) -> None:
    values = np.array([value for stratum in strata for value in stratum])
    classes = np.repeat(np.arange(len(strata)), [len(stratum) for stratum in strata])
    mixed = np.random.default_rng(1).permutation(len(values))
    scores = UnitScores(values[mixed], classes[mixed] if len(strata) > 1 else None)
    assert scores.mean() == pytest.approx(sum(sum(stratum) / len(stratum) for stratum in strata) / len(strata))
    low, high = scores.interval()
    assert (low, high) == pytest.approx(plain_bootstrap(strata, 8000), abs=0.03)
    assert low < scores.mean() < high
    assert scores.interval() == (low, high)  # the same in every run


def test_the_mean_per_class_is_bootstrapped_within_classes() -> None:
    """Drawn from all images together, its interval would be that of one large class."""
    values, classes = np.array([1.0] * 50 + [0.0] * 50), np.repeat([0, 1], 50)
    assert UnitScores(values, classes).interval() == (0.5, 0.5)
    assert UnitScores(values).interval() == pytest.approx((0.357, 0.643), abs=0.01)


def test_folds_average_the_ends_of_their_intervals() -> None:
    assert mean_interval([(0.25, 0.5), (0.75, 1.0)]) == (0.5, 0.75)


def test_an_interval_without_width_is_left_out() -> None:
    """A model that always answers the same class gets all images of it right and none of the others."""
    same = np.array([1.0, 1.0, 0.0, 0.0])
    found = intervals({"top1": UnitScores(same), "mean_per_class": UnitScores(same, np.array([0, 0, 1, 1]))})
    assert set(found) == {"top1"}
    assert intervals({"top1": UnitScores(np.zeros(4))})["top1"][0] == 0.0
