"""Class heads: zero-shot logits plus a penalised correction, against plain float64 optimisers."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation.class_head import PENALTY, PENALTY_ALONE, fit_head
from lit_clip.evaluation.few_shot import train_few_shot
from lit_clip.evaluation.logistic import LogisticProblem
from lit_clip.evaluation.probe import Split, places_in_classes
from lit_clip.evaluation.targets import Targets


def examples(count: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return features ``[N, W]`` away from the origin, logits ``[N, C]`` that know something, and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = torch.randn(classes, width, generator=random)
    features = means[labels] + 1.5 * torch.randn(count, width, generator=random) + 3
    zero_shot = torch.randn(count, classes, generator=random) + 1.5 * torch.eye(classes)[labels]
    return features, zero_shot, labels


def objective(
    parameters: np.ndarray, features: Tensor, offset: Tensor, labels: Tensor, l2: float
) -> tuple[float, np.ndarray]:
    """Return the loss with its penalty, and the gradient, for one row of weight and bias per logit."""
    x, o = features.double().numpy(), offset.double().numpy()
    x = x - x.mean(axis=0)
    spread = (x**2).sum() / len(x)
    weight = parameters.reshape(o.shape[1], -1)
    z = o + x @ weight[:, :-1].T + weight[:, -1]
    if labels.ndim == 1:
        loss = -log_softmax(z, axis=1)[np.arange(len(z)), labels.numpy()].sum()
        residual = softmax(z, axis=1) - np.eye(z.shape[1])[labels.numpy()]
    else:
        counted, right = labels.numpy() >= 0, labels.numpy() == 1
        loss = (np.logaddexp(0, np.where(right, -z, z)) * counted).sum()
        residual = (expit(z) - right) * counted
    scale = np.append(np.full(x.shape[1], l2), l2 / spread)
    gradient = np.concatenate([residual.T @ x, residual.sum(axis=0)[:, None]], axis=1) + scale * weight
    return float(loss + (scale * weight**2).sum() / 2), gradient.reshape(-1)


@pytest.mark.parametrize("kind", ["three classes", "two classes", "several classes an image"])
@pytest.mark.parametrize(("count", "width"), [(60, 7), (12, 20)])
@pytest.mark.parametrize("l2", [0.1, 30.0])
def test_a_fit_with_an_offset_is_the_optimum_that_scipy_finds(kind: str, count: int, width: int, l2: float) -> None:
    classes = 2 if kind == "two classes" else 3
    features, offset, labels = examples(count, width, classes)
    fitted, target = offset, labels
    if kind == "two classes":  # a single logit, as in scikit-learn
        fitted, target = offset[:, 1:] - offset[:, :1], labels[:, None]
    if kind == "several classes an image":
        labels = target = (torch.eye(3)[labels] + torch.eye(3)[labels.flip(0)]).clamp(max=1).to(torch.int8)
        labels[0] = -1
    fit = LogisticProblem(features, labels, classes, offset=offset).fit(l2, tolerance=1e-9)
    start = np.zeros(fitted.shape[1] * (width + 1))
    options: Any = {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-8}
    best = minimize(objective, start, (features, fitted, target, l2), method="L-BFGS-B", jac=True, options=options)
    assert fit.objective == pytest.approx(best.fun, rel=1e-4)
    weight = best.x.reshape(fitted.shape[1], -1)
    bias = weight[:, -1] - weight[:, :-1] @ features.double().mean(dim=0).numpy()
    expected = features.double().numpy() @ weight[:, :-1].T + bias
    scores = fit.scores(features)
    found = scores[:, 1:] - scores[:, :1] if kind == "two classes" else scores
    assert found.numpy() == pytest.approx(expected, abs=0.02)


def test_the_strongest_penalty_leaves_the_offset_alone() -> None:
    features, offset, labels = examples(40, 5, 3)
    scores = LogisticProblem(features, labels, 3, offset=offset).fit(1e9).scores(features)
    assert scores.abs().max() < 1e-4
    unequal = labels.clamp(max=1)  # without an offset the bias is free: the shares of the classes remain
    scores = LogisticProblem(features, unequal, 2).fit(1e9).scores(features)
    assert scores[:, 1] - scores[:, 0] == pytest.approx(np.log(26 / 14), abs=1e-3)


@pytest.mark.parametrize("several", [False, True])
def test_a_class_without_examples_keeps_the_logits_of_its_name(several: bool) -> None:
    features, zero_shot, labels = examples(30, 6, 5)
    labels[labels == 3] = 1
    truth = torch.eye(5)[labels].to(torch.int8) if several else labels
    head = fit_head(features, zero_shot, truth)
    new, names, _ = examples(10, 6, 5, seed=1)
    logits = head.logits(new, names)
    assert torch.equal(logits[:, 3], head.scale * names[:, 3] + head.shift)
    assert not torch.equal(logits[:, 1], head.scale * names[:, 1] + head.shift)


def test_held_out_logits_are_those_of_fits_that_have_not_seen_the_example() -> None:
    features, zero_shot, labels = examples(30, 4, 3)
    head = fit_head(features, zero_shot, labels)
    fold = places_in_classes(labels, 0)[0] % 5
    for number in range(5):
        held, rest = fold == number, fold != number
        problem = LogisticProblem(features[rest], labels[rest], 3, offset=head.scale * zero_shot[rest])
        fit = problem.fit(head.penalty * problem.spread)
        expected = head.scale * zero_shot[held] + fit.scores(features[held])
        assert head.held_out[held].numpy() == pytest.approx(expected.numpy(), abs=0.05)


def test_the_scale_of_zero_shot_and_the_sharpness_have_the_lowest_log_loss() -> None:
    features, zero_shot, labels = examples(30, 4, 3)
    head = fit_head(features, 4 * zero_shot, labels)

    def loss(factor: float, logits: Tensor) -> float:
        return -log_softmax(factor * logits.double().numpy(), axis=1)[np.arange(30), labels.numpy()].sum()

    sharpness = head.sharpness ** (130 / 30)  # which is drawn to 1 as by 100 examples more
    for found, logits, most in ((head.scale, 4 * zero_shot, 1), (sharpness, head.held_out, 10)):
        best = minimize_scalar(loss, bounds=(0, most), args=(logits,), method="bounded", options={"xatol": 1e-9})
        assert found == pytest.approx(best.x, rel=1e-4)
        assert 0.05 < found < most
    several = torch.eye(3)[labels].to(torch.int8)
    platt = fit_head(features, zero_shot, several)
    expected = LogisticRegression(C=1e6).fit(zero_shot.reshape(-1, 1), several.reshape(-1))
    assert platt.scale == pytest.approx(expected.coef_[0, 0], rel=1e-3)
    assert platt.shift == pytest.approx(expected.intercept_[0], rel=1e-3)


def test_names_that_mean_nothing_are_left_out_and_good_ones_stay_in_charge() -> None:
    features, _, labels = examples(40, 6, 4)
    wrong = 5 * torch.eye(4)[(labels + 1) % 4]
    assert fit_head(features, wrong, labels).scale == 0
    few = torch.arange(8)  # two of each class: better than chance is not enough
    chance = 0.3 * torch.eye(4)[labels]
    assert fit_head(features[few], chance[few], labels[few]).scale == 0
    assert fit_head(features[few], chance[few, :][:, [0, 1, 2, 3, 0]], labels[few]).scale > 0  # a class has only a name
    noise = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    right = 9 * torch.eye(4)[labels] + torch.randn(40, 4, generator=torch.Generator().manual_seed(4))
    head = fit_head(noise, right, labels)
    assert (head.logits(noise, right).argmax(dim=1) == labels).all()


def test_one_example_a_class_has_the_stated_penalty_and_no_held_out_logits() -> None:
    features, zero_shot, labels = examples(4, 6, 4)
    head = fit_head(features, 9 * torch.eye(4), labels)
    assert (head.penalty, head.sharpness) == (PENALTY, 1)
    assert head.held_out.isnan().all()
    assert fit_head(features, 0 * zero_shot, labels).penalty == PENALTY_ALONE
    unequal = torch.cat([labels, labels[:1]])  # one class has two examples
    rows = [*range(4), 0]
    head = fit_head(features[rows], zero_shot[rows], unequal)
    assert head.held_out.isfinite().all(dim=1).tolist() == [True, False, False, False, True]


def test_examples_of_one_class_alone_are_an_error() -> None:
    features, zero_shot, labels = examples(4, 6, 4)
    with pytest.raises(InputError, match="two classes need examples"):
        fit_head(features, zero_shot, torch.zeros_like(labels))


def test_few_shot_heads_see_the_draws_of_the_probes_and_nothing_else() -> None:
    features, zero_shot, labels = examples(120, 6, 3)
    everything = Split(features, Targets(labels, 3), zero_shot)
    train, test = everything.take(torch.arange(60)), everything.take(torch.arange(60, 120))
    found = train_few_shot(train, test, "top1", shots=(1, 4), draws=2)
    for shots, values in found.evaluate_heads(test, "top1").items():
        for draw, value in enumerate(values):
            rows = places_in_classes(labels[:60], draw)[0] < shots
            head = fit_head(features[:60][rows], zero_shot[:60][rows], labels[:60][rows])
            right = head.logits(features[60:], zero_shot[60:]).argmax(dim=1) == labels[60:]
            assert value == pytest.approx(float(right.double().mean()))
    without = train_few_shot(Split(features, everything.targets), test, "top1", shots=(1,), draws=1)
    assert without.evaluate_heads(test, "top1") == {}
