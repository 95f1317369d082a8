"""Losses that combine other losses."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lit_clip.errors import require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, LossValue, Pairs, evaluate_loss


def _weights(weights: list[float] | None, number: int, of: str, name: str) -> list[float]:
    require(number > 0, f"model.loss: {name} needs at least one of its {of}")
    chosen = [1.0] * number if weights is None else list(weights)
    require(len(chosen) == number, f"model.loss: {name} has {len(chosen)} weights for {number} {of}; give one for each")
    require(all(weight >= 0 for weight in chosen), f"model.loss: {name}.weights {chosen} must be at least 0")
    return chosen


class Sum(Loss):
    """Weighted sum of losses; logs each of them, such as ``train/contrastive_loss``, and their own values.

    Args:
        terms: the losses.
        weights: one for each; None: all 1.
    """

    def __init__(self, terms: list[Loss], weights: list[float] | None = None) -> None:
        super().__init__()
        self.weights = _weights(weights, len(terms), "terms", "Sum")
        self.terms: Any = nn.ModuleList(terms)
        self.names = _different(_loss_name(term) for term in terms)
        self.uses_negatives = any(term.uses_negatives for term in terms)

    def prepare(self, model: Any) -> None:
        for term in self.terms:
            term.prepare(model)

    def forward(self, pairs: Pairs) -> LossValue:
        total: Any = 0.0
        metrics: dict[str, Tensor | float] = {}
        for name, weight, term in zip(self.names, self.weights, self.terms, strict=True):
            loss, logged = evaluate_loss(term, pairs)
            total = total + weight * loss
            metrics = {**logged, **metrics, name: loss.detach()}
        return LossValue(total, metrics)

    def chance_loss(self, pairs: int) -> float | None:
        values = [term.chance_loss(pairs) for term in self.terms]
        known = None not in values
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True)) if known else None


class Matryoshka(Loss):
    """Apply a loss also to the first channels, so that features can be truncated (Kusupati et al. 2022).

    The features are cut off and normalised again for each number of channels, and the losses are summed. Logs each of
    them, such as ``train/loss_64``; what the inner loss logs belongs to the largest number.

    Args:
        loss: the inner loss.
        dims: numbers of channels, usually with all of them among them.
        weights: one for each; None: all 1.
    """

    def __init__(self, loss: Loss, dims: list[int], weights: list[float] | None = None) -> None:
        super().__init__()
        self.weights = _weights(weights, len(dims), "dims", "Matryoshka")
        require(min(dims) >= 1, f"model.loss: Matryoshka.dims {list(dims)} must be at least 1")
        self.loss, self.dims = loss, list(dims)
        self.uses_negatives = loss.uses_negatives

    def prepare(self, model: Any) -> None:
        most = model.config.embed_dim
        require(max(self.dims) <= most, f"model.loss: Matryoshka.dims {self.dims}, but the features have {most}")
        self.loss.prepare(model)

    def forward(self, pairs: Pairs) -> LossValue:
        total: Any = 0.0
        metrics: dict[str, Tensor | float] = {}
        for dim, weight in zip(self.dims, self.weights, strict=True):
            loss, logged = evaluate_loss(self.loss, _first_channels(pairs, dim))
            total = total + weight * loss
            metrics |= {f"loss_{dim}": loss.detach()} | (dict(logged) if dim == max(self.dims) else {})
        return LossValue(total, metrics)

    def chance_loss(self, pairs: int) -> float | None:
        inner = self.loss.chance_loss(pairs)
        return None if inner is None else sum(self.weights) * inner


def _first_channels(pairs: Pairs, dim: int) -> Pairs:
    negatives = pairs.negatives
    return replace(
        pairs,
        image=unit(pairs.image[:, :dim]),
        text=unit(pairs.text[:, :dim]),
        negatives=negatives and negatives._replace(features=unit(negatives.features[:, :dim])),
    )


def _loss_name(loss: Loss) -> str:
    """Return the name of a loss by its class: ``Contrastive`` -> ``contrastive_loss``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(loss).__name__).lower()
    return words.removesuffix("_loss") + "_loss"


def _different(names: Iterable[str]) -> list[str]:
    """Number repeated names: ``a, a, b`` -> ``a, a_2, b``."""
    found: list[str] = []
    counts: Counter[str] = Counter()
    for name in names:
        counts[name] += 1
        found.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return found
