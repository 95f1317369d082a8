"""The weight of texts in vectors of things, against a plain optimisation in float64, and on things made for it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from lit_clip.embedding import mixture
from lit_clip.embedding.mixture import learn_text_weight

Judged = list[tuple[int, int, float]]


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def made(image_noise: float, text_noise: float, things: int = 60) -> tuple[Tensor, Tensor, Tensor, Judged]:
    """Return features of things whose images and texts, and four queries each, are noisy copies of the thing's own."""
    own = unit(things, 16, seed=0)
    image, text = own + image_noise * unit(things, 16, seed=1), own + text_noise * unit(things, 16, seed=2)
    queries = own.repeat(4, 1) + 1.5 * unit(4 * things, 16, seed=3)
    judged: Judged = [(row, row % things, 1) for row in range(4 * things)]
    image, text, queries = (torch.nn.functional.normalize(each, dim=1) for each in (image, text, queries))
    return image, text, queries, judged


def loop(image: Tensor, text: Tensor, queries: Tensor, judged: Judged, scale: float, weight: float) -> float:
    """Return the cross-entropy of a weight by its definition, one query and thing after the other."""
    things = []
    for a, b in zip(image.double().numpy(), text.double().numpy(), strict=True):
        mixed = (1 - weight) * a + weight * b
        things.append(mixed / math.sqrt((mixed * mixed).sum()))
    total, asked = 0.0, sorted({query for query, _, _ in judged})
    for query in asked:
        logits = [scale * float(queries[query].double().numpy() @ thing) for thing in things]
        norm = math.log(sum(math.exp(logit) for logit in logits))
        grades = {thing: grade for each, thing, grade in judged if each == query}
        total += sum(grade * (norm - logits[thing]) for thing, grade in grades.items()) / sum(grades.values())
    return total / len(asked)


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("noise", [(1.0, 1.0), (1.5, 0.8)])
def test_the_weight_is_that_of_a_plain_optimisation(
    noise: tuple[float, float], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "CHUNK", chunk)
    image, text, queries, judged = made(*noise, things=12)
    judged = [*judged[5:], (7, 3, 2), (8, 1, 3)]  # queries without a relevant thing, and with two by grades
    found = learn_text_weight(image, text, queries, judged, scale=12.0)
    best: Any = minimize_scalar(
        lambda w: loop(image, text, queries, judged, 12.0, w), (0.0, 1.0), (0, 1), method="bounded"
    )
    assert abs(found.text_weight - best.x) <= 0.0051
    for weight in (0.0, 0.13, 1.0):
        assert found.losses[round(100 * weight)] == pytest.approx(loop(image, text, queries, judged, 12.0, weight))
    assert found.queries == len(queries) - 5


@pytest.mark.parametrize(("noise", "low", "high"), [((30, 0.5), 0.85, 1), ((0.5, 30), 0, 0.15), ((1, 1), 0.4, 0.6)])
def test_what_is_noise_has_little_weight(noise: tuple[float, float], low: float, high: float) -> None:
    found = learn_text_weight(*made(*noise), scale=20.0)
    assert low <= found.text_weight <= high
    assert 0 < found.text_weight < 1
    assert min(found.losses) <= min(found.losses[0], found.losses[-1])


def test_of_many_things_and_queries_some_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn_text_weight(*made(1.5, 0.8, things=200), scale=20.0)
    monkeypatch.setattr(mixture, "MOST_QUERIES", 200)
    monkeypatch.setattr(mixture, "MOST_THINGS", 50)
    part = learn_text_weight(*made(1.5, 0.8, things=200), scale=20.0)
    assert part.queries == 200
    assert abs(part.text_weight - whole.text_weight) <= 0.15
    assert np.argmin(part.losses) not in (0, 100)


def test_queries_with_many_judged_things_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, queries, _ = made(1.5, 0.8, things=200)
    judged: Judged = [(query, (5 * query + n) % 200, 1) for query in range(40) for n in range(5)]
    compared, combined = set[int](), mixture.combined
    monkeypatch.setattr(mixture, "MOST_THINGS", 30)
    monkeypatch.setattr(
        mixture, "combined", lambda image, text, weight: (compared.add(len(image)), combined(image, text, weight))[1]
    )
    found = learn_text_weight(image, text, queries, judged, scale=20.0)
    assert found.queries == 5
    assert max(compared) <= 60
    one: Judged = [(0, thing, 1) for thing in range(200)]
    assert learn_text_weight(image, text, queries, one, scale=20.0).queries == 1
