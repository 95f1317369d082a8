"""Everything that talks to other ranks. Without a process group each function is the identity of one rank."""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Shards(NamedTuple):
    """How many pairs of a global batch each rank holds, and which rank this is.

    Attributes:
        rank: this process.
        counts: pairs of each rank; their order in the global batch is that of the ranks.
    """

    rank: int
    counts: tuple[int, ...]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """Pairs of all ranks."""
        return sum(self.counts)

    @property
    def weight(self) -> float:
        """Of this rank's mean among the ranks' means, so that their plain mean is that of all pairs."""
        return self.world * self.counts[self.rank] / self.total

    def first(self, rank: int) -> int:
        """The place of a rank's first pair among all."""
        return sum(self.counts[:rank])

    @property
    def mine(self) -> slice:
        """This rank's pairs among all."""
        first = self.first(self.rank)
        return slice(first, first + self.counts[self.rank])


_host_group: Any = None  # one a process, like the default group


def host_group() -> Any:
    """A process group for values on the CPU, so that nobody waits for the device; made when first asked for.

    Every rank must ask for it at the same point.
    """
    global _host_group
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if _host_group is None:
        _host_group = dist.new_group(backend="gloo")
    return _host_group


def shards(pairs: int) -> Shards:
    """Tell the other ranks how many pairs this one has, and learn how many they have."""
    rank, world = rank_and_world()
    if world == 1:
        return Shards(0, (pairs,))
    counts = torch.zeros(world, dtype=torch.long)
    counts[rank] = pairs
    dist.all_reduce(counts, group=host_group())
    return Shards(rank, tuple(counts.tolist()))


def _all_rows(local: Tensor, shards: Shards) -> Tensor:
    """``[B, ...]`` -> ``[N, ...]`` in rank order."""
    most, even = max(shards.counts), len(set(shards.counts)) == 1
    padded = local.contiguous() if even else F.pad(local, [0, 0] * (local.ndim - 1) + [0, most - len(local)])
    gathered = padded.new_empty(shards.world * most, *local.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    if even:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(most), shards.counts, strict=True)])


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a row is the sum of what every rank's loss says about it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, shards: Shards) -> Tensor:
        ctx.mine = shards.mine
        return _all_rows(local, shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # All-reduce and slice instead of reduce-scatter: every backend has it, gloo included.
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[ctx.mine], None


def gather(local: Tensor, shards: Shards) -> Tensor:
    """``[B, ...]`` on each rank -> ``[N, ...]`` in rank order, differentiable."""
    return local if shards.world == 1 else _Gather.apply(local, shards)  # pyright: ignore[reportReturnType]  # untyped apply


Total = Literal["sum", "logsumexp"]
# Called with every rank's rows ``[N, ...]`` each and totals ``[N, ...]`` each, which it adds to in place.
Visit = Callable[[list[Tensor], list[Tensor]], None]


def visit_gathered(
    shards: Shards, rows: Sequence[Tensor], totals: Sequence[Tensor], kind: Total, visit: Visit
) -> list[Tensor]:
    """Gather every rank's rows, let ``visit`` add to their totals, and reduce the totals over ranks. No gradients.

    Args:
        shards: number of pairs of each rank.
        rows: ``[B, ...]`` each, this rank's.
        totals: ``[B, ...]`` each, the initial values: 0 for ``sum``, -inf for ``logsumexp``.
        kind: how the totals of several ranks are reduced.
        visit: called once on every rank.

    Returns:
        The totals of this rank's rows over all ranks.
    """
    if shards.world == 1:
        visit(list(rows), list(totals))
        return list(totals)
    everyones = [
        total.new_full((shards.total, *total.shape[1:]), 0 if kind == "sum" else -torch.inf) for total in totals
    ]
    visit([_all_rows(row, shards) for row in rows], everyones)
    for total in everyones:
        if kind == "sum":
            dist.all_reduce(total)
            continue
        highest = total.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        highest.clamp_(min=torch.finfo(highest.dtype).min)  # -inf less -inf is nan
        total.sub_(highest).exp_()
        dist.all_reduce(total)
        total.log_().add_(highest)
    return [total[shards.mine].clone() for total in everyones]


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
    dist.all_gather_object(parts, local, group=host_group())
    return [item for part in parts for item in part or []]


def sum_over_ranks(local: Tensor, device: torch.device) -> Tensor:
    """The element-wise sum over ranks, where ``local`` is; ``device`` is one that the backend serves."""
    if rank_and_world()[1] == 1:
        return local
    total = local.to(device)
    total = total.clone() if total is local else total
    dist.all_reduce(total)
    return total.to(local.device)


def gather_large(local: Tensor, counts: Sequence[int]) -> Tensor:
    """``[B, ...]`` on each rank -> all rows in rank order, without a second copy of them on the way; no gradient.

    Args:
        local: this rank's rows, on a device that the backend serves.
        counts: the rows of each rank.
    """
    if len(counts) == 1:
        return local
    gathered = local.new_empty(sum(counts), *local.shape[1:])
    for rank, part in enumerate(gathered.split(list(counts))):
        if rank == dist.get_rank():
            part.copy_(local)
        if len(part):
            dist.broadcast(part, rank)
    return gathered


def highest_over_ranks(local: Tensor) -> Tensor:
    """The element-wise maximum over ranks, of a tensor on a device that the backend serves."""
    if rank_and_world()[1] == 1:
        return local
    highest = local.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def share(size: int) -> slice:
    """This rank's part of ``size`` rows; over all ranks each row once."""
    rank, world = rank_and_world()
    return slice(size * rank // world, size * (rank + 1) // world)


def same_buffers(module: torch.nn.Module) -> None:
    """Give every rank the first one's buffers, such as the statistics of batch normalisation."""
    if rank_and_world()[1] > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def maximum(local: int) -> int:
    """The largest of all ranks' numbers; waits for the other ranks but not for the device."""
    if rank_and_world()[1] == 1:
        return local
    largest = torch.tensor([local])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=host_group())
    return int(largest)


LEAVE_WITHIN = 20.0  # seconds


def leave(code: int = 0) -> None:
    """End a process that has worked with other ranks: its work is done, and nothing more will happen in it.

    Not by the interpreter's own way out: gloo's threads may still hold tensors, DDP keeps those threads alive, and one
    that lets go of a tensor while the interpreter ends aborts the process (pytorch/pytorch#179291). Now and then a run
    that had ended well, or with an error in one line, had an exit code of 134. Without a process group nothing is done.

    Args:
        code: the process's exit code.
    """
    if dist.is_available() and dist.is_initialized():
        at_last = threading.Timer(LEAVE_WITHIN, os._exit, (code,))  # should another rank or a thread keep it waiting
        at_last.daemon = True
        at_last.start()
        if code == 0:  # after an error the others may be anywhere
            dist.destroy_process_group()
        atexit._run_exitfuncs()  # what others wanted to happen still does
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
