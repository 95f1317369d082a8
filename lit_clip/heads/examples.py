"""Fit a head on examples: compute features once, fit, calibrate, and choose thresholds.

Shapes: N examples, W features before the projection, D after it, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_head import HeadFit, fit_head
from lit_clip.evaluation.logistic import Advance
from lit_clip.evaluation.thresholds import ClassThreshold, fit_thresholds, none_threshold
from lit_clip.evaluation.zero_shot import zero_shot_classifier
from lit_clip.heads.head import Head, HeadFacts
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.tools.images import image_for_model
from lit_clip.weights.fingerprint import fingerprint

TEMPLATES = ("a photo of a {}.",)


@dataclass
class Examples:
    """Features of examples, before the projection ``[N, W]`` and after it ``[N, D]`` (unit length), and their classes.

    ``labels`` is int64 ``[N]``, or relevance, int8 ``[N, C]``, if images may have several classes.
    """

    before: Tensor
    after: Tensor
    labels: Tensor

    @classmethod
    def of(cls, both: Tensor, embed_dim: int, labels: Tensor) -> Self:
        """Split features of :func:`lit_clip.embedding.reading.features_of_both_kinds`."""
        return cls(both[:, :-embed_dim], both[:, -embed_dim:], labels)

    def take(self, rows: Tensor) -> "Examples":
        """Return some of the rows."""
        return Examples(self.before[rows], self.after[rows], self.labels[rows])


class FittedHead(NamedTuple):
    """A head, the details of its fit, and its errors by class if images may have several classes."""

    head: Head
    fit: HeadFit
    thresholds: list[ClassThreshold]
    none_left_out: str  # why there is no threshold for "none of these"


def fit_on(
    model: CLIP,
    names: Sequence[str],
    templates: Sequence[str],
    text: Tensor,
    examples: Examples,
    none_error: float = 0.05,
    advance: Advance | None = None,
) -> FittedHead:
    """Fit a head for a model; ``text`` has the unit features ``[D, C]`` of the class names."""
    scale, text = float(model.logit_scale.detach().exp()), text.detach().cpu()
    found = fit_head(examples.before, scale * (examples.after @ text), examples.labels, advance=advance)
    held_out = found.sharpness * found.held_out
    several = examples.labels.ndim == 2
    thresholds, none, problem = list[ClassThreshold](), None, ""
    limits = torch.full((len(names),), 0.5)
    seen = held_out.isfinite().all(dim=1)
    if several:
        thresholds = fit_thresholds(held_out[seen].sigmoid(), examples.labels[seen])
        fitted = torch.tensor([each.threshold for each in thresholds])
        limits = torch.where(fitted.isfinite(), fitted, limits)  # a class without examples is its name alone
    else:
        try:
            none = none_threshold(held_out[seen].amax(dim=1) if bool(seen.any()) else held_out[seen][:, 0], none_error)
        except InputError as error:
            problem = str(error)
    facts = HeadFacts(
        model=fingerprint(model).model,
        names=list(names),
        templates=list(templates),
        several=several,
        none=none,
        none_error=none_error,
        examples=len(examples.labels),
    )
    sharp = found.sharpness
    weight, bias = sharp * found.fit.weight, sharp * (found.fit.bias + found.shift)
    return FittedHead(Head(facts, sharp * found.scale * scale * text, weight, bias, limits), found, thresholds, problem)


def head_from_images(
    model: CLIP,
    images: Sequence[str | Path | Image.Image],
    labels: Sequence[int],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    none_error: float = 0.05,
) -> Head:
    """Fit a head on images or image files with one class each.

    Args:
        model: whose features are used; it is left as it is.
        images: N of them.
        labels: number of each image's class in ``names``.
        names: of the classes; one without an example is recognised by its name alone.
        templates: prompt templates with {} for the name.
        none_error: share of new images of the classes that may be called none of these.
    """
    require(len(images) == len(labels) > 0, f"labels: there are {len(labels)}, for {len(images)} images")
    before, after = list[Tensor](), list[Tensor]()
    with torch.no_grad(), evaluation_mode(model):
        text = zero_shot_classifier(model, names, templates)
        for each in images:
            image = each if isinstance(each, Image.Image) else image_for_model(Path(each))
            features = model.image_features(model.preprocess(image)[None].to(model.device))
            before.append(features[0].float().cpu())
            after.append(unit(features[1].float()).cpu())
    examples = Examples(torch.cat(before), torch.cat(after), torch.tensor(labels))
    return fit_on(model, names, templates, text, examples, none_error).head
