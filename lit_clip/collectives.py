"""Everything that talks to other ranks. Without a process group each function is the identity of one rank."""

import atexit
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave(code: int = 0) -> None:
    """End a process that has worked with other ranks: its work is done, and nothing more will happen in it.

    Not by the interpreter's own way out: gloo's threads may still hold tensors, DDP keeps those threads alive, and one
    that lets go of a tensor while the interpreter ends aborts the process (pytorch/pytorch#179291). Now and then a run
    that had ended well, or with an error in one line, had an exit code of 134. Without a process group nothing is done.

    Args:
        code: the process's exit code.
    """
    if dist.is_available() and dist.is_initialized():
        if code == 0:  # after an error the others may be anywhere
            dist.destroy_process_group()
        atexit._run_exitfuncs()  # what others wanted to happen still does
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a row is the sum of what every rank's loss says about it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        rank, world = rank_and_world()
        ctx.rows = slice(rank * len(local), (rank + 1) * len(local))
        gathered = local.new_empty(world * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # All-reduce and slice instead of reduce-scatter: every backend has it, gloo included.
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(local: Tensor) -> Tensor:
    """``[B, ...]`` on each of W ranks -> ``[W B, ...]`` in rank order, differentiable; B is the same on every rank."""
    return local if rank_and_world()[1] == 1 else _Gather.apply(local)  # pyright: ignore[reportReturnType]  # untyped apply


def gather_uneven(local: Tensor) -> Tensor:
    """``[B, ...]`` with any B (even 0) on each rank -> all rows in rank order; no gradient."""
    _, world = rank_and_world()
    if world == 1:
        return local
    sizes = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(local)], device=local.device))
    lengths = [int(size) for size in sizes]
    padded = local.new_zeros(max(lengths), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def gather_objects(local: list[Any]) -> list[Any]:
    """Each rank's list -> all of them joined in rank order (picklable items)."""
    _, world = rank_and_world()
    if world == 1:
        return local
    parts: list[list[Any] | None] = [None] * world
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part or []]


def sum_over_ranks(local: Tensor, device: torch.device) -> Tensor:
    """The element-wise sum over ranks, where ``local`` is; ``device`` is one that the backend serves."""
    if rank_and_world()[1] == 1:
        return local
    total = local.to(device)
    total = total.clone() if total is local else total
    dist.all_reduce(total)
    return total.to(local.device)
