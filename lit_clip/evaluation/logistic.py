"""Logistic regression on features by L-BFGS: scikit-learn's optimum in fewer iterations.

Shapes: N examples, W features, C classes, K of them fitted, R directions in which the features vary.

Why it is fast:

- The search runs in coordinates in which the loss is about equally curved in all directions. With ``S`` the scatter
  matrix of the features, a class's Hessian at the start is ``p (1 - p) S + l2 I``, where p is the class's share. It is
  diagonal in S's eigenvectors for any ``l2``, so they are computed once. (Boehning 1992 bounds it by the same matrix.)
  If the classes are separable and ``l2`` is small, the Hessian at the end differs: steps in directions of little
  variance would be far too long, so every direction counts as if it had ``FLOOR`` of the mean variance more.
- Logits, losses and gradients are computed in chunks of rows that fit the cache; there is no ``[N, C]``.
- With fewer examples than features the problem is solved in the space that the examples span, where the optimum lies.

With an offset, logits that are given for each example, the classifier corrects these. So that nothing of the correction
is left at the strongest penalty, its bias is penalised too: like the weight of one more feature that is as long as the
centred features (root mean square).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.errors import InputError, require

MAX_ITERATIONS = 1000  # appendix A.3
TOLERANCE = 1e-5  # ends about 1e-4 (relative) above the minimum of the objective; scikit-learn ends at about 1e-2
HISTORY = 10
FLOOR = 0.3  # measured on digits and synthetic features; 0 takes 2 to 10 times as many iterations on digits
CPU_ENTRIES, GPU_ENTRIES = 2**20, 2**27  # features and logits of a chunk: 4 MiB (CPU cache), 512 MiB
Advance = Callable[[float], None]  # of lit_clip.tools.console.progress


@dataclass(frozen=True)
class Fit:
    """A linear classifier: weight ``[C, W]`` and bias ``[C]``, -inf for a class without examples.

    ``converged`` says whether the objective (of the fitted classes) stopped falling before the iteration limit.
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool
    objective: float

    def scores(self, features: Tensor) -> Tensor:
        """Return the logits ``[N, C]`` of features ``[N, W]``."""
        return torch.addmm(self.bias, features, self.weight.T)


class LogisticProblem:
    """Find the classifiers that minimise sum of losses + l2 / 2 |weight|^2, for several ``l2``; no penalty on the bias.

    With an offset the penalty is l2 / 2 (|weight|^2 + |bias|^2 / ``spread``), with the bias at the features' mean.

    They equal scikit-learn's ``LogisticRegression(C=1 / l2)``: with three or more classes the loss is the
    cross-entropy, with two a single logit's, half of whose weight goes to each class with opposite signs.

    Args:
        features: float ``[N, W]``; their device and dtype are used.
        labels: int64 ``[N]``; or relevance, int8 ``[N, C]`` (1, 0, or -1 for not counted), for binary classifiers.
        classes: C; a class without examples is not fitted.
        advance: called with 0 after each iteration and with 1 after each fit, to show progress.
        offset: logits ``[N, C]`` that the classifier's are added to; classes that are not fitted add 0.

    Attributes:
        spread: mean squared length of the centred features.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        advance: Advance | None = None,
        offset: Tensor | None = None,
    ) -> None:
        _check(features, labels, classes)
        self.classes = classes
        self.advance: Advance = advance or (lambda fits: None)
        self.multi_label = labels.ndim == 2
        self.labels = labels.to(features.device)
        positive, counted = self._counts()
        self.fitted = ((positive > 0) & (positive < counted)).nonzero()[:, 0]  # [K]
        # Biases of the classes that are not fitted.
        self.constant = torch.where(positive > 0, torch.inf, -torch.inf).to(features)
        self.share = (positive / counted)[self.fitted].to(features)  # [K]
        self.counted = counted[self.fitted].to(features)
        require(len(self.fitted) > 0, "labels: all the same; at least two classes need examples")
        self.binary = not self.multi_label and len(self.fitted) == 2
        self._renumber()
        self.mean, self.vectors, self.values = spectrum(features)
        self.spread = float(self.values.sum()) / len(features)
        self.offset = None if offset is None else self._fitted_offset(offset.to(features))
        self.projected = len(self.vectors) > len(features)
        self.features = (features - self.mean) @ self.vectors if self.projected else features

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Return each class's numbers of positive and of counted examples."""
        if self.multi_label:
            return (self.labels == 1).sum(dim=0), (self.labels >= 0).sum(dim=0)
        return self.labels.bincount(minlength=self.classes), self.labels.new_full((self.classes,), len(self.labels))

    def _renumber(self) -> None:
        """Number the labels among the fitted classes; turn them into relevance if each logit has its own loss."""
        if self.multi_label:
            self.labels = self.labels[:, self.fitted]
        elif self.binary:
            self.labels = (self.labels == self.fitted[1])[:, None].to(torch.int8)
            self.share, self.counted = self.share[1:], self.counted[1:]
        else:
            number = self.labels.new_zeros(self.classes)
            number[self.fitted] = torch.arange(len(self.fitted), device=number.device)
            self.labels = number[self.labels]

    def _fitted_offset(self, offset: Tensor) -> Tensor:
        """Return the offset of the fitted logits ``[N, K]``; the other classes have no constant bias."""
        shape = (len(self.labels), self.classes)
        require(offset.shape == shape, f"offset: must have the shape {shape}, not {tuple(offset.shape)}")
        require(self.spread > 0, "features: all the same")
        self.constant = torch.zeros_like(self.constant)
        offset = offset[:, self.fitted]
        return offset[:, 1:] - offset[:, :1] if self.binary else offset

    def fit(
        self, l2: float, start: Fit | None = None, max_iterations: int = MAX_ITERATIONS, tolerance: float = TOLERANCE
    ) -> Fit:
        """Fit one ``l2``, optionally from another fit, until the objective falls by less than ``tolerance`` twice."""
        require(l2 > 0, f"l2: {l2} must be above 0; without a penalty, separable classes have no optimum")
        search = _Search(self, l2)
        with torch.no_grad(), torch.autocast(self.features.device.type, enabled=False):
            point = search.zero() if start is None else search.point(*self._inside(start))
            point, iterations, converged, objective = _minimise(search, point, max_iterations, tolerance)
            weight, bias = self._outside(*search.classifier(point))
        self.advance(1)
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
        """Return the summed loss in float64 and its gradients, for centred features along ``vectors``."""
        weight = weight_KR if self.projected else weight_KR @ self.vectors.T  # in the coordinates of the features
        bias = bias_K if self.projected else bias_K - weight @ self.mean
        chunk_losses = _sigmoid_chunk if self.multi_label or self.binary else _softmax_chunk
        N, width = self.features.shape
        entries = CPU_ENTRIES if self.features.is_cpu else GPU_ENTRIES
        rows = max(256, entries // (width + len(weight)))
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        transposed = weight.T.contiguous()
        loss = bias.new_zeros((), dtype=_wide(bias))
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            chunk = self.features[part]
            logits = torch.addmm(bias, chunk, transposed)
            if self.offset is not None:
                logits += self.offset[part]
            losses, residual = chunk_losses(logits, self.labels[part])
            loss += losses.sum(dtype=loss.dtype)
            weight_gradient.addmm_(residual.T, chunk)
            bias_gradient += residual.sum(dim=0)
        if not self.projected:
            weight_gradient = (weight_gradient - bias_gradient[:, None] * self.mean) @ self.vectors
        return loss, weight_gradient, bias_gradient


def _check(features: Tensor, labels: Tensor, classes: int) -> None:
    require(features.ndim == 2 and len(features) > 0, "features: there are none")
    require(len(labels) == len(features), f"labels: there are {len(labels)} labels, but {len(features)} features")
    wrong = (~features.sum(dim=1).isfinite()).nonzero()[:, 0]  # a row's sum needs no [N, W]
    if len(wrong):
        raise InputError(f"features: those of row {int(wrong[0])} are not finite; evaluate the model in float32")
    if labels.ndim == 2:
        require(labels.shape[1] == classes, f"labels: there are {labels.shape[1]} columns, but {classes} classes")
        return
    wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"labels: row {row} has {int(labels[row])}, but there are {classes} classes, numbered from 0")


def _wide(like: Tensor) -> torch.dtype:
    """Return float64, exact enough to compare sums over a set; on MPS, return the tensor's own dtype."""
    return like.dtype if like.is_mps else torch.float64


def spectrum(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean ``[W]``, the unit directions of variation ``[W, R]`` and the sums of squares along them ``[R]``.

    R is W; with W examples or fewer it is at most their number less one. Eigenvectors are computed in float64.
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
    """Return losses ``[n]`` and their gradients ``[n, K]``, with one exponential per logit.

    If the classes are separable, losses become much smaller than the rounding error of a probability near 1; the sum
    of the other classes' probabilities gives them exactly.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    highest = logits.amax(dim=1)
    residual = logits.softmax(dim=1)
    total = highest - residual.amax(dim=1).log()  # the highest probability is at least 1 / K: no underflow
    others = residual.scatter_(1, labels[:, None], 0.0).sum(dim=1)
    residual.scatter_(1, labels[:, None], -others[:, None])
    return torch.where(others < 0.5, -(-others).log1p(), total - own), residual


def _sigmoid_chunk(logits: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and their gradients ``[n, K]``; both are 0 where the relevance is -1.

    Both are computed from what is small if the classes are separable: ``sigmoid(logit) - 1`` would be rounded to 0, and
    the search would end where the optimum is not.
    """
    sign = torch.where(relevance > 0, 1.0, -1.0).to(logits.dtype)
    counted = (relevance >= 0).to(logits.dtype)
    below = -sign * logits  # how far on the wrong side
    return F.softplus(below) * counted, -sign * below.sigmoid() * counted


class _Search:
    """Objective in coordinates ``[K, R + 1]`` that make its Hessian start near the identity."""

    def __init__(self, problem: LogisticProblem, l2: float) -> None:
        self.problem, self.l2 = problem, l2
        variance = problem.share * (1 - problem.share)  # [K]
        examples = len(problem.features)
        values = problem.values + FLOOR * problem.values.mean()
        curvature = (variance * problem.counted / examples)[:, None] * values
        self.scale = (curvature + l2).rsqrt()  # [K, R]
        self.bias_l2 = 0.0 if problem.offset is None else l2 / problem.spread
        self.bias_scale = (variance * problem.counted + self.bias_l2).rsqrt()  # [K]
        share = problem.share
        self.first_bias = share.logit() if problem.multi_label or problem.binary else share.log()
        if problem.offset is not None:
            self.first_bias = torch.zeros_like(share)

    def zero(self) -> Tensor:
        """Return the point with zero weights and the optimal bias for them."""
        return self.scale.new_zeros(len(self.scale), self.scale.shape[1] + 1)

    def point(self, weight_KR: Tensor, bias_K: Tensor) -> Tensor:
        """Return the coordinates of a classifier of centred features."""
        bias = (bias_K - self.first_bias) / self.bias_scale
        return torch.cat([weight_KR / self.scale, bias[:, None]], dim=1)

    def classifier(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classifier at a point; inverts :meth:`point`."""
        return point[:, :-1] * self.scale, point[:, -1] * self.bias_scale + self.first_bias

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective in float64 and its gradient."""
        weight, bias = self.classifier(point)
        loss, weight_gradient, bias_gradient = self.problem.loss_and_gradient(weight, bias)
        penalty = self.l2 * weight.to(loss.dtype).square().sum() + self.bias_l2 * bias.to(loss.dtype).square().sum()
        weight_gradient = (weight_gradient + self.l2 * weight) * self.scale
        bias_gradient = (bias_gradient + self.bias_l2 * bias) * self.bias_scale
        return loss + penalty / 2, torch.cat([weight_gradient, bias_gradient[:, None]], dim=1)


def _minimise(
    objective: _Search, point: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int, bool, float]:
    """Return the lowest point found, the iterations, whether the search converged, and the objective there."""
    point = torch.nn.Parameter(point)
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=1,  # one iteration per step: the stopping rule below is ours
        max_eval=100,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    known: tuple[Tensor, Tensor, Tensor] | None = None  # the last evaluation: a step starts where the last one ended

    @torch.no_grad()
    def evaluate() -> Tensor:
        nonlocal known
        if known is None or not torch.equal(known[0], point):
            known = (point.clone(), *objective(point))
        point.grad = known[2].clone()
        return known[1]

    lowest, best, still = float(evaluate()), point.clone(), 0
    assert known is not None
    # torch scales the first step by 1 / |gradient|_1; undo that, as the Hessian is near the identity here.
    optimizer.param_groups[0]["lr"] = max(1.0, float(known[2].abs().sum()))
    for iteration in range(1, max_iterations + 1):
        optimizer.step(evaluate)
        optimizer.param_groups[0]["lr"] = 1.0
        value = float(evaluate())
        objective.problem.advance(0)
        still = still + 1 if not lowest - value > tolerance * abs(value) else 0
        if value < lowest:
            lowest, best = value, point.clone()
        if still == 2:
            return best, iteration, True, lowest
    return best, max_iterations, False, lowest
