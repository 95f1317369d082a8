"""Metrics by class path, torchmetrics' or your own, on the class probabilities of a set.

A metric is updated with probabilities, float32 ``[B, C]``, and labels, int64 ``[B]``, or where an image has several
classes relevance, int64 ``[B, C]``. One process has a set's probabilities, so a metric never synchronises: its result
does not depend on the number of ranks, whatever its states are.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from sysconfig import get_path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, cast

import torch
from jsonargparse import Namespace
from torch import Tensor
from yaml import YAMLError

from lit_clip.errors import InputError, require
from lit_clip.evaluation.scores import METRICS
from lit_clip.evaluation.suite import check_name
from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import sha256_of_file
from lit_clip.tools.messages import imported_class
from lit_clip.tools.parts import instantiate, unwrapped
from lit_clip.tools.reading import parse_yaml, write_csv

if TYPE_CHECKING:
    from torchmetrics import Metric

# Where code lies that is not the user's.
LIBRARIES = ("<", str(Path(__file__).parents[1]), *(get_path(name) for name in ("stdlib", "purelib", "platlib")))

Metrics = Mapping[str, Any]
"""By name: a class path, ``class_path`` and ``init_args``, a metric, or a class or ``partial`` that makes one."""


@dataclass
class Computed:
    """Results by the metric's name: numbers, and other results as tensors or nested lists."""

    numbers: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Add a metric's result; each entry of a mapping is a separate result."""
        if isinstance(value, Mapping):
            for key, each in value.items():
                self.add(f"{name}_{key}".replace("/", "_"), each)
        elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
            self.numbers[name] = float(value)
        else:
            self.arrays[name] = value.detach().cpu() if isinstance(value, Tensor) else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if isinstance(value, Tensor) else value


def metrics_typed(words: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of ``--metrics``: ``NAME=VALUE`` each, with a YAML value; see :data:`Metrics`."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        require(bool(equals and name), f"--metrics {word}: must be NAME=CLASS_PATH, such as {EXAMPLE}")
        require(name not in found, f"--metrics: there are two called {name}; rename one")
        try:
            found[name] = parse_yaml(value)
        except YAMLError as error:
            raise InputError(f"--metrics {name}: is not YAML ({' '.join(str(error).split())})") from error
    return checked(found, "--metrics")


EXAMPLE = "auroc=torchmetrics.classification.MulticlassAUROC"


def checked(metrics: Any, where: str) -> dict[str, Any]:
    """Check the names and form of metrics, and return them; they are built later for each set."""
    require(isinstance(metrics, Mapping), f"{where}: must be a mapping of names to class paths, such as {EXAMPLE}")
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Namespace):  # the command line's, which has read it as a class with all its arguments
            value = value.as_dict()  # noqa: PLW2901
        check_name(name, where)
        own = name in METRICS and not METRICS[name].task  # those of other tasks are never beside it
        require(not own, f"{where}: {name} is a metric of lit-clip's own; choose another name")
        spec = value if isinstance(value, Mapping) else {"class_path": value}
        written = isinstance(spec.get("class_path"), str) and spec.keys() <= {"class_path", "init_args"}
        require(
            written or callable(value),
            f"{where}: {name}: {value!r} is no metric; name its class, such as {EXAMPLE.partition('=')[2]}",
        )
        found[name] = value
    return found


def build(metrics: Metrics, classes: int, uncounted: bool = False) -> dict[str, "Metric"]:
    """Build the metrics for a set of C classes; each gets C as ``num_classes`` or ``num_labels`` unless given.

    With ``uncounted`` the relevance -1 stands for "not counted", and is a metric's ``ignore_index`` unless given.
    """
    sizes = {"num_classes": classes, "num_labels": classes, **({"ignore_index": -1} if uncounted else {})}
    return {name: _alone(_built(name, value, sizes)) for name, value in metrics.items()}


def _built(name: str, value: Any, sizes: Mapping[str, int]) -> "Metric":
    from torchmetrics import Metric  # imports slowly

    if isinstance(value, Metric):
        fresh = value.clone()
        fresh.reset()
        return fresh
    if callable(value):
        target, given = unwrapped(value)
        with _errors(name):
            metric: Any = value(**_missing(target, given, sizes))
        require(isinstance(metric, Metric), f"metrics: {name}: makes no torchmetrics.Metric")
        return metric
    spec = dict(value) if isinstance(value, Mapping) else {"class_path": value}
    given = spec.get("init_args") or {}
    require(isinstance(given, Mapping), f"metrics: {name}: init_args must be a mapping of arguments, not {given!r}")
    target = imported_class(spec["class_path"])
    more = _missing(target, given, sizes) if callable(target) else {}
    with _errors(name):
        return instantiate(cast(Any, Metric), {**spec, "init_args": {**given, **more}})


def _missing(target: Callable[..., Any], given: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # of a class of C, which is no metric
        return {}
    return {key: size for key, size in sizes.items() if key in parameters and given.get(key) is None}


def _alone(metric: "Metric") -> "Metric":
    """Return a metric that does not synchronise; otherwise its result would wait for the other ranks."""
    for part in metric.modules():
        setattr(part, "distributed_available_fn", _never)  # noqa: B010  # its parts may be other modules
    return metric


def _never() -> bool:
    return False


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Add the metric's name to errors from torchmetrics' arguments and inputs, or from jsonargparse."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"metrics: {name}: {' '.join(str(error).split())}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """Return the line of the user's own file that raised an error; empty for a library's file."""
    own = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(LIBRARIES)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def update(built: Mapping[str, "Metric"], probability_BC: Tensor, target: Tensor) -> None:
    """Update metrics with a batch; ``target`` is ``[B]`` or ``[B, C]``."""
    for name, metric in built.items():
        with _errors(name):
            metric.update(probability_BC.float(), target.long())


def compute(built: Mapping[str, "Metric"]) -> Computed:
    """Return the results of metrics."""
    found = Computed()
    for name, metric in built.items():
        with _errors(name):
            found.add(name, metric.compute())
    return found


def evaluate_metrics(metrics: Metrics, parts: Iterable[Tensor], target: Tensor, classes: int) -> Computed:
    """Compute metrics from the probabilities ``[B, C]`` of one part of the images after the other.

    ``target`` are labels ``[N]`` or relevance ``[N, C]``, where -1 is not counted. Probabilities that are not finite
    give a NaN for each metric: torchmetrics would take them for logits.
    """
    built, start = build(metrics, classes, bool((target < 0).any())), 0
    for probability_BC in parts:
        if not bool(probability_BC.isfinite().all()):
            return Computed(dict.fromkeys(metrics, float("nan")))
        update(built, probability_BC, target[start : start + len(probability_BC)])
        start += len(probability_BC)
    return compute(built)


def check_metrics(metrics: Metrics, target: Tensor, classes: int) -> None:
    """Raise :class:`InputError` for a metric that cannot be built for a set, or rejects its labels."""
    first = target[:1]
    update(build(metrics, classes, bool((target < 0).any())), torch.full((len(first), classes), 1 / classes), first)


def describe(metrics: Metrics) -> list[Any]:
    """Return everything that typed metrics' results depend on: their settings, and each class's source file."""
    found = []
    for name, value in sorted(metrics.items()):
        cls = imported_class(value["class_path"] if isinstance(value, Mapping) else value)
        file = Path((inspect.getsourcefile(cls) if inspect.isclass(cls) else None) or "")
        found.append((name, value, sha256_of_file(file) if file.is_file() else ""))
    return found


def write_array(stem: Path, value: Any, names: Sequence[str]) -> Path:
    """Write a non-numeric result: a vector or matrix as CSV, with class names along axes of length C.

    Anything else, such as the curves of all classes, is written as JSON: nested lists.
    """
    if not isinstance(value, Tensor) or value.ndim > 2:
        path = stem.with_name(f"{stem.name}.json")
        with replacing(path) as draft:
            draft.write_text(json.dumps(_plain(value)), encoding="utf-8")
        return path
    rows: list[list[Any]] = value.reshape(len(value), -1).tolist()
    if len(value) == len(names):
        rows = [[name, *row] for name, row in zip(names, rows, strict=True)]
    if value.ndim == 2 and value.shape[1] == len(names):
        rows.insert(0, [*([""] if len(value) == len(names) else []), *names])
    path = stem.with_name(f"{stem.name}.csv")
    write_csv(path, rows)
    return path
