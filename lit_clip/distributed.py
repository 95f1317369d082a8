"""Collectives: all communication between ranks. Without a process group each function acts as a single rank."""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lit_clip.errors import InputError

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the world size."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class RankCounts(NamedTuple):
    """Number of pairs that each rank holds of a global batch, in rank order, and this process's rank."""

    rank: int
    counts: tuple[int, ...]

    @property
    def world(self) -> int:
        """World size."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """Number of pairs of all ranks."""
        return sum(self.counts)

    @property
    def weight(self) -> float:
        """Factor that makes the mean over ranks of a rank's mean equal the mean over all pairs."""
        return self.world * self.counts[self.rank] / self.total

    def first(self, rank: int) -> int:
        """Return the index of a rank's first pair among all pairs."""
        return sum(self.counts[:rank])

    @property
    def mine(self) -> slice:
        """Slice of this rank's pairs among all pairs."""
        first = self.first(self.rank)
        return slice(first, first + self.counts[self.rank])


def on_first_rank(work: Callable[[], T]) -> T | None:
    """Run ``work`` on rank 0 while the others wait, if need be for days; they raise InputError if it fails."""
    rank, world = rank_and_world()
    if world == 1:
        return work()
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    failed = torch.ones(1)
    try:
        result = work() if rank == 0 else None
        failed.zero_()
    finally:
        dist.broadcast(failed, 0, group=group)
    if rank and failed:
        raise InputError("rank 0 has failed; see its error")
    dist.destroy_process_group(group)
    return result


_host_group: Any = None  # one for each process, like the default group


def host_group() -> Any:
    """Return a process group for values on the CPU; it does not synchronise with the device.

    The group is created on the first call, which all ranks must make at the same point.
    """
    global _host_group
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if _host_group is None:
        # A new group has torch's 30 minutes, with any timeout of the strategy.
        default: Any = dist.group.WORLD
        timeout = default._get_backend(default._device_types[0]).options._timeout
        _host_group = dist.new_group(backend="gloo", timeout=timeout)
    return _host_group


def shards_of(*rows: int) -> tuple[RankCounts, ...]:
    """Exchange the row counts of several kinds with the other ranks, in one collective."""
    rank, world = rank_and_world()
    if world == 1:
        return tuple(RankCounts(0, (number,)) for number in rows)
    counts = torch.zeros(len(rows), world, dtype=torch.long)
    counts[:, rank] = torch.tensor(rows)
    dist.all_reduce(counts, group=host_group())
    return tuple(RankCounts(rank, tuple(of_ranks)) for of_ranks in counts.tolist())


def _newest(name: str, before: str) -> Any:
    """Return the collective by its new name; before torch 2.13, which renamed it, by its old name."""
    return getattr(dist, name, None) or getattr(dist, before)


def gather_rows(local: Tensor, ranks: RankCounts) -> Tensor:
    """Gather ``[B, ...]`` to ``[N, ...]`` in rank order, without gradient. A single rank gets its own rows."""
    if ranks.world == 1:
        return local
    most, even = max(ranks.counts), len(set(ranks.counts)) == 1
    padded = local.contiguous() if even else F.pad(local, [0, 0] * (local.ndim - 1) + [0, most - len(local)])
    gathered = padded.new_empty(ranks.world * most, *local.shape[1:])
    _newest("all_gather_single", "all_gather_into_tensor")(gathered, padded)
    if even:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(most), ranks.counts, strict=True)])


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a row is the sum of its gradients on all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: RankCounts) -> Tensor:
        ctx.ranks = ranks
        return gather_rows(local, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grads[0].contiguous(), ctx.ranks), None


def gather(local: Tensor, ranks: RankCounts) -> Tensor:
    """Gather ``[B, ...]`` to ``[N, ...]`` in rank order, differentiably."""
    return local if ranks.world == 1 else _Gather.apply(local, ranks)  # pyright: ignore[reportReturnType]  # untyped apply


def sum_rows(everyones: Tensor, ranks: RankCounts) -> Tensor:
    """Sum ``[N, ...]`` over ranks and return this rank's rows ``[B, ...]``; may change its input; no gradient."""
    if ranks.world == 1:
        return everyones
    if len(set(ranks.counts)) > 1:  # reduce-scatter needs equal parts, and padding them a second copy
        dist.all_reduce(everyones)
        return everyones[ranks.mine].clone()
    mine = everyones.new_empty(ranks.counts[ranks.rank], *everyones.shape[1:])
    _newest("reduce_scatter_single", "reduce_scatter_tensor")(mine, everyones)
    return mine


def logsumexp_over_ranks(everyones: Tensor, ranks: RankCounts) -> Tensor:
    """Return the log-sum-exp of ``[N]`` over ranks, element by element, in place; -inf: no term; no gradient."""
    if ranks.world == 1:
        return everyones
    highest = everyones.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    highest.clamp_(min=torch.finfo(highest.dtype).min)  # -inf less -inf is nan
    everyones.sub_(highest).exp_()
    dist.all_reduce(everyones)
    return everyones.log_().add_(highest)


def gather_uneven(local: Tensor) -> Tensor:
    """Gather ``[B, ...]`` in rank order, without gradient; B may differ between ranks, and be 0."""
    return gather_rows(local, *shards_of(len(local)))


def gather_objects(local: list[Any]) -> list[Any]:
    """Concatenate lists of picklable items from all ranks, in rank order."""
    _, world = rank_and_world()
    if world == 1:
        return local
    parts: list[list[Any] | None] = [None] * world
    dist.all_gather_object(parts, local, group=host_group())
    return [item for part in parts for item in part or []]


def sum_over_ranks(local: Tensor, device: torch.device) -> Tensor:
    """Return the element-wise sum over ranks on ``local``'s device; the backend must support ``device``."""
    if rank_and_world()[1] == 1:
        return local
    total = local.to(device)
    total = total.clone() if total is local else total
    dist.all_reduce(total)
    return total.to(local.device)


def gather_large(local: Tensor, counts: Sequence[int]) -> Tensor:
    """Gather ``[B, ...]`` in rank order without a second temporary copy; no gradient."""
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
    """Return the element-wise maximum over ranks of a tensor on a device that the backend supports."""
    if rank_and_world()[1] == 1:
        return local
    highest = local.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def same_buffers(module: torch.nn.Module) -> None:
    """Broadcast the first rank's buffers, such as BatchNorm's statistics."""
    if rank_and_world()[1] > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def maximum(local: int) -> int:
    """Return the largest number of all ranks; wait for the other ranks, but not for the device."""
    if rank_and_world()[1] == 1:
        return local
    largest = torch.tensor([local])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=host_group())
    return int(largest)


def barrier() -> None:
    """Wait for the other ranks, but not for the device."""
    maximum(0)


EXIT_WITHIN = 20.0  # seconds


def exit_process(code: int = 0) -> None:
    """End a process of a process group after its work is done; do nothing without a process group.

    The interpreter's own exit may abort: gloo's threads may still hold tensors, DDP keeps these threads alive, and one
    that releases a tensor while the interpreter exits aborts the process with exit code 134 (pytorch/pytorch#179291).
    """
    if dist.is_available() and dist.is_initialized():
        at_last = threading.Timer(EXIT_WITHIN, os._exit, (code,))  # in case another rank or a thread keeps it waiting
        at_last.daemon = True
        at_last.start()
        if code == 0:  # after an error the other ranks may be anywhere
            dist.destroy_process_group()
        atexit._run_exitfuncs()  # registered exit handlers still run
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
