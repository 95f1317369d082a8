"""A class head, a model with one (images in, probabilities out), and the head's file.

The file is safetensors with facts as JSON. Nothing in it is executed, and every field is checked.
Shapes: B images, W features before the projection, D after it, C classes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from PIL import Image
from torch import Tensor, nn

from lit_clip.embedding.reading import check_finite
from lit_clip.errors import InputError, require
from lit_clip.evaluation.thresholds import check_names
from lit_clip.evaluation.zero_shot import check_templates
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.models.running import evaluation_mode
from lit_clip.tools.atomic import replacing
from lit_clip.tools.images import image_for_model
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import Finite, check_fields, from_plain
from lit_clip.tools.weight_files import read_file

FORMAT = "lit-clip head 1"
MOST_BYTES = 2**32
MOST_CLASSES = 2**20
LARGEST = 1e18  # of a weight: its products with features stay far below what float32 can hold
TENSORS = ("text", "weight", "bias", "thresholds")


@dataclass(frozen=True)
class HeadFacts:
    """Facts about a head: its model, its classes and its rules.

    Attributes:
        model: fingerprint of the model whose features it is fitted on.
        names: of the C classes.
        templates: prompt templates, with {} for the name.
        several: whether an image may have several classes, each with a probability of its own.
        none: score below which an image shows none of the classes; None if there were too few examples for one.
        none_error: share of new images of the classes that may be called none of these.
        examples: number of examples.
    """

    model: str
    names: list[str]
    templates: list[str]
    several: bool
    none: Finite | None
    none_error: Annotated[float, Meta(ge=0, le=1)]
    examples: Annotated[int, Meta(ge=0, le=2**53)]


class Head(nn.Module):
    """Calibrated class logits, linear in the unit features (by the names) and in features before projection.

    Args:
        facts: see there.
        text: of the names, times its scale, ``[D, C]``.
        weight: of the correction, ``[C, W]``.
        bias: ``[C]``.
        thresholds: probability from which an image has a class, ``[C]``; not used if it has one.
    """

    text: Tensor
    weight: Tensor
    bias: Tensor
    thresholds: Tensor

    def __init__(self, facts: HeadFacts, text: Tensor, weight: Tensor, bias: Tensor, thresholds: Tensor) -> None:
        super().__init__()
        check_names(facts.names, "head: names")
        self.facts = facts
        for name, value in zip(TENSORS, (text, weight, bias, thresholds), strict=True):
            self.register_buffer(name, value.detach().float().cpu().contiguous())

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Features before the projection ``[B, W]`` and unit features ``[B, D]`` -> logits ``[B, C]``."""
        return after @ self.text + before @ self.weight.T + self.bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities ``[B, C]``; they add up to 1 unless an image may have several classes."""
        return logits.sigmoid() if self.facts.several else logits.softmax(dim=1)

    def none_of(self, logits: Tensor) -> Tensor:
        """Return which images show none of the classes, bool ``[B]``."""
        if self.facts.several:
            return (logits.sigmoid() < self.thresholds.to(logits)).all(dim=1)
        return logits.amax(dim=1) < (-torch.inf if self.facts.none is None else self.facts.none)

    def check(self, model: CLIP, where: str = "head") -> None:
        """Raise :class:`InputError` unless a model is the one that the head was fitted on."""
        found = fingerprint(model).model
        if found != self.facts.model:
            raise InputError(
                f"{where}: fitted on the features of another model (SHA-256 {self.facts.model}, this one's is "
                f"{found}); give that model, or fit a head of this one with --examples"
            )
        image = torch.zeros(1, *model.preprocessing.shape, device=model.device)
        with torch.no_grad(), evaluation_mode(model):
            own = [features.shape[1] for features in model.image_features(image)]
        widths = [self.weight.shape[1], self.text.shape[0]]
        found, wanted = (f"{before} and {after}" for before, after in (widths, own))
        require(widths == own, f"{where}: is for features of width {found}, the model's have {wanted}")

    def on(self, model: CLIP) -> "HeadedModel":
        """Return a model with this head; see :meth:`lit_clip.CLIP.with_head`."""
        self.check(model)
        return HeadedModel(model, self)


class HeadedModel(nn.Module):
    """A model with a head. The head is moved to the model's device."""

    def __init__(self, model: CLIP, head: Head) -> None:
        super().__init__()
        self.model, self.head = model, head.to(model.device)

    def forward(self, images: Tensor) -> Tensor:
        """Float, normalised ``[B, 3, H, W]`` -> probabilities ``[B, C]``."""
        before, after = self.model.image_features(images)
        return self.head.probabilities(self.head(before.float(), unit(after.float())))

    @torch.no_grad()
    def classify(self, images: Sequence[str | Path | Image.Image], batch_size: int = 64) -> Tensor:
        """Return the probabilities of images and image files, float32 ``[N, C]`` on the CPU."""
        found = [image if isinstance(image, Image.Image) else image_for_model(Path(image)) for image in images]
        rows = []
        with evaluation_mode(self.model):
            for start in range(0, len(found), batch_size):
                pixels = torch.stack([self.model.preprocess(image) for image in found[start : start + batch_size]])
                rows.append(self(pixels.to(self.model.device)).cpu())
        probabilities = torch.cat(rows) if rows else torch.zeros(0, len(self.head.facts.names))
        check_finite(probabilities, "classify")
        return probabilities


def save_head(head: Head, path: str | Path) -> None:
    """Write a head to a ``.safetensors`` file."""
    from safetensors.torch import save_file

    path = Path(path)
    require(path.suffix == ".safetensors", f"{path}: a head is written to a .safetensors file")
    tensors = {name: getattr(head, name).cpu().contiguous() for name in TENSORS}
    metadata = {"format": FORMAT, "head": json.dumps(asdict(head.facts), ensure_ascii=False)}
    with replacing(path) as draft:
        save_file(tensors, draft, metadata=metadata)
        draft.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read


def load_head(path: str | Path) -> Head:
    """Read a file of :func:`save_head`."""
    from safetensors import safe_open

    path, again = Path(path), "classify --save_head writes heads"
    require(path.suffix == ".safetensors", f"{path}: a head is a .safetensors file")
    with reading(path, "head", hint=again):
        require(path.stat().st_size <= MOST_BYTES, f"{path}: larger than any head; {again}")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        require(metadata.get("format") == FORMAT, f"{path}: not a head of this version; {again}")
        values = json.loads(metadata["head"])
    tensors = {name: tensor.clone() for name, tensor in read_file(path).items()}
    with naming(path):
        return _checked(values, tensors)


def _checked(values: Any, tensors: dict[str, Tensor]) -> Head:
    facts = from_plain(HeadFacts, values, "head")
    check_fields(facts, "head")
    classes = len(facts.names)
    require(0 < classes <= MOST_CLASSES, f"head: names: {classes} classes; must be from 1 to {MOST_CLASSES:,}")
    require(all(facts.names) and len(set(facts.names)) == classes, "head: names: one is empty or there twice")
    check_templates(facts.templates, "head: templates")
    require(sorted(tensors) == sorted(TENSORS), f"tensors: there must be {', '.join(TENSORS)}")
    wanted = {"text": (None, classes), "weight": (classes, None), "bias": (classes,), "thresholds": (classes,)}
    for name, tensor in tensors.items():
        fits = len(tensor.shape) == len(wanted[name]) and all(
            size in (None, found) for size, found in zip(wanted[name], tensor.shape, strict=True)
        )
        if tensor.dtype != torch.float32 or not fits:
            raise InputError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not float32 for {classes} classes")
        whole = bool((tensor.abs() < LARGEST).all())  # not of NaN either
        require(whole, f"{name}: not finite, or so large that probabilities would overflow; fit the head anew")
    return Head(facts, *(tensors[name] for name in TENSORS))
