"""A set under evaluation, with the features of its images and texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.bias import bias_texts
from lit_clip.evaluation.caption_choice import EncodedChoices, encode_choices
from lit_clip.evaluation.data import CaptionChoices, CaptionedImages, ImageSet, LabelledImages, Localised, Masked
from lit_clip.evaluation.document_retrieval import EncodedDocuments, encode_documents
from lit_clip.evaluation.other_classes import Classes
from lit_clip.evaluation.places import PlaceRecords, PlaceTexts
from lit_clip.evaluation.prompts import Prompts, prompts_of_set, templates_of
from lit_clip.evaluation.results import cache_key
from lit_clip.evaluation.store import SetFeatures
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.models.clip import CLIP
from lit_clip.retrieval.metrics import PairIndices

Rows = Callable[[], Sequence[int]]  # -> the test images that have features
EncodeTexts = Callable[[Prompts], Tensor]  # -> their classifier [D, C]; all ranks call it in the same order


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


def scale_and_bias(model: CLIP) -> dict[str, Any]:
    """Return the :class:`OpenSet` settings that turn a model's cosines into logits."""
    bias = None if model.logit_bias is None else float(model.logit_bias.detach())
    return {"scale": float(model.logit_scale.detach().exp()), "logit_bias": bias}


def without_features(opened: OpenSet) -> SetFeatures | None:
    """Return the rows of a set with only place tasks, which need no features of whole images."""
    if opened.records.keys() != set(opened.tasks):
        return None
    _, rows, skipped = next(iter(opened.records.values()))
    return SetFeatures(np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.float32), rows, skipped)


def class_names_only(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> object:
    """Name a set's classes, and encode nothing."""
    prompts = class_prompts(opened)
    return prompts.names, prompts.sha256, opened.logit_bias


def class_texts(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> object:
    """Encode the prompts of a set's classes; see :attr:`lit_clip.evaluation.tasks.TaskParts.texts`."""
    opened.classifier = encode(class_prompts(opened))
    return class_names_only(opened, rows, encode)


def class_prompts(opened: OpenSet) -> Prompts:
    """Return the prompts of a set's classes, and store them in the set."""
    test = opened.folds[0].images["test"]
    if not isinstance(test, LabelledImages):
        raise InputError(f"{type(test).__name__} has no classes, which zero-shot needs")
    opened.prompts = opened.prompts or prompts_of_set(opened.entry, test)
    return opened.prompts


def head_texts(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> object:
    """Encode the prompts of a set's classes, if it has any; few-shot heads start from them."""
    labelled = isinstance(opened.folds[0].images["test"], LabelledImages)
    return class_texts(opened, rows, encode) if labelled else None


def bias_probe_texts(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> None:
    """Encode the classes of the bias probes."""
    for probe, texts in bias_texts().items():
        opened.bias[probe] = encode(Prompts(list(texts), [[text] for text in texts.values()]))


def caption_texts(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> object:
    """Encode each distinct caption of a retrieval set once."""
    test = opened.folds[0].images["test"]
    if not isinstance(test, CaptionedImages):
        raise InputError(f"{type(test).__name__} has no captions, which retrieval needs")
    prompts, pairs = _distinct_captions(test, rows(), opened.entry.templates)
    opened.captions = DistinctCaptions(encode(prompts).T.contiguous(), pairs)
    return cache_key(prompts.sha256, [column.tolist() for column in pairs])


def choice_texts(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> object:
    """Encode each distinct caption of a set's questions once."""
    test = opened.folds[0].images["test"]
    if not isinstance(test, CaptionChoices):
        raise InputError(f"{type(test).__name__} has no questions, which caption_choice needs")
    opened.choices = encode_choices(test, rows(), opened.entry.templates, encode)
    return cache_key(opened.choices.choices, templates_of(opened.entry.templates or "{}")[0])


def document_texts(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> object:
    """Encode each distinct text of a set's queries and documents once."""
    opened.documents = encode_documents(opened.folds[0].images["test"], opened.entry.templates, encode)
    images = opened.documents.images
    template = templates_of(opened.entry.templates or "{}")[0]
    return cache_key(images.queries, images.documents, images.relevance, template)


def place_texts(kind: type[Localised], opened: OpenSet, rows: Rows, encode: EncodeTexts) -> object:
    """Encode each name of a set's classes separately; the set must be of the given kind."""
    test = opened.folds[0].images["test"]
    if not isinstance(test, kind):
        needed = "masks" if kind is Masked else "boxes or masks"
        raise InputError(f"{type(test).__name__} has no {needed}, which {', '.join(opened.tasks)} needs")
    require(len(opened.folds) == 1, "folds: masks and boxes have no mean over folds; make a set of each")
    opened.prompts = opened.prompts or prompts_of_set(opened.entry, test)
    by_name, classes = opened.prompts.by_name()
    opened.places = PlaceTexts(encode(by_name), torch.tensor(classes))
    return opened.prompts.names, opened.prompts.texts, opened.prompts.alternatives, test.truth_stamp()


def _distinct_captions(
    images: CaptionedImages, rows: Sequence[int], templates: str | Sequence[str] | None
) -> tuple[Prompts, PairIndices]:
    """Return a set's distinct captions as prompts, and the image (place in ``rows``) of each.

    Of several templates the first is used; None: the caption itself.
    """
    template = templates_of(templates or "{}")[0]
    numbers: dict[str, int] = {}
    counts: dict[tuple[int, int], int] = {}
    earlier: dict[tuple[int, int], int] = {}
    rows_of_text: list[int] = []
    for image, row in enumerate(rows):
        for caption in images.captions(row):
            text = numbers.setdefault(template.replace("{}", caption), len(numbers))
            if text == len(rows_of_text):
                rows_of_text.append(0)
            earlier.setdefault((text, image), rows_of_text[text])
            rows_of_text[text] += 1
            counts[text, image] = counts.get((text, image), 0) + 1
    columns = [(image, text, count, earlier[text, image]) for (text, image), count in sorted(counts.items())]
    return Prompts(list(numbers), [[text] for text in numbers]), PairIndices(*torch.tensor(columns).T.contiguous())
