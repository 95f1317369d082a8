"""Which pairs of a batch say the same: numbers that equal images, captions and groups share on every rank."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.tools.hashing import stable_hash


@lru_cache(maxsize=16)
def _multipliers(length: int, device: torch.device) -> Tensor:
    """Odd random numbers, int64 ``[length]``; the first ones are the same for every length."""
    generator = torch.Generator().manual_seed(20210301)  # any constant: ranks must agree
    numbers = [torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator) | 1 for _ in range(length)]
    return torch.cat(numbers).to(device)


def token_hash(tokens: Tensor, pad_id: int) -> Tensor:
    """int64 ``[B, L]`` -> int64 ``[B]`` that texts share if they are equal, however far each is padded.

    The sum of each token times an odd random number of its position, modulo 2^64: two different texts share theirs with
    a probability below 1e-13.
    """
    return ((tokens - pad_id) * _multipliers(tokens.shape[1], tokens.device)).sum(dim=1)


def pair_ids(keys: Sequence[str], tokens: Tensor, pad_id: int, groups: Sequence[str] = ()) -> Tensor:
    """int64 ``[B, 3]``: numbers of each pair's image, caption and group; pairs that agree in any say the same.

    Args:
        keys: of the images.
        tokens: int64 ``[B, L]``, of the captions.
        pad_id: what they are padded with.
        groups: of each pair, empty for none; empty if there are no groups. A pair without a group is alone with its
            image.

    Raises:
        InputError: groups for some of the pairs only.
    """
    require(len(groups) in (0, len(keys)), f"batch.groups: {len(groups)} groups for {len(keys)} pairs")
    image = [stable_hash(f"image {key}") for key in keys]
    group = [stable_hash(f"group {name}") if name else number for name, number in zip(groups, image, strict=False)]
    host = torch.tensor([image, group or image], dtype=torch.long).to(tokens.device, non_blocking=True)
    return torch.stack([host[0], token_hash(tokens, pad_id), host[1]], dim=1)
