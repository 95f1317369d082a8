"""Fingerprints of a model: SHA-256 of its weights, and of everything its features depend on.

Nothing is cached on the model, whose weights may be training: whoever evaluates fixed weights computes a
:class:`Fingerprint` once and passes it on. Hashing a gigabyte of weights takes about a second.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_clip.models.clip import CLIP
from lit_clip.models.config import described


class Fingerprint(NamedTuple):
    """SHA-256 digests of a model, in hexadecimal."""

    model: str  # of weights, sizes and preprocessing; models with the same one give the same features
    weights: str  # of the weights only
    image: str  # of everything image features depend on: the text encoder may be another one
    text: str  # of everything text features depend on


def fingerprint(model: CLIP) -> Fingerprint:
    """Compute all digests of a model; each weight is hashed once."""
    tensors = _digests(model.state_dict())
    weights = _combined(tensors)
    settings = sorted(described(model.config).items())
    whole = _combined((weights, settings))
    of_images = [each for each in settings if not each[0].startswith(("text", "logit"))]
    image = _combined((of_images, [tensor for tensor in tensors if tensor[0].startswith("visual.")]))
    return Fingerprint(whole, weights, image, _text_digest(model, tensors))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types and values of tensors."""
    return _combined(_digests(tensors))


def text_sha256(model: CLIP) -> str:
    """Return the SHA-256 of everything that text features depend on, except texts: weights, sizes, activation."""
    return _text_digest(model, _digests({name: value for name, value in model.state_dict().items() if _is_text(name)}))


def _text_digest(model: CLIP, tensors: list[tuple[str, str]]) -> str:
    config = model.config
    settings = (asdict(config.text), config.activation, config.embed_dim)
    return _combined((settings, [tensor for tensor in tensors if _is_text(tensor[0])]))


def _is_text(name: str) -> bool:
    return not name.startswith(("visual.", "logit_"))


def _digests(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    return [(name, _tensor_sha256(value)) for name, value in sorted(tensors.items())]


def _tensor_sha256(value: Tensor) -> str:
    digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
    copy = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # FSDP frees no memory of an array
    values: Any = copy.reshape(-1).view(torch.uint8).numpy()  # typed as no buffer
    digest.update(values)
    return digest.hexdigest()


def _combined(parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
