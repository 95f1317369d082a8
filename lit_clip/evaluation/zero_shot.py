"""Build zero-shot classifiers from class names and prompt templates; accuracy is computed in targets.py."""

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import LabelledImages
from lit_clip.models.clip import CLIP
from lit_clip.tools.own_files import installed_file
from lit_clip.tools.untrusted import shortened

IMAGENET = "imagenet"


@lru_cache(maxsize=1)
def _imagenet() -> tuple[list[str], list[str]]:
    """Load the paper's 1,000 class names and 80 templates from a file in ``open-clip-torch``.

    Only that file is executed, because importing the package takes seconds.
    """
    metadata = runpy.run_path(str(installed_file("open_clip", "open-clip-torch", "zero_shot_metadata.py")))
    templates = [template("{}") for template in metadata["OPENAI_IMAGENET_TEMPLATES"]]
    return list(metadata["IMAGENET_CLASSNAMES"]), templates


def imagenet_class_names() -> list[str]:
    """Return the paper's 1,000 ImageNet class names in label order (998 distinct, so never use them as dict keys)."""
    return list(_imagenet()[0])


def imagenet_templates() -> list[str]:
    """Return the paper's 80 prompt templates for ImageNet."""
    return list(_imagenet()[1])


def check_templates(templates: Any, where: str = "templates") -> None:
    """Raise :class:`InputError` unless there is a template and each is a text with ``{}`` for the class name."""
    if isinstance(templates, str) or not isinstance(templates, Sequence):
        kind = "one string" if isinstance(templates, str) else "no list"
        raise InputError(f"{where}: {shortened(templates)} is {kind}; give a list of templates")
    if not templates:
        raise InputError(f"{where}: empty; give at least one, such as 'a photo of a {{}}.'")
    for template in templates:
        if not isinstance(template, str):
            raise InputError(f"{where}: {shortened(template)} is not a text; put it in quotes")
        if "{}" not in template:
            raise InputError(
                f"{where}: {shortened(template)} has no {{}} for the class name; all classes would have the same prompt"
            )


@dataclass
class ZeroShotSet:
    """Images with classes, and the prompt templates to classify them with.

    Attributes:
        images: images with classes and class names.
        templates: texts with ``{}`` for the class name, averaged in embedding space; ``imagenet`` for the paper's 80.
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
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 512,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Build the paper's prompt ensemble in embedding space (section 3.1.4): ``[D, C]``, with unit columns.

    ``image_features @ classifier`` are then the cosine similarities.

    Args:
        model: a :class:`lit_clip.CLIP`, or anything with ``tokenizer`` and ``encode_text``.
        class_names: names of C classes.
        templates: texts with ``{}`` for the class name.
        batch_size: prompts encoded at once.
        progress: called after each batch with the number of prompts encoded.
    """
    check_templates(templates)
    require(not isinstance(class_names, str), f"class_names: {class_names!r} is one string; give a list of names")
    if not class_names:
        raise InputError("class_names: empty; give at least one")
    tokens = model.tokenizer([template.replace("{}", name) for name in class_names for template in templates])
    return ensemble(model, tokens, [len(templates)] * len(class_names), batch_size, progress)


@torch.no_grad()
def ensemble(
    model: CLIP,
    tokens: Tensor,
    counts: Sequence[int],
    batch_size: int = 512,
    progress: Callable[[int], None] | None = None,
    ranks: bool = False,
) -> Tensor:
    """Return the normalised mean of each class's unit prompt features, float32 ``[D, C]`` on the model's device.

    Prompts, int64 ``[P, L]`` in the order of the classes with one or more of ``counts`` each, are sorted by length, so
    batches have little padding. With ``ranks`` all ranks call this and share the batches; sums are float64, so the
    result does not depend on their number. For the other arguments see :func:`zero_shot_classifier`.
    """
    tokenizer = model.tokenizer
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # [P]
    # Batches mix lengths: on a CPU, the smaller batches of a single length would cost more than they save in padding.
    batches = tokenizer.lengths(tokens).argsort(stable=True).split(batch_size)
    rank, world = distributed.rank_and_world() if ranks else (0, 1)

    def encode(rows: Tensor) -> Tensor:
        return model.encode_text(tokenizer.trim(tokens[rows]).to(model.device), normalize=True).cpu().double()

    # A rank without a batch needs D, too.
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
