"""A set under evaluation, with the features of its images and texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.caption_choice import EncodedChoices
from lit_clip.evaluation.data import ImageSet, LabelledImages, check_classes
from lit_clip.evaluation.document_retrieval import EncodedDocuments
from lit_clip.evaluation.places import PlaceTask, PlaceTexts
from lit_clip.evaluation.probe import Classes
from lit_clip.evaluation.prompts import Prompts, prompts_of, templates_of
from lit_clip.evaluation.set_encoding import SetFeatures, SetValues
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.models.clip import CLIP
from lit_clip.retrieval.metrics import PairIndices

T = TypeVar("T")
EncodeTexts = Callable[[Prompts], Tensor]  # -> their classifier [D, C]; all ranks call it in the same order


class Encoder(NamedTuple):
    """Functions that encode a set for its tasks; all ranks call them in the same order. Titles are for messages.

    ``records`` takes a set, its task, what identifies the texts, and a title.
    """

    features: Callable[[ImageSet, str], SetFeatures]
    classifier: EncodeTexts
    records: Callable[[ImageSet, PlaceTask, str, str], SetValues]


@dataclass
class Fold:
    """One division of a set into splits; images and features are by split name."""

    images: dict[str, ImageSet]
    features: dict[str, SetFeatures] = field(default_factory=dict)
    classes: Classes | None = None  # of a probe that is trained on another set
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
    records: dict[Task, SetValues] = field(default_factory=dict)  # of tasks that compare places

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


def trained_classes(entry: SuiteEntry, splits: Mapping[str, ImageSet]) -> Classes | None:
    """Check a fold's classes; return the ``train`` classes for each ``test`` class, or None if both are of one set."""
    others = {name: images for name, images in splits.items() if name != "test" and entry.is_of_another_set(name)}
    if not others:
        check_classes(splits)
        return None
    train = others.get("train")
    require("train" in others and len(others) == len(splits) - 1, "splits: train and val must be of the same set")
    check_classes({"test": others["train"], **{name: images for name, images in others.items() if name != "train"}})
    test = splits["test"]
    for images in (train, test):
        require(isinstance(images, LabelledImages), f"{type(images).__name__} has no classes, which a probe needs")
    assert isinstance(train, LabelledImages)
    assert isinstance(test, LabelledImages)
    named = all(name.isdecimal() for name in test.class_names) and entry.class_names is not None
    names = prompts_of(entry.class_names, "{}", test.class_names).names if named else test.class_names
    return _matched(test, names, train)


def _matched(test: LabelledImages, names: Sequence[str], train: LabelledImages) -> Classes:
    """Match classes by name; if a set has only numbers, ``names`` come from the suite."""
    if names == train.class_names:
        return [[label] for label in range(len(train.class_names))]
    if test.in_imagenet and train.class_names == imagenet_class_names():
        return test.in_imagenet()
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(train.class_names):
        labels.setdefault(name, []).append(label)
    unknown = [name for name in names if name not in labels]
    if unknown:
        raise InputError(
            f"splits: train has no class {unknown[0]!r}, which test has ({len(unknown)} of {len(names)} classes are "
            "not there); train on a set with the same names"
        )
    return [labels[name] for name in names]
