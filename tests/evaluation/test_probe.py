"""The linear probe against scikit-learn on its digits: the same optimum, the same accuracy; few-shot; robustness."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation import logistic
from lit_clip.evaluation.few_shot import train_few_shot
from lit_clip.evaluation.logistic import Fit, LogisticProblem
from lit_clip.evaluation.probe import L2_GRID, Probe, Split, best_l2, held_out, search_l2, train_probe
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.targets import Targets

EXACT: Any = {"tolerance": 1e-13, "max_iterations": 3000}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 pixels (some of which are always black), shuffled; float64."""
    features, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(features)[order], torch.tensor(labels, dtype=torch.int64)[order]


def split(features: Tensor, labels: Tensor, classes: int = 10) -> Split:
    return Split(features.float(), Targets(labels, classes))


@pytest.fixture(scope="module")
def splits(digits: tuple[Tensor, Tensor]) -> tuple[Split, Split, Split]:
    features, labels = digits
    return tuple(split(features[a:b], labels[a:b]) for a, b in ((0, 500), (500, 1000), (1000, 1797)))  # type: ignore[return-value]


def scikit(features: Tensor, labels: Tensor, l2: float) -> LogisticRegression:
    """Newton's method: with a weak penalty scikit-learn's L-BFGS stops before the optimum, whatever ``tol``."""
    model = LogisticRegression(C=1 / l2, solver="newton-cholesky", max_iter=200, tol=1e-9)
    return model.fit(features.double().numpy(), labels.numpy())


def objective(weight: Any, bias: Any, features: Tensor, labels: Tensor, l2: float) -> float:
    weight, bias = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
    losses = torch.nn.functional.cross_entropy(features.double() @ weight.T + bias, labels, reduction="sum")
    return float(losses + l2 / 2 * weight.square().sum())


def accuracy(fit: Fit, features: Tensor, labels: Tensor) -> float:
    return float((fit.scores(features).argmax(1) == labels).double().mean())


@pytest.mark.parametrize(("N", "l2"), [(400, 1.0), (1000, 1e3), (997, 30.0), (61, 10.0), (41, 1.0)])
def test_optimum_equals_scikit_learns(digits: tuple[Tensor, Tensor], N: int, l2: float) -> None:
    """Also with fewer examples than features, when the problem is solved in the space that they span."""
    features, labels = digits[0][:N], digits[1][:N]
    theirs, ours = scikit(features, labels, l2), LogisticProblem(features, labels, 10).fit(l2, **EXACT)
    best = objective(theirs.coef_, theirs.intercept_, features, labels, l2)
    assert ours.converged
    assert ours.objective == pytest.approx(objective(ours.weight, ours.bias, features, labels, l2), rel=1e-9)
    assert ours.objective == pytest.approx(best, rel=1e-7)
    assert np.abs(ours.weight.numpy() - theirs.coef_).max() < 1e-3 * np.abs(theirs.coef_).max()
    bias = ours.bias.numpy() - ours.bias.mean().item()  # both are determined up to a constant
    assert np.abs(bias - (theirs.intercept_ - theirs.intercept_.mean())).max() < 1e-2


@pytest.mark.parametrize("l2", [pytest.param(1e-6, marks=pytest.mark.slow), 1e-2, 10.0, 1e4])
def test_float32_accuracy_is_within_a_tenth_of_a_point_of_scikit_learns(
    digits: tuple[Tensor, Tensor], l2: float
) -> None:
    features, labels = digits
    ours = LogisticProblem(features[:1000].float(), labels[:1000], 10).fit(l2)
    theirs = scikit(features[:1000], labels[:1000], l2)
    expected = theirs.score(features[1000:].numpy(), labels[1000:].numpy())
    assert ours.converged
    assert ours.iterations < 250
    assert ours.objective <= objective(theirs.coef_, theirs.intercept_, features[:1000], labels[:1000], l2) * (1 + 1e-4)
    # a tenth of a point is less than one of 797 images, so one image more or less is allowed
    assert accuracy(ours, features[1000:].float(), labels[1000:]) == pytest.approx(expected, abs=1e-3 + 1 / 797)


@pytest.mark.parametrize("N", [400, 30])
def test_two_classes_have_a_single_logit_as_in_scikit_learn(digits: tuple[Tensor, Tensor], N: int) -> None:
    rows = digits[1] < 2
    features, labels = digits[0][rows][:N], digits[1][rows][:N]
    theirs, ours = scikit(features, labels, 3.0), LogisticProblem(features, labels, 2).fit(3.0, **EXACT)
    assert np.abs((ours.weight[1] - ours.weight[0]).numpy() - theirs.coef_[0]).max() < 1e-5
    probability = torch.softmax(ours.scores(features), 1).numpy()
    assert np.abs(probability - theirs.predict_proba(features.numpy())).max() < 1e-5


def test_a_class_without_examples_is_never_predicted(digits: tuple[Tensor, Tensor]) -> None:
    rows = (digits[1] != 3) & (digits[1] != 9)
    features, labels = digits[0][rows][:500], digits[1][rows][:500]
    theirs, ours = scikit(features, labels, 1.0), LogisticProblem(features, labels, 10).fit(1.0, **EXACT)
    present = [0, 1, 2, 4, 5, 6, 7, 8]
    assert theirs.classes_.tolist() == present
    assert np.abs(ours.weight[present].numpy() - theirs.coef_).max() < 1e-3 * np.abs(theirs.coef_).max()
    scores = ours.scores(digits[0])
    assert torch.isneginf(scores[:, [3, 9]]).all()
    assert scores.argmax(1).tolist() == theirs.predict(digits[0].numpy()).tolist()


def test_images_with_several_classes_have_one_classifier_per_class(digits: tuple[Tensor, Tensor]) -> None:
    """A class's classifier equals scikit-learn's on the entries that are not -1."""
    features, labels = digits[0][:300], digits[1][:300]
    relevance = torch.stack([labels % 2 == 0, labels > 6, labels == 11, labels < 9], dim=1).to(torch.int8)
    relevance[torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) < 0.2] = -1
    ours = LogisticProblem(features, relevance, 4).fit(2.0, **EXACT)
    for c in (0, 1, 3):
        rows = relevance[:, c] >= 0
        theirs = scikit(features[rows], relevance[rows, c], 2.0)
        assert np.abs(ours.weight[c].numpy() - theirs.coef_[0]).max() < 1e-3 * np.abs(theirs.coef_).max()
        assert float(ours.bias[c]) == pytest.approx(theirs.intercept_[0], abs=1e-2)
    assert float(ours.bias[2]) == -math.inf  # class 2 has no example
    assert not ours.weight[2].any()


def test_chunk_size_makes_no_difference(digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = (each[:600] for each in digits)
    whole = LogisticProblem(features, labels, 10).fit(10.0, **EXACT)
    monkeypatch.setattr(logistic, "CPU_ENTRIES", 1)  # 256 rows at a time: 2 chunks and 88 rows
    chunked = LogisticProblem(features, labels, 10).fit(10.0, **EXACT)
    assert torch.allclose(chunked.weight, whole.weight, atol=1e-6)


def test_a_fit_that_reaches_the_iteration_limit_is_not_converged(digits: tuple[Tensor, Tensor]) -> None:
    fit = LogisticProblem(*digits, 10).fit(1e-3, max_iterations=3)
    assert (fit.iterations, fit.converged) == (3, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y * 0), "all the same"),
        (lambda x, y: (x, y + 1), "row .* has 10, but there are 10 classes"),
        (lambda x, y: (x, y - 1), "row .* has -1"),
        (lambda x, y: (x[:5], y), "1797 labels, but 5 features"),
        (lambda x, y: (x[:0], y[:0]), "features: there are none"),
        (lambda x, y: (torch.where(torch.arange(1797)[:, None] == 7, math.nan, x), y), "row 7 are not finite"),
    ],
)
def test_labels_and_features_that_cannot_be_learnt_from_are_an_error(
    digits: tuple[Tensor, Tensor], change: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        LogisticProblem(*change(*digits), 10).fit(1.0)


def test_a_penalty_of_zero_is_an_error(digits: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(InputError, match="l2: 0.0 must be above 0"):
        LogisticProblem(*digits, 10).fit(0.0)


@pytest.mark.parametrize("peak", [0, 1, 37, 48, 71, 95, 96])
def test_search_finds_a_single_peak_anywhere_on_the_grid(peak: int) -> None:
    tried = []

    def value_of(l2: float) -> float:
        tried.append(l2)
        return -abs(L2_GRID.index(l2) - peak)

    assert best_l2(search_l2(value_of)) == L2_GRID[peak]
    assert tried[:7] == pytest.approx([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6])
    assert len(tried) == len(set(tried)) <= 15


def test_the_strongest_of_equally_good_penalties_is_chosen() -> None:
    assert best_l2(search_l2(lambda l2: float(l2 < 50))) == L2_GRID[61]  # 10^1.625 = 42, the last before 50


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_the_penalty_found_is_as_good_as_the_best_of_the_whole_grid(
    splits: tuple[Split, Split, Split], step: int
) -> None:
    train, val, test = splits[0].take(torch.arange(250)), *splits[1:]
    result = train_probe(train, val, "top1")
    full = {l2: accuracy(_fit(train, l2), val.features, val.targets.labels) for l2 in L2_GRID[::step]}
    for l2 in result.search.keys() & full.keys():
        assert result.search[l2] == pytest.approx(
            full[l2], abs=1.5 / 500
        )  # each fit starts where another penalty's ended
    assert result.search[result.l2] == max(result.search.values())
    assert result.search[result.l2] >= max(full.values()) - 1.5 / 500
    both = torch.cat([train.features, val.features]), torch.cat([train.targets.labels, val.targets.labels])
    theirs = LogisticRegression(C=1 / result.l2, max_iter=1000).fit(*(x.double().numpy() for x in both))
    expected = theirs.score(test.features.double().numpy(), test.targets.labels.numpy())
    assert metrics_of(result, test, "top1")["top1"] == pytest.approx(expected, abs=1e-3 + 1 / 797)


def metrics_of(probe: Probe, test: Split, metric: Any) -> dict[str, float]:
    return evaluate_scores(metric, probe.fit.scores(test.features), test.targets)


def _fit(train: Split, l2: float) -> Fit:
    return LogisticProblem(train.features, train.targets.labels, 10).fit(l2)


def test_without_a_validation_split_a_fifth_of_each_class_chooses_the_penalty(
    splits: tuple[Split, Split, Split],
) -> None:
    train, _, test = splits
    rest, fifth = held_out(train, seed=0)
    counts = Counter(train.targets.labels.tolist())
    assert Counter(fifth.targets.labels.tolist()) == {label: count // 5 for label, count in counts.items()}
    rows = torch.cat([rest.features, fifth.features])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, train.features.tolist()))
    assert not torch.equal(fifth.features, held_out(train, seed=1)[1].features)
    result = train_probe(train, None, "top1")
    assert result.search[result.l2] == pytest.approx(
        accuracy(
            LogisticProblem(rest.features, rest.targets.labels, 10).fit(result.l2), fifth.features, fifth.targets.labels
        ),
        abs=1 / 95,
    )
    expected = accuracy(_fit(train, result.l2), test.features, test.targets.labels)
    assert metrics_of(result, test, "top1")["top1"] == pytest.approx(expected, abs=1e-3 + 1 / 797)


def test_classes_with_few_examples_keep_one_to_learn_from() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    rest, fifth = held_out(split(torch.randn(13, 4), labels, 4), seed=0)
    assert sorted(fifth.targets.labels.tolist()) == [1, 2, 2]
    assert len(rest.features) == 10
    with pytest.raises(InputError, match="each class has one image"):
        held_out(split(torch.randn(3, 4), torch.arange(3), 3), seed=0)
    with pytest.raises(InputError, match="features of 3 images, but targets of 13"):
        Split(torch.randn(3, 4), rest.targets.take(torch.zeros(13)))


@pytest.mark.parametrize("metric", ["map11", "roc_auc"])
def test_probes_with_several_and_with_two_classes_are_evaluated_by_their_metric(
    digits: tuple[Tensor, Tensor], metric: Any
) -> None:
    features, labels = digits[0][:600].float(), digits[1][:600]
    if metric == "map11":
        relevance = torch.stack([labels % 2 == 0, labels > 6, labels % 3 == 0], dim=1).to(torch.int8)
        targets = Targets(torch.full((600,), -1), 3, relevance=relevance)
    else:
        targets = Targets(labels % 2, 2)
    whole = Split(features, targets)
    parts = whole.take(torch.arange(300)), whole.take(torch.arange(300, 600))
    result = train_probe(parts[0], None, metric)
    metrics = metrics_of(result, parts[1], metric)
    assert next(iter(metrics)) == metric
    assert 0.8 < metrics[metric] <= 1
    assert max(result.search.values()) == result.search[result.l2]


def test_few_shot_trains_on_k_examples_per_class_and_not_on_validation_images(
    splits: tuple[Split, Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = splits[0]
    seen = []
    original = logistic.LogisticProblem.__init__

    def spy(self: Any, features: Tensor, labels: Tensor, *others: Any) -> None:
        seen.append((features, Counter(labels.tolist())))
        original(self, features, labels, *others)

    monkeypatch.setattr(logistic.LogisticProblem, "__init__", spy)
    train_few_shot(train, None, "top1", shots=(2, 3), draws=2)
    assert [set(counts.values()) for _, counts in seen] == [{2}, {2}, {3}, {3}]
    validation = set(map(tuple, held_out(train, 0)[1].features.tolist()))
    drawn = [set(map(tuple, features.tolist())) for features, _ in seen]
    assert not any(validation & rows for rows in drawn)
    assert drawn[0] < drawn[2]  # the first draw of two is part of the first of three
    assert drawn[0] != drawn[1]


def test_numbers_of_shots_that_a_class_does_not_have_are_skipped(splits: tuple[Split, Split, Split]) -> None:
    train, val, _ = splits
    result = train_few_shot(train.take(torch.arange(60)), val, "top1", shots=(1, 16), draws=1)
    assert list(result.fits) == [1]
    assert "examples to draw from" in result.left_out[16]
    with pytest.raises(InputError, match="class .* examples to draw from; leave few_shot out"):
        train_few_shot(train.take(torch.arange(60)), val, "top1", shots=(16,))


def test_few_shot_with_several_classes_per_image_is_an_error() -> None:
    targets = Targets(torch.full((4,), -1), 2, relevance=torch.zeros(4, 2, dtype=torch.int8))
    some = Split(torch.randn(4, 3), targets)
    with pytest.raises(InputError, match="few_shot"):
        train_few_shot(some, None, "map11")


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("l2", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize(("examples", "width"), [(16, 512), (30, 128), (60, 512)])
def test_fewer_examples_than_channels_in_float32_end_at_scikit_learns_optimum(
    examples: int, width: int, l2: float, classes: int
) -> None:
    generator = torch.Generator().manual_seed(examples + width)
    labels = torch.arange(examples) % classes
    features = 0.5 * torch.randn(classes, width, generator=generator)[labels]
    features += torch.randn(examples, width, generator=generator)
    theirs = LogisticRegression(C=1 / l2, tol=1e-12, max_iter=20_000).fit(features.double().numpy(), labels.numpy())
    fit = LogisticProblem(features, labels, classes).fit(l2)

    def objective(weight: Tensor, bias: Tensor) -> float:
        logits = features.double() @ weight.double().T + bias.double()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        penalty = (weight[1] - weight[0]).double() if classes == 2 else weight.double()
        return float(loss + l2 / 2 * penalty.square().sum())

    weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    if classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    assert fit.converged
    assert objective(fit.weight, fit.bias) < 1.0003 * objective(weight, bias)
