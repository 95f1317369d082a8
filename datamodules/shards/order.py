"""Order of the samples of tar shards: a pure function of the shard sizes, the epoch and a seed."""

from collections.abc import Sequence

import numpy as np


def shard_order(sizes: Sequence[int], shuffle_shards: int, epoch: int, seed: int) -> np.ndarray:
    """Return each row once, with the rows of a shard near each other.

    The shards are shuffled and cut into windows of at most ``shuffle_shards``, as equal as possible; the rows of a
    window are shuffled together. ``sizes`` are the rows of each shard, numbered in this order.

    Returns:
        int32 where it fits, else int64, ``[sum(sizes)]``.
    """
    rng = np.random.default_rng((seed, epoch))
    starts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
    order = np.empty(starts[-1], np.int32 if starts[-1] < 2**31 else np.int64)
    done = 0
    for window in np.array_split(rng.permutation(len(sizes)), -(-len(sizes) // shuffle_shards)):
        rows = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window.tolist()])
        rng.shuffle(rows)
        order[done : done + len(rows)] = rows
        done += len(rows)
    return order
