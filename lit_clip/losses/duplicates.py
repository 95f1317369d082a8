"""Duplicates in a batch: integer ids that equal images, captions and groups share on every rank."""

from collections.abc import Sequence
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.losses.contrastive import Duplicates
from lit_clip.tools.hardware import to_device
from lit_clip.tools.hashing import stable_hash

ROUNDED = 128  # lengths: one list serves the batches of a run, whose longest texts differ


def check_duplicates(duplicates: str) -> None:
    """Raise :class:`InputError` unless this names a way of counting duplicates."""
    known = get_args(Duplicates)
    require(duplicates in known, f"model.loss: duplicates {duplicates!r} must be one of {', '.join(known)}")


@lru_cache(maxsize=16)
def _multipliers(length: int, device: torch.device) -> Tensor:
    """Return odd random numbers, int64 ``[length]``; a longer list begins with the shorter one."""
    generator = torch.Generator().manual_seed(20210301)  # any constant will do: ranks must agree
    numbers = [torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator) | 1 for _ in range(length)]
    return to_device(torch.cat(numbers), device)


def token_hash(tokens: Tensor, pad_id: int) -> Tensor:
    """Hash int64 ``[B, L]`` to int64 ``[B]``; equal texts have equal hashes with any padding.

    The hash is the sum of each token times an odd random number for its position, modulo 2^64: two different texts
    collide with a probability below 1e-13.
    """
    length = tokens.shape[1]
    multipliers = _multipliers(-(-length // ROUNDED) * ROUNDED, tokens.device)[:length]
    return ((tokens - pad_id) * multipliers).sum(dim=1)


def pair_ids(keys: Sequence[str], tokens: Tensor, pad_id: int, groups: Sequence[str] = ()) -> Tensor:
    """Return int64 ``[B, 3]``: ids of each pair's image, caption and group; duplicates share at least one id.

    A pair without a group (an empty string; ``groups`` is empty if no pair has one) is grouped by its image.
    """
    require(len(groups) in (0, len(keys)), f"batch.groups: {len(groups)} groups for {len(keys)} pairs")
    image = [stable_hash(f"image {key}") for key in keys]
    group = [stable_hash(f"group {name}") if name else number for name, number in zip(groups, image, strict=False)]
    host = to_device(torch.tensor([image, group or image], dtype=torch.long), tokens.device)
    return torch.stack([host[0], token_hash(tokens, pad_id), host[1]], dim=1)
