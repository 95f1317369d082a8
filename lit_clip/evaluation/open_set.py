"""A set that is being evaluated, with its features."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_clip.evaluation.caption_choice import EncodedChoices
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.other_classes import Classes
from lit_clip.evaluation.prompts import Prompts
from lit_clip.evaluation.store import SetFeatures
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.retrieval.metrics import PairIndices


@dataclass
class Fold:
    """One division of a set into splits.

    Attributes:
        images: the images of each split.
        features: the features of each split.
        classes: for a probe that is trained on another set, see :mod:`lit_clip.evaluation.other_classes`.
        trained_on: hash of the splits that probes are trained on.
    """

    images: dict[str, ImageSet] = field(default_factory=dict)
    features: dict[str, SetFeatures] = field(default_factory=dict)
    classes: Classes | None = None
    trained_on: str = ""


@dataclass
class DistinctCaptions:
    """Distinct captions of a retrieval set.

    Attributes:
        features: ``[T, D]``, of unit length.
        pairs: which caption belongs to which image.
        digest: hash of the texts and the pairs.
    """

    features: Tensor
    pairs: PairIndices
    digest: str


@dataclass
class OpenSet:
    """A set with its features.

    Attributes:
        name: name of the set.
        entry: its entry in the suite.
        folds: its folds, at least one.
        prompts: prompts of its classes; None without zero-shot classification.
        classifier: zero-shot classifier ``[D, C]``; None without zero-shot classification.
        captions: captions of a retrieval set.
        choices: questions of a set with right and wrong captions.
        bias: classifiers of the bias probes, by probe.
        scale: the model's inverse temperature.
        tasks: those that the splits on disk allow.
        probes: all probes of this run, which several sets may be tested on.
    """

    name: str
    entry: SuiteEntry
    folds: list[Fold]
    prompts: Prompts | None = None
    classifier: Tensor | None = None
    captions: DistinctCaptions | None = None
    choices: EncodedChoices | None = None
    bias: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 100.0
    tasks: list[Task] = field(default_factory=list)
    probes: dict[tuple[Any, ...], Any] = field(default_factory=dict)
