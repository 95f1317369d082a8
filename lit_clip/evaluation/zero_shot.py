"""Recognising classes from their names: the classifier that a text encoder makes of names and templates."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import LabelledImages
from lit_clip.models.tokenizer import TextTokenizer

IMAGENET = "imagenet"


class TextEncoder(Protocol):
    """What :func:`zero_shot_classifier` needs of a model."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """Texts -> int64 ``[N, L]``."""
        ...

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """int64 ``[N, L]`` -> ``[N, D]``."""
        ...


@lru_cache(maxsize=1)
def _imagenet() -> tuple[list[str], list[str]]:
    """The paper's 1,000 names and 80 templates, from the file in ``open-clip-torch`` that holds them.

    The file is run by itself: importing the package that it lies in takes seconds.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise InputError("ImageNet's class names and templates come with open-clip-torch, which is not installed")
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    assert spec is not None
    assert spec.loader is not None
    metadata: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metadata)
    templates = [template("{}") for template in metadata.OPENAI_IMAGENET_TEMPLATES]
    return list(metadata.IMAGENET_CLASSNAMES), templates


def imagenet_class_names() -> list[str]:
    """The paper's 1,000 ImageNet class names in label order (998 distinct: never key a dict by them)."""
    return list(_imagenet()[0])


def imagenet_templates() -> list[str]:
    """The paper's 80 prompt templates for ImageNet."""
    return list(_imagenet()[1])


def check_templates(templates: Sequence[str]) -> None:
    """Raise :class:`InputError` unless there is a template and each has a place for the class name."""
    require(not isinstance(templates, str), f"templates: {templates!r} is one string; give a list of templates")
    if not templates:
        raise InputError("templates: empty; give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"templates: {template!r} has no {{}} for the class name; every class would look alike")


@dataclass
class ZeroShotSet:
    """One set to be recognised from names.

    Attributes:
        images: images with classes and their names.
        templates: texts with ``{}`` for the name, averaged in embedding space; ``imagenet``: the paper's 80.
    """

    images: LabelledImages
    templates: list[str] | Literal["imagenet"] = field(default_factory=lambda: ["a photo of a {}."])

    def __post_init__(self) -> None:
        if self.templates == "imagenet":
            self.templates = imagenet_templates()
        check_templates(self.templates)
        if not len(self.images):
            raise InputError("zero-shot images: the set is empty")
        self.images.check()
        classes, highest = len(self.images.class_names), max(self.images.labels())
        if highest >= classes:
            raise InputError(f"zero-shot class_names: {classes} names, but an image has label {highest}")


def zero_shot_classifier(
    model: TextEncoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 512,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The paper's prompt ensemble in embedding space (section 3.1.4), see :func:`ensemble`.

    Args:
        model: a :class:`lit_clip.CLIP`, or anything with ``tokenizer`` and ``encode_text``.
        class_names: C names.
        templates: texts with ``{}`` for the name.
        batch_size: prompts encoded at once.
        progress: called with the number of prompts done after each batch.

    Returns:
        ``[D, C]``, unit columns; ``image_features @ classifier`` are the cosine similarities.

    Raises:
        InputError: no class, no template, or a template without ``{}``.
    """
    check_templates(templates)
    require(not isinstance(class_names, str), f"class_names: {class_names!r} is one string; give a list of names")
    if not class_names:
        raise InputError("class_names: empty; there is nothing to tell apart")
    tokens = model.tokenizer([template.replace("{}", name) for name in class_names for template in templates])
    return ensemble(model, tokens, [len(templates)] * len(class_names), batch_size, progress)


@torch.no_grad()
def ensemble(
    model: TextEncoder,
    tokens: Tensor,
    counts: Sequence[int],
    batch_size: int = 512,
    progress: Callable[[int], None] | None = None,
    ranks: bool = False,
) -> Tensor:
    """Each class as the mean of its prompts' unit features, brought to unit length again.

    Prompts are sorted by length, so that a batch has hardly any padding. Batches are dealt to the ranks, and sums are
    float64: the result does not depend on how many ranks there are.

    Args:
        model: whose features.
        tokens: int64 ``[P, L]``, the prompts of the first class, of the second, ...
        counts: the number of prompts of each of C classes, at least one.
        batch_size: prompts encoded at once.
        progress: called with the number of prompts that this process has done after each batch.
        ranks: whether all ranks ask, and so divide the work.

    Returns:
        float32 ``[D, C]`` on the model's device.
    """
    tokenizer = model.tokenizer
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # [P]
    # Not one length a batch: on a CPU small batches are slower by more than the padding that they save.
    batches = tokenizer.lengths(tokens).argsort(stable=True).split(batch_size)
    rank, world = distributed.rank_and_world() if ranks else (0, 1)

    def encode(rows: Tensor) -> Tensor:
        return model.encode_text(tokenizer.trim(tokens[rows]).to(model.device), normalize=True).cpu().double()

    # A rank without a batch has to know D, too.
    first = encode(batches[rank]) if rank < len(batches) else encode(batches[0][:1])[:0]  # [b, D]
    sums, done = first.new_zeros(len(counts), first.shape[1]), 0
    for number, rows in enumerate(batches[rank::world]):
        sums.index_add_(0, classes[rows], encode(rows) if number else first)
        done += len(rows)
        if progress:
            progress(done)
    if ranks:
        sums = distributed.sum_over_ranks(sums, model.device)
    return torch.nn.functional.normalize(sums, dim=1).float().T.to(model.device)


def classification_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """What a batch adds to a set's accuracy, so that batches and ranks can simply be summed.

    Args:
        logits: ``[B, C]``.
        labels: int64 ``[B]``.

    Returns:
        float64 ``[3, C]``: for each class its images, those whose first prediction is right, those with it among five.
    """
    B, C = logits.shape
    predictions = logits.topk(min(5, C), dim=1).indices  # [B, 5]
    right = predictions == labels[:, None]
    counts = torch.zeros(3, C, dtype=torch.float64)
    for row, weight in enumerate((torch.ones(B), right[:, 0], right.any(dim=1))):
        counts[row].index_add_(0, labels.cpu(), weight.cpu().double())
    return counts


def accuracies(counts: Tensor) -> dict[str, float]:
    """Summed :func:`classification_counts` -> ``top1``, ``top5`` (with more than 5 classes) and ``mean_per_class``.

    The mean is over classes that have images. All are fractions.
    """
    images, top1, top5 = counts
    present = images > 0
    result = {"top1": float(top1.sum() / images.sum())}
    if counts.shape[1] > 5:
        result["top5"] = float(top5.sum() / images.sum())
    result["mean_per_class"] = float((top1[present] / images[present]).mean())
    return result


def baseline_accuracies(counts: Tensor) -> dict[str, float]:
    """What :func:`accuracies` are without looking: always naming the most common classes."""
    shares = (counts[0] / counts[0].sum()).sort(descending=True).values
    result = {"top1": float(shares[0])}
    if counts.shape[1] > 5:
        result["top5"] = float(shares[:5].sum())
    result["mean_per_class"] = 1 / int((counts[0] > 0).sum())
    return result
