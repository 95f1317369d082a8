"""Activation checkpointing: compute activations again in the backward pass instead of keeping them."""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from lit_clip.models.layers import TOWERS, tower_blocks

Result = TypeVar("Result")


class FrozenStatistics(AbstractContextManager[None]):
    """Context that keeps the running statistics of BatchNorm layers unchanged.

    A layer still normalises with its batch and saves the same tensors for backward, which checkpointing compares. The
    context can be entered repeatedly and within itself.
    """

    def __init__(self, norms: list[_BatchNorm]) -> None:
        self.norms = norms
        self._kept: list[list[tuple[float | None, Tensor | None]]] = []

    def __enter__(self) -> None:
        self._kept.append([(norm.momentum, norm.num_batches_tracked) for norm in self.norms])
        for norm in self.norms:
            norm.momentum = 0.0  # exact: running * (1 - 0) + batch * 0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()  # counts up, and is discarded

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, batches) in zip(self.norms, self._kept.pop(), strict=True):
            norm.momentum = momentum  # pyright: ignore[reportAttributeAccessIssue]  # None is the cumulative average
            norm.num_batches_tracked = batches


def checkpoint(function: Callable[..., Result], *args: Any, inside: nn.Module, **kwargs: Any) -> Result:
    """Call ``function(*args, **kwargs)`` and compute its activations again in the backward pass.

    Exact: random numbers (dropout) and autocast's state are those of the first call, and the running statistics of the
    BatchNorm layers ``inside`` a module are updated once. Can be nested. Without gradients this is a plain call.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    norms = [module for module in inside.modules() if isinstance(module, _BatchNorm)]
    # torch.compile supports no context_fn
    options = {"context_fn": lambda: (nullcontext(), FrozenStatistics(norms))} if norms else {}
    return torch_checkpoint(function, *args, use_reentrant=False, **options, **kwargs)  # pyright: ignore[reportReturnType]


def _forward(block: nn.Module, forward: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    if not block.training:  # frozen blocks are in evaluation mode and keep nothing anyway
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, inside=block, **kwargs)


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Make modules compute their activations again whenever training needs gradients.

    State-dict names do not change, deep copies stay checkpointed, and applying it twice has no effect.
    """
    for block in blocks:
        if not is_checkpointed(block):
            block.forward = functools.partial(_forward, block, block.forward)


def is_checkpointed(block: nn.Module) -> bool:
    """Return whether :func:`checkpoint_blocks` was applied to a module."""
    return isinstance(block.forward, functools.partial) and block.forward.func is _forward


def checkpoint_encoders(model: Any, share: float = 1.0) -> None:
    """Apply :func:`checkpoint_blocks` to a share of each encoder's blocks, starting with the first."""
    for tower in TOWERS:
        blocks = tower_blocks(model, tower)
        checkpoint_blocks(blocks[: math.ceil(share * len(blocks) - 1e-9)])  # 0.28 of 25 are 7
