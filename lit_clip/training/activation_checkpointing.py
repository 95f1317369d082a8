"""Activations that are computed again in the backward pass instead of being kept."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as torch_checkpoint

Result = TypeVar("Result")


class StatisticsKept(AbstractContextManager[None]):
    """While it is entered, the running statistics of a module's BatchNorms stay as they are.

    A layer still normalises with its batch and saves for backward what it always saves: checkpointing compares the
    two. Can be entered again and again, and within itself.
    """

    def __init__(self, norms: list[_BatchNorm]) -> None:
        self.norms = norms
        self._kept: list[list[tuple[float | None, Tensor | None]]] = []

    def __enter__(self) -> None:
        self._kept.append([(norm.momentum, norm.num_batches_tracked) for norm in self.norms])
        for norm in self.norms:
            norm.momentum = 0.0  # exact: running * (1 - 0) + batch * 0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()  # counts, and is thrown away

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, batches) in zip(self.norms, self._kept.pop(), strict=True):
            norm.momentum = momentum  # pyright: ignore[reportAttributeAccessIssue]  # None is the cumulative average
            norm.num_batches_tracked = batches


def checkpoint(function: Callable[..., Result], *args: Any, inside: nn.Module, **kwargs: Any) -> Result:
    """``function(*args, **kwargs)`` without keeping what its backward pass needs: that is computed again.

    Exact: the random numbers (dropout) and autocast's state are those of the first time, and BatchNorm's running
    statistics move once. May be nested. Without gradients this is a plain call.

    Args:
        function: what to call.
        args: its inputs; they are kept.
        inside: the module that the function runs, whose BatchNorms are meant.
        kwargs: as ``args``.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    norms = [module for module in inside.modules() if isinstance(module, _BatchNorm)]
    if not norms:  # torch.compile takes no contexts
        return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)  # pyright: ignore[reportReturnType]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), StatisticsKept(norms)

    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)  # pyright: ignore[reportReturnType]


def _forward(block: nn.Module, forward: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    if not block.training:  # frozen blocks are in evaluation mode, and keep nothing anyway
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, inside=block, **kwargs)


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Let modules compute their activations again, from now on and wherever gradients are asked for in training.

    Names in the state dict stay, and a deep copy is checkpointed too.
    """
    for block in blocks:
        block.forward = functools.partial(_forward, block, block.forward)
