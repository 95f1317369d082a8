"""Samplers: they decide which samples form which batch, exactly for any number of ranks and workers."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from lit_clip.errors import InputError, require


class TrainingSample(NamedTuple):
    """Index into a training dataset; its epoch and draw seed the caption and the augmentation."""

    epoch: int
    row: int
    draw: int = 0  # how often the epoch has drawn this row before; above 0 only where an epoch repeats rows
    budget: int = 0  # most patches of the image, the same for the whole batch; 0: the model's


def sample_seed(seed: int, sample: TrainingSample) -> int:
    """Return the seed of everything random in a sample."""
    entropy = (seed, *sample[:3]) if sample.draw else (seed, sample.epoch, sample.row)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1


def draw_numbers(order: np.ndarray) -> np.ndarray | None:
    """Return how often each row came earlier in an epoch's order, int ``[size]``; None if no row repeats."""
    seen = np.zeros(int(order.max(initial=-1)) + 1, dtype=bool)
    seen[order] = True
    if np.count_nonzero(seen) == len(order):  # the usual case, in a tenth of the time of sorting
        return None
    # Sorting whole numbers is ten times as fast as a stable argsort.
    rows, by_row = np.divmod(np.sort(order.astype(np.int64) * len(order) + np.arange(len(order))), len(order))
    first = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))  # place of each row's first draw
    draws = np.empty(len(order), dtype=order.dtype)
    draws[by_row] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return draws


class Position(NamedTuple):
    """Position of training in the data: ``batch`` batches of epoch ``epoch`` are done."""

    epoch: int = 0
    batch: int = 0


def permutation(size: int, epoch: int, seed: int) -> np.ndarray:
    """Return all rows, shuffled by (seed, epoch), as int32 if they fit."""
    rows = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64)
    np.random.default_rng((seed, epoch)).shuffle(rows)
    return rows


def default_batch_size(pairs: int, world: int) -> int:
    """Return the default pairs per step on each rank: 64, 128 or 256 over all ranks, or fewer for small data.

    With 500 photographs 64 pairs a step were best, with 3,068 64 to 256, with 5,000 icons 256
    (docs/evidence/recipes.md).
    """
    whole = 64 if pairs < 1_000 else 128 if pairs < 2_000 else 256
    return max(1, min(whole, pairs) // world)


class GlobalBatchSampler(Sampler[list[TrainingSample]]):
    """Cut seeded permutations into batches that are the same for any number of ranks.

    Step k of an epoch is one global batch, a slice of the epoch's permutation; each rank takes every ``world``-th
    sample of it. The incomplete global batch at the end is dropped; the next epoch drops other samples.

    Args:
        batch_size: samples per step on each rank.
        order: epoch -> all rows in that epoch's order, int ``[size]``; None: :func:`permutation`.
        budgets: of patches, from which each batch draws one, the same on every rank (NaFlex); empty: the model's.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        order: Callable[[int], np.ndarray] | None = None,
        start: Position = Position(),  # noqa: B008  # immutable
        budgets: Sequence[int] = (),
    ) -> None:
        if size < batch_size * world:
            fits = size // world
            raise InputError(
                f"{size} training pairs are fewer than one batch of {batch_size} on each of {world} processes; "
                + (f"set data.batch_size to {fits} or less" if fits else "use fewer processes")
            )
        self.size = size
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.seed = seed
        self.budgets = tuple(budgets)
        self.order = order or (lambda epoch: permutation(size, epoch, seed))
        # Data workers fetch the first batches before Lightning calls set_epoch.
        self.epoch, self.start = start.epoch, start
        self.reshuffle = True  # each epoch has its own permutation
        self.sampler = self  # Lightning calls set_epoch on a loader's batch_sampler.sampler, not on its batch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each one."""
        if self.reshuffle:
            self.epoch = epoch

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[TrainingSample]]:
        order, epoch = self.order(self.epoch), self.epoch
        draws = draw_numbers(order)
        done = self.start.batch if epoch == self.start.epoch else 0
        if not self.reshuffle:  # the same epoch again, from its first batch
            self.start = self.start._replace(batch=0)
        step = self.batch_size * self.world
        for first in range(done * step, len(self) * step, step):
            mine = slice(first + self.rank, first + step, self.world)
            counts = np.zeros(self.batch_size, dtype=np.int64) if draws is None else draws[mine]
            budget = self._budget(epoch, first // step)
            pairs = zip(order[mine].tolist(), counts.tolist(), strict=True)
            yield [TrainingSample(epoch, row, draw, budget) for row, draw in pairs]

    def _budget(self, epoch: int, batch: int) -> int:
        """Draw a batch's patch budget from its position alone, so that ranks and resumed runs agree."""
        if not self.budgets:
            return 0
        return self.budgets[int(np.random.default_rng((self.seed, epoch, batch)).integers(len(self.budgets)))]


def checked_budgets(patch_budgets: list[int] | None) -> list[int]:
    """Return the patch budgets that training batches draw from; an empty list for None."""
    if patch_budgets is None:
        return []
    numbers = bool(patch_budgets) and all(1 <= budget < 2**16 for budget in patch_budgets)
    require(numbers, f"patch_budgets: {patch_budgets} must be numbers of patches, each at least 1")
    return list(patch_budgets)


class EvaluationBatchSampler(Sampler[list[int]]):
    """Batch every ``world``-th sample, each once over all ranks; ranks have equally many batches where possible.

    Strategies that shard the weights need every rank in every batch, so a rank that would have fewer batches makes them
    smaller; a rank with too few samples for that has fewer. A rank without samples still reports length 1: Lightning
    would skip its epoch, and the other ranks would wait for ever.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world: int) -> None:
        indices = range(rank, size, world)
        count = -(-len(range(0, size, world)) // batch_size)  # batches of rank 0, which has the most samples
        whole = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        even = [indices[len(indices) * i // count : len(indices) * (i + 1) // count] for i in range(count)]
        self.batches = [list(batch) for batch in (whole if len(whole) == count else even) if batch]
        self._length = max(len(self.batches), min(size, 1))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
