"""Run a module in evaluation mode for a while, or an encoder from its middle."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, then restore each module's own mode (frozen modules stay in evaluation)."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


class PartialForward(NamedTuple):
    """Activations for starting in the middle of a text encoder."""

    x: Tensor  # float [B, L, W], the input of ``module``; padding may have any finite values
    block: int  # number of the first block to compute; all of them if there is none
    module: nn.Module  # the first module to compute
    skipped: Sequence[tuple[nn.Module, int]] = ()  # the blocks before it, and how many values each returns; 0: a tensor


@contextmanager
def starting_at(module: nn.Module, x: Tensor, skipped: Sequence[tuple[nn.Module, int]] = ()) -> Iterator[None]:
    """Inside this block, the module's first input is ``x``, and ``skipped`` blocks return their first input."""

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): x}

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(replace, with_kwargs=True).remove)
        for block, values in skipped:
            if before := vars(block).get("forward"):  # of activation checkpointing
                stack.callback(setattr, block, "forward", before)
            else:
                stack.callback(delattr, block, "forward")
            block.forward = _passing_on(values)
        yield


def _passing_on(values: int) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        return (hidden, *[None] * (values - 1)) if values else hidden

    return forward
