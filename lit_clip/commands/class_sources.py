"""Sources of classes and their scores: prompts here; heads in another room, which may be removed.

``HEADS`` in :mod:`lit_clip.cli.subcommands` names what replaces the options here, which are none. Shapes: B images, W
features before the projection, D after it, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_clip.embedding.encode import Encoding
from lit_clip.embedding.image_files import ImageFile
from lit_clip.embedding.reading import check_finite
from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import from_totals, progress
from lit_clip.tools.hardware import autocast
from lit_clip.tools.images import OnError


class Scores(NamedTuple):
    """Probabilities ``[B, C]``, and whether an image shows none of the classes, bool ``[B]``."""

    probability: Tensor
    none: Tensor


class ClassSource:
    """Classes by name, typed or from folders, scored by their prompts.

    Attributes:
        names: of the source's own classes.
        saved, listed: files that are written besides the results: as named by an option, and with names of their own.
        both_kinds: whether features before the projection are needed; they are empty otherwise.
        above: ``[C]``, the probability from which an image has a class, if it may have several.
    """

    names: Sequence[str] | None = None
    saved: Sequence[Path] = ()
    listed: Sequence[Path] = ()
    both_kinds = False
    above: Tensor | None = None

    def begin(self, model: CLIP, names: Sequence[str], prompts: Sequence[str], encoding: Encoding) -> None:
        """Encode the prompts of the classes."""
        self.model, self.weights = model, prompt_weights(model, names, prompts, encoding)

    def scores(self, before: Tensor, after: Tensor) -> Scores:
        """Return scores from features before the projection ``[B, W]`` and unit features ``[B, D]``."""
        none = torch.zeros(len(after), dtype=torch.bool)
        return Scores(class_probabilities(self.model, after, self.weights), none)

    def summary(self, none: int, count: int) -> str:
        """Return a line about images that show none of the classes; empty if there is nothing to say."""
        return ""

    def report(self, files: Sequence[ImageFile]) -> None:
        """Print more about the classes after all images have been scored; ``files`` are the readable ones."""


def prompt_weights(model: CLIP, names: Sequence[str], prompts: Sequence[str], encoding: Encoding) -> Tensor:
    """Return the unit features ``[D, C]`` of the classes' prompts."""
    if len(names) == 1 and model.logit_bias is None:
        raise InputError(f"--classes {names[0]}: a single class gets 100 % of every image; name what else it may be")
    count = len(names) * len(prompts)
    with autocast(model.device, encoding.precision), progress("class prompts", count) as advance:
        weights = zero_shot_classifier(model, names, prompts, progress=from_totals(advance))
    check_finite(weights, "--classes")
    return weights


def class_probabilities(model: CLIP, features: Tensor, classifier: Tensor) -> Tensor:
    """Return the probabilities ``[B, C]`` from unit features ``[B, D]`` and a classifier ``[D, C]``.

    Softmax over the classes, as in the paper; with a ``logit_bias`` (SigLIP) a sigmoid for each class.
    """
    logits = model.logit_scale.exp() * (features @ classifier)
    return logits.softmax(dim=1) if model.logit_bias is None else (logits + model.logit_bias).sigmoid()


class ClassOptions:
    """Options of classes that have more than names; none here."""

    flat = True  # options are typed without its name

    @property
    def path(self) -> str:
        return ""  # the file of a head

    def source(
        self, classes: Sequence[str] | None, prompts: Sequence[str], on_error: OnError, group: str = ""
    ) -> ClassSource:
        """Return the source of the classes, or of one group's classes; ``classes`` and ``prompts`` are as typed."""
        return ClassSource()

    def opened(self) -> Any:
        """Return the head in the file, a :class:`lit_clip.heads.Head`; None if no file is named."""
        return None


NAMES_ALONE = ClassOptions()
