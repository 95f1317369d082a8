"""Time a linear probe with lit_clip's L-BFGS and scikit-learn's, on the same features with the same penalty.

    python benchmarks/linear_probe.py

Each trains one classifier, in turn, with the same number of threads; then lit_clip runs a whole search of the penalty.
Features are synthetic and resemble a tower's: classes cluster around centres, scales of directions follow a power law
(so that coordinates are correlated), the mean is far from zero in a few coordinates, and lengths are not normalised.
The objective, computed in float64, shows how close each gets to the optimum. Scikit-learn's default tolerance stops
short of it, so its accuracy may differ a little: lit-clip is run again only as far as that, and scikit-learn again with
a smaller tolerance.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from results import Result, compared, parser, save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_clip.evaluation.logistic import MAX_ITERATIONS, Fit, LogisticProblem
from lit_clip.evaluation.probe import Split, train_probe
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.targets import Targets

TIGHT = 1e-6  # scikit-learn's default tolerance, 1e-4 on the mean loss's gradient, stops short of the optimum
OURS = "lit-clip, float32"
README_L2 = 10**0.5  # C = 0.316 in the README of openai/CLIP


def features(examples: int, held: int, width: int, classes: int, noise: float) -> tuple[Tensor, Tensor]:
    """Return float32 features ``[examples + held, width]`` and their labels."""
    random = torch.Generator().manual_seed(0)
    size = 3 * torch.arange(1, width + 1) ** -0.6
    rotation = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
    centres = torch.randn(classes, width, generator=random)
    mean = 0.3 * torch.randn(width, generator=random)
    mean[:3] = torch.tensor([8.0, -5.0, 3.0])
    labels = torch.randint(classes, (examples + held,), generator=random)
    scatter = noise * torch.randn(len(labels), width, generator=random)
    return (centres[labels] + scatter) * size @ rotation + mean, labels


def scikit(x: Tensor, labels: Tensor, l2: float, dtype: torch.dtype, tol: float = 1e-4) -> Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    warnings.simplefilter("ignore", ConvergenceWarning)  # the table shows the iterations
    model = LogisticRegression(C=1 / l2, max_iter=1000, tol=tol).fit(x.to(dtype).numpy(), labels.numpy())
    iterations = int(model.n_iter_[0])
    return Fit(torch.tensor(model.coef_), torch.tensor(model.intercept_), iterations, iterations < 1000, 0.0)


def as_low(x: Tensor, labels: Tensor, classes: int, l2: float, theirs: float) -> int:
    """Return how many iterations lit-clip needs for an objective no higher than theirs."""
    for iterations in range(1, 1001):
        if LogisticProblem(x, labels, classes).fit(l2, None, iterations).objective <= theirs:
            return iterations
    raise RuntimeError(f"lit-clip does not reach the objective {theirs}")


def objective(fit: Fit, x: Tensor, labels: Tensor, l2: float) -> float:
    weight, bias = fit.weight.double(), fit.bias.double()
    parts = zip(x.split(4096), labels.split(4096), strict=True)
    loss = sum(
        float(torch.nn.functional.cross_entropy(part.double() @ weight.T + bias, some, reduction="sum"))
        for part, some in parts
    )
    return loss + l2 / 2 * float(weight.square().sum())


class Comparison:
    """The fits of each library, and their times."""

    def __init__(self, x: Tensor, labels: Tensor, classes: int, l2: float) -> None:
        self.x, self.labels, self.classes, self.l2 = x, labels, classes, l2
        self.seconds: dict[str, list[float]] = {}
        self.fits: dict[str, Fit] = {}

    def run(self, name: str, fit: Callable[[], Fit]) -> None:
        start = time.perf_counter()
        self.fits[name] = fit()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def ours(self, iterations: int = MAX_ITERATIONS) -> Fit:
        return LogisticProblem(self.x, self.labels, self.classes).fit(self.l2, None, iterations)

    def theirs(self, dtype: torch.dtype, tol: float = 1e-4) -> Fit:
        return scikit(self.x, self.labels, self.l2, dtype, tol)

    def rows(self, test_x: Tensor, test_y: Tensor) -> Iterator[list[str]]:
        for name, times in self.seconds.items():
            fit = self.fits[name]
            ratio = statistics.median(a / b for a, b in zip(times, self.seconds[OURS], strict=False))
            accuracy = float((fit.scores(test_x.to(fit.weight.dtype)).argmax(1) == test_y).double().mean())
            least = objective(fit, self.x, self.labels, self.l2)
            spread = f"{min(times):.2f} to {max(times):.2f}" if len(times) > 1 else ""
            numbers = [f"{statistics.median(times):.2f}", spread, f"{ratio:.2f}", f"{fit.iterations}", f"{least:.2f}"]
            yield [name, *numbers, f"{100 * accuracy:.2f} %"]

    def results(self, title: str) -> Iterator[Result]:
        """Yield the comparison of ours with scikit-learn in each precision."""
        for name, times in self.seconds.items():
            if name != OURS and len(times) == len(self.seconds[OURS]):
                pairs, precision = zip(times, self.seconds[OURS], strict=True), name.rpartition(" ")[2]
                yield compared(f"linear_probe/{precision}", f"linear probe, {title}", pairs, peer=name)


def compare(comparison: Comparison, rounds: int, tight: bool) -> None:
    peer = f"scikit-learn {version('scikit-learn')}"
    for _ in range(rounds):
        comparison.run(f"{peer}, float64", lambda: comparison.theirs(torch.float64))
        comparison.run(f"{peer}, float32", lambda: comparison.theirs(torch.float32))
        comparison.run(OURS, comparison.ours)
    theirs = objective(comparison.fits[f"{peer}, float32"], comparison.x, comparison.labels, comparison.l2)
    enough = as_low(comparison.x, comparison.labels, comparison.classes, comparison.l2, theirs)
    comparison.run("lit-clip, only as far as scikit-learn", lambda: comparison.ours(enough))
    if tight:
        comparison.run(f"{peer}, float64, tol={TIGHT:g}", lambda: comparison.theirs(torch.float64, TIGHT))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--examples", type=int, default=50_000)
    options.add_argument("--held", type=int, default=10_000, help="test examples, for the printed accuracy")
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--classes", type=int, default=100)
    options.add_argument("--noise", type=float, default=4.0, help="of examples around their class's centre")
    options.add_argument("--l2", type=float, default=README_L2)
    options.add_argument("--rounds", type=int, default=3, help="of the first three fits; medians are printed")
    flag: Any = argparse.BooleanOptionalAction
    options.add_argument("--tight", action=flag, default=True, help="also run scikit-learn with a smaller tolerance")
    options.add_argument("--search", action=flag, default=True, help="also run lit-clip's whole probe")
    chosen = options.parse_args()
    x, y = features(chosen.examples, chosen.held, chosen.width, chosen.classes, chosen.noise)
    train, test = (x[: chosen.examples], y[: chosen.examples]), (x[chosen.examples :], y[chosen.examples :])
    warm_up = Comparison(train[0][:1000], train[1][:1000], chosen.classes, chosen.l2)  # warms up imports
    warm_up.ours()
    warm_up.theirs(torch.float32)
    comparison = Comparison(*train, chosen.classes, chosen.l2)
    compare(comparison, chosen.rounds, chosen.tight)
    table = Table("", "seconds", "least to most", "times lit-clip's", "iterations", "objective", "accuracy")
    table.title = (
        f"{chosen.examples:,} x {chosen.width} features, {chosen.classes} classes, l2 = {chosen.l2:.3g}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {chosen.rounds} rounds"
    )
    for row in comparison.rows(*test):
        table.add_row(*row)
    Console(width=160).print(table)
    save(chosen.json, *comparison.results(table.title.partition(", torch")[0]))
    if chosen.search:
        splits = [Split(part, Targets(labels, chosen.classes)) for part, labels in (train, test)]
        start = time.perf_counter()
        result = train_probe(splits[0], None, "top1")
        top1 = evaluate_scores("top1", result.fit.scores(splits[1].features), splits[1].targets)["top1"]
        print(
            f"The whole probe ({len(result.search)} penalties on four fifths, one more on all): "
            f"{time.perf_counter() - start:.1f} s, l2 = {result.l2:.3g}, accuracy {100 * top1:.2f} %"
        )


if __name__ == "__main__":
    main()
