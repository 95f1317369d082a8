"""Fingerprints of weights."""

import hashlib

import torch

from lit_clip.models.clip import CLIP
from lit_clip.models.config import described


def weights_sha256(model: CLIP) -> str:
    """SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(model: CLIP) -> str:
    """SHA-256 of a model's weights and of what is done with them: models with the same one give the same features."""
    settings = (weights_sha256(model), sorted(described(model.config).items()))
    return hashlib.sha256(repr(settings).encode()).hexdigest()
