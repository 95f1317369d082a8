"""Logistic regression on features by L-BFGS: the optimum is scikit-learn's, the way there is shorter.

Shapes: N examples, W features, C classes, K of them to be fitted, R directions in which the features differ.

What makes it fast:

- The search runs in coordinates in which the loss is about equally curved in all directions. With ``S`` the scatter
  matrix of the features, a class's Hessian at the start is ``p (1 - p) S + l2 I``, where p is the class's share; it is
  diagonal among S's eigenvectors, whatever ``l2``, so they are found once. (Boehning 1992 bounds it likewise.)
  Where classes can be separated and ``l2`` is small, the Hessian at the end is another: directions in which features
  hardly differ would be followed far too eagerly, so all count as if they differed by ``FLOOR`` of the mean more.
- Logits, losses and gradients are made for some rows at a time, which stay in the cache; there is no ``[N, C]``.
- With fewer examples than features the problem is solved in the space that the examples span: the optimum lies there.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.errors import InputError, require

MAX_ITERATIONS = 1000  # appendix A.3
TOLERANCE = 1e-5  # the objective is then about 1e-4 of itself above its least; scikit-learn's ends at about 1e-2
HISTORY = 10
FLOOR = 0.3  # measured on digits and on synthetic features: 0 takes 2 to 10 times as many iterations on digits
CPU_ENTRIES, GPU_ENTRIES = 2**20, 2**27  # of the features and logits of a chunk: 4 MiB in the cache, 512 MiB


@dataclass(frozen=True)
class Fit:
    """A linear classifier.

    Attributes:
        weight: ``[C, W]``.
        bias: ``[C]``; -inf for a class without examples, which is never predicted.
        iterations: of L-BFGS.
        converged: whether the objective stood still before the iterations were spent.
        objective: sum of losses + l2 / 2 |weight|^2, of what was fitted.
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool
    objective: float

    def scores(self, features: Tensor) -> Tensor:
        """``[N, W]`` -> ``[N, C]`` logits."""
        return torch.addmm(self.bias, features, self.weight.T)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Fit:
    """The classifier that minimises sum of losses + l2 / 2 |weight|^2; the bias goes free.

    It is that of scikit-learn's ``LogisticRegression(C=1 / l2)``: with three classes or more the loss is the
    cross-entropy, with two it is that of a single logit (whose weight is shared out as +1/2 and -1/2).

    Args:
        features: float ``[N, W]``; on their device and in their dtype it is computed.
        labels: int64 ``[N]``; or int8 ``[N, C]`` relevance, 1 or 0, -1 not to be counted: each class by itself then.
        classes: C; those without examples are left out.
        l2: strength of the penalty.
        max_iterations: of L-BFGS.
        tolerance: it ends when the objective falls by less than this fraction twice running.

    Raises:
        InputError: labels out of range or all the same, features that are not finite, none at all.
    """
    return LogisticProblem(features, labels, classes).fit(l2, None, max_iterations, tolerance)


class LogisticProblem:
    """:func:`fit_logistic` for several ``l2``, each of which can start where another ended."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        _check(features, labels, classes)
        self.classes = classes
        self.multi_label = labels.ndim == 2
        self.labels = labels.to(features.device)
        positive, counted = self._counts()
        self.fitted = ((positive > 0) & (positive < counted)).nonzero()[:, 0]  # [K]
        self.constant = torch.where(positive > 0, torch.inf, -torch.inf).to(features)  # biases of the others
        self.share = (positive / counted)[self.fitted].to(features)  # [K]
        self.counted = counted[self.fitted].to(features)
        require(len(self.fitted) > 0, "labels: all the same; there is nothing to tell apart")
        self.binary = not self.multi_label and len(self.fitted) == 2
        self._renumber()
        self.mean, self.vectors, self.values = spectrum(features)
        self.projected = len(self.vectors) > len(features)
        self.features = (features - self.mean) @ self.vectors if self.projected else features

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Of each class its examples, and those that it could have."""
        if self.multi_label:
            return (self.labels == 1).sum(dim=0), (self.labels >= 0).sum(dim=0)
        return self.labels.bincount(minlength=self.classes), self.labels.new_full((self.classes,), len(self.labels))

    def _renumber(self) -> None:
        """Labels among the fitted classes; as relevance where each logit has a loss of its own."""
        if self.multi_label:
            self.labels = self.labels[:, self.fitted]
        elif self.binary:
            self.labels = (self.labels == self.fitted[1])[:, None].to(torch.int8)
            self.share, self.counted = self.share[1:], self.counted[1:]
        else:
            number = self.labels.new_zeros(self.classes)
            number[self.fitted] = torch.arange(len(self.fitted), device=number.device)
            self.labels = number[self.labels]

    def fit(
        self, l2: float, start: Fit | None = None, max_iterations: int = MAX_ITERATIONS, tolerance: float = TOLERANCE
    ) -> Fit:
        """One ``l2``; arguments as of :func:`fit_logistic`, ``start``: a fit of the same classes and features."""
        require(l2 > 0, f"l2: {l2} must be more than 0, or classes that can be separated have no optimum")
        search = _Search(self, l2)
        with torch.no_grad(), torch.autocast(self.features.device.type, enabled=False):
            point = search.zero() if start is None else search.point(*self._inside(start))
            point, iterations, converged, objective = _minimise(search, point, max_iterations, tolerance)
            weight, bias = self._outside(*search.classifier(point))
        return Fit(weight, bias, iterations, converged, objective)

    def _outside(self, weight_KR: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        weight_KW = weight_KR @ self.vectors.T
        bias_K = bias_K - weight_KW @ self.mean
        if self.binary:
            weight_KW, bias_K = torch.cat([-weight_KW, weight_KW]) / 2, torch.cat([-bias_K, bias_K]) / 2
        weight, bias = weight_KW.new_zeros(self.classes, weight_KW.shape[1]), self.constant.clone()
        weight[self.fitted], bias[self.fitted] = weight_KW, bias_K
        return weight, bias

    def _inside(self, fit: Fit) -> tuple[Tensor, Tensor]:
        weight, bias = fit.weight[self.fitted], fit.bias[self.fitted]
        if self.binary:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        bias = bias + weight @ self.mean
        return weight @ self.vectors, torch.where(bias.isfinite(), bias, self.share.logit())

    def loss_and_gradient(self, weight_KR: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of losses in float64 and its gradients, of a classifier of centred features among ``vectors``."""
        weight = weight_KR if self.projected else weight_KR @ self.vectors.T  # of the features as they lie there
        bias = bias_K if self.projected else bias_K - weight @ self.mean
        of_chunk = _sigmoid_chunk if self.multi_label or self.binary else _softmax_chunk
        N, width = self.features.shape
        entries = CPU_ENTRIES if self.features.is_cpu else GPU_ENTRIES
        rows = max(256, entries // (width + len(weight)))
        of_weight, of_bias, transposed = torch.zeros_like(weight), torch.zeros_like(bias), weight.T.contiguous()
        loss = bias.new_zeros((), dtype=_wide(bias))
        for chunk, labels in zip(self.features.split(rows), self.labels.split(rows), strict=True):
            some, residual = of_chunk(torch.addmm(bias, chunk, transposed), labels)
            loss += some.sum(dtype=loss.dtype)
            of_weight.addmm_(residual.T, chunk)
            of_bias += residual.sum(dim=0)
        if not self.projected:
            of_weight = (of_weight - of_bias[:, None] * self.mean) @ self.vectors
        return loss, of_weight, of_bias


def _check(features: Tensor, labels: Tensor, classes: int) -> None:
    require(features.ndim == 2 and len(features) > 0, "features: there are none to learn from")
    require(len(labels) == len(features), f"labels: {len(labels)} of {len(features)} features")
    wrong = (~features.sum(dim=1).isfinite()).nonzero()[:, 0]  # a sum is finite if all are, and needs no [N, W]
    if len(wrong):
        raise InputError(f"features: those of row {int(wrong[0])} are not finite; evaluate the model in float32")
    if labels.ndim == 2:
        require(labels.shape[1] == classes, f"labels: {labels.shape[1]} columns of {classes} classes")
        return
    wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"labels: row {row} has {int(labels[row])}, but there are {classes} classes, numbered from 0")


def _wide(like: Tensor) -> torch.dtype:
    """float64, in which sums over a set are exact enough to compare; MPS has none."""
    return like.dtype if like.is_mps else torch.float64


def spectrum(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean ``[W]``, unit directions ``[W, R]`` in which features differ, and their sums of squares ``[R]``.

    R is W, or with no more than W examples at most their number less one. The eigenvectors are found in float64.
    """
    N, W = features.shape
    mean = features.mean(dim=0)
    if N > W:
        scatter = features.new_zeros(W, W)
        for chunk in features.split(max(256, CPU_ENTRIES // W)):
            centred = chunk - mean
            scatter.addmm_(centred.T, centred)
        values, vectors = torch.linalg.eigh(scatter.cpu().double())
        return mean, vectors.to(features), values.clamp(min=0).to(features)
    centred = (features - mean).cpu().double()
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    kept = values > values[-1] * N * torch.finfo(features.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    return mean, (centred.T @ (vectors / values.sqrt())).to(features), values.to(features)


def _softmax_chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``[n]`` and their gradients ``[n, K]``; one exponential each suffices for both.

    Where the classes can be separated, losses become much smaller than the rounding of a probability near 1: what is
    left to the other classes says them exactly.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    highest = logits.amax(dim=1)
    residual = logits.softmax(dim=1)
    total = highest - residual.amax(dim=1).log()  # the highest probability is at least 1 / K: no underflow
    others = residual.scatter_(1, labels[:, None], 0.0).sum(dim=1)
    residual.scatter_(1, labels[:, None], -others[:, None])
    return torch.where(others < 0.5, -(-others).log1p(), total - own), residual


def _sigmoid_chunk(logits: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and their gradients ``[n, K]``; 0 where the relevance is -1."""
    counted, right = relevance >= 0, (relevance > 0).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, right, counted.to(logits.dtype), reduction="none")
    return loss, (logits.sigmoid() - right) * counted


class _Search:
    """The objective in coordinates ``[K, R + 1]`` in which its Hessian starts near the identity."""

    def __init__(self, problem: LogisticProblem, l2: float) -> None:
        self.problem, self.l2 = problem, l2
        variance = problem.share * (1 - problem.share)  # [K]
        examples = len(problem.features)
        values = problem.values + FLOOR * problem.values.mean()
        curvature = (variance * problem.counted / examples)[:, None] * values
        self.scale = (curvature + l2).rsqrt()  # [K, R]
        self.bias_scale = (variance * problem.counted).rsqrt()  # [K]
        share = problem.share
        self.first_bias = share.logit() if problem.multi_label or problem.binary else share.log()

    def zero(self) -> Tensor:
        """No weights, and the bias that is best without any."""
        return self.scale.new_zeros(len(self.scale), self.scale.shape[1] + 1)

    def point(self, weight_KR: Tensor, bias_K: Tensor) -> Tensor:
        """The coordinates of a classifier of centred features."""
        bias = (bias_K - self.first_bias) / self.bias_scale
        return torch.cat([weight_KR / self.scale, bias[:, None]], dim=1)

    def classifier(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`point`."""
        return point[:, :-1] * self.scale, point[:, -1] * self.bias_scale + self.first_bias

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The objective, in float64, and its gradient."""
        weight, bias = self.classifier(point)
        loss, of_weight, of_bias = self.problem.loss_and_gradient(weight, bias)
        objective = loss + self.l2 / 2 * weight.to(loss.dtype).square().sum()
        of_weight = (of_weight + self.l2 * weight) * self.scale
        return objective, torch.cat([of_weight, (of_bias * self.bias_scale)[:, None]], dim=1)


def _minimise(
    objective: _Search, point: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int, bool, float]:
    """The lowest point found, iterations, whether it stood still, and the objective there."""
    point = torch.nn.Parameter(point)
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=1,  # a step of it is one iteration: between two of them we decide whether to go on
        max_eval=100,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    known: tuple[Tensor, Tensor, Tensor] | None = None  # a step begins where the last one ended

    @torch.no_grad()
    def evaluate() -> Tensor:
        nonlocal known
        if known is None or not torch.equal(known[0], point):
            known = (point.clone(), *objective(point))
        point.grad = known[2].clone()
        return known[1]

    lowest, best, still = float(evaluate()), point.clone(), 0
    assert known is not None
    # The first step of torch's is 1 / |gradient|_1 long, for want of knowledge; here the Hessian is about 1.
    optimizer.param_groups[0]["lr"] = max(1.0, float(known[2].abs().sum()))
    for iteration in range(1, max_iterations + 1):
        optimizer.step(evaluate)
        optimizer.param_groups[0]["lr"] = 1.0
        value = float(evaluate())
        still = still + 1 if not lowest - value > tolerance * abs(value) else 0
        if value < lowest:
            lowest, best = value, point.clone()
        if still == 2:
            return best, iteration, True, lowest
    return best, max_iterations, False, lowest
