"""A set under evaluation, with the features of its images and texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation.caption_choice import EncodedChoices
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.document_retrieval import EncodedDocuments
from lit_clip.evaluation.other_classes import Classes
from lit_clip.evaluation.places import PlaceRecords, PlaceTask, PlaceTexts
from lit_clip.evaluation.prompts import Prompts, templates_of
from lit_clip.evaluation.store import SetFeatures
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.models.clip import CLIP
from lit_clip.retrieval.metrics import PairIndices

T = TypeVar("T")
EncodeTexts = Callable[[Prompts], Tensor]  # -> their classifier [D, C]; all ranks call it in the same order


class Encoder(NamedTuple):
    """Functions that encode a set for its tasks; all ranks call them in the same order. Titles are for messages.

    ``records`` takes a set, its task, what identifies the texts, and a title; only the first rank needs the result.
    """

    features: Callable[[ImageSet, str], SetFeatures]
    classifier: EncodeTexts
    records: Callable[[ImageSet, PlaceTask, str, str], PlaceRecords | None]


@dataclass
class Fold:
    """One division of a set into splits; images and features are by split name."""

    images: dict[str, ImageSet]
    features: dict[str, SetFeatures] = field(default_factory=dict)
    classes: Classes | None = None  # of a probe that is trained on another set, see other_classes
    trained_on: str = ""  # the same for the same images and labels that probes are trained on


class DistinctCaptions(NamedTuple):
    """Unit features ``[T, D]`` of a retrieval set's distinct captions, and their images."""

    features: Tensor
    pairs: PairIndices


@dataclass
class OpenSet:
    """A set with its features. Texts and their features are None or empty if no task needs them."""

    name: str
    entry: SuiteEntry
    folds: list[Fold]
    tasks: list[Task] = field(default_factory=list)  # those to run, which the splits on disk allow
    scale: float = 100.0  # the model's inverse temperature
    logit_bias: float | None = None  # a SigLIP's, whose classes have probabilities of their own
    texts: dict[Task, object] = field(default_factory=dict)  # what identifies the texts of each task
    probes: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # of this run; several sets may be tested on one
    prompts: Prompts | None = None
    classifier: Tensor | None = None  # zero-shot, [D, C]
    captions: DistinctCaptions | None = None
    choices: EncodedChoices | None = None
    documents: EncodedDocuments | None = None
    bias: dict[str, Tensor] = field(default_factory=dict)  # classifiers by bias probe
    places: PlaceTexts | None = None
    records: dict[Task, PlaceRecords] = field(default_factory=dict)  # of tasks that compare places

    @property
    def test(self) -> ImageSet:
        """The test images of the first fold."""
        return self.folds[0].images["test"]

    def test_of(self, kind: type[T], needed: str) -> T:
        """Return the test images; raise :class:`InputError` if they are of another kind and lack what is needed."""
        if not isinstance(self.test, kind):
            raise InputError(f"{type(self.test).__name__} has no {needed}")
        return self.test

    @property
    def rows(self) -> Sequence[int]:
        """The test images that have features; all while the set is not encoded."""
        features = self.folds[0].features
        return features["test"].rows if features else range(len(self.test))

    @property
    def caption_template(self) -> str:
        """The first template, of captions, queries and documents; without one, the text itself."""
        return templates_of(self.entry.templates or "{}")[0]


def scale_and_bias(model: CLIP) -> dict[str, Any]:
    """Return the :class:`OpenSet` settings that turn a model's cosines into logits."""
    bias = None if model.logit_bias is None else float(model.logit_bias.detach())
    return {"scale": float(model.logit_scale.detach().exp()), "logit_bias": bias}
