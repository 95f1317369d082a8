"""Order of the samples of tar shards: pure functions of the shard sizes, the epoch and a seed."""

from collections.abc import Sequence

import numpy as np


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return the first row of each shard, followed by the number of rows."""
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


def shard_order(sizes: Sequence[int], shuffle_shards: int, epoch: int, seed: int) -> np.ndarray:
    """Return each row once, with the rows of a shard near each other.

    The shards are shuffled and cut into windows of at most ``shuffle_shards``, as equal as possible; the rows of a
    window are shuffled together.

    Args:
        sizes: rows of each shard; rows are numbered in this order.
        shuffle_shards: shards in a window.
        epoch: each has its own order.
        seed: of all epochs.

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
    """Return rows drawn with replacement, all equally likely at every position.

    Each window draws ``shuffle_shards`` shards in proportion to their sizes, and as many rows from them as that number
    of shards of mean size has.

    Args:
        sizes: rows of each shard; rows are numbered in this order.
        shuffle_shards: shards in a window.
        count: rows to draw.
        epoch: each has its own order.
        seed: of all epochs.

    Returns:
        int64 ``[count]``.
    """
    rng = np.random.default_rng((seed, epoch))
    probabilities = np.asarray(sizes, np.float64) / sum(sizes)
    starts = _starts(sizes)
    window = max(1, shuffle_shards * sum(sizes) // len(sizes))
    order = np.empty(count, np.int64)
    for first in range(0, count, window):
        shards = rng.choice(len(sizes), shuffle_shards, p=probabilities)
        shard_of = shards[rng.integers(shuffle_shards, size=min(window, count - first))]
        order[first : first + window] = np.asarray(starts)[shard_of] + rng.integers(np.asarray(sizes)[shard_of])
    return order
