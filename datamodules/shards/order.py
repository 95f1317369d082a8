"""In which order the samples of tar shards come: pure functions of their numbers, the epoch and a seed."""

from collections.abc import Sequence

import numpy as np


def _starts(sizes: Sequence[int]) -> list[int]:
    """The number of each shard's first row, and of all rows."""
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


def shard_order(sizes: Sequence[int], shuffle_shards: int, epoch: int, seed: int) -> np.ndarray:
    """Each row once, those of a shard near each other.

    The shards are shuffled and cut into windows of at most ``shuffle_shards``, as equal as can be; the rows of a window
    are shuffled among themselves.

    Args:
        sizes: rows of each shard, which are numbered in this order.
        shuffle_shards: see above.
        epoch: each has an order of its own.
        seed: of all of them.

    Returns:
        int32 where it fits, else int64, ``[sum(sizes)]``.
    """
    rng = np.random.default_rng((seed, epoch))
    starts = _starts(sizes)
    order = np.empty(starts[-1], np.int32 if starts[-1] < 2**31 else np.int64)
    done = 0
    for window in np.array_split(rng.permutation(len(sizes)), -(-len(sizes) // shuffle_shards)):
        rows = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window.tolist()])
        rng.shuffle(rows)
        order[done : done + len(rows)] = rows
        done += len(rows)
    return order


def resampled_order(sizes: Sequence[int], shuffle_shards: int, count: int, epoch: int, seed: int) -> np.ndarray:
    """Rows drawn with replacement, each as likely as any other at any place; arguments as in :func:`shard_order`.

    Windows of ``shuffle_shards`` shards are drawn by their sizes, and of each as many rows as shards of the mean size
    have.

    Returns:
        int64 ``[count]``.
    """
    rng = np.random.default_rng((seed, epoch))
    shares = np.asarray(sizes, np.float64) / sum(sizes)
    starts = _starts(sizes)
    window = max(1, shuffle_shards * sum(sizes) // len(sizes))
    order = np.empty(count, np.int64)
    for first in range(0, count, window):
        drawn = rng.choice(len(sizes), shuffle_shards, p=shares)
        of_each = drawn[rng.integers(shuffle_shards, size=min(window, count - first))]
        order[first : first + window] = np.asarray(starts)[of_each] + rng.integers(np.asarray(sizes)[of_each])
    return order
