"""Order of the samples of tar shards."""

import numpy as np
import pytest

from datamodules.shards.pairs import shard_order


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_epoch_order_has_every_row_once_and_few_shards_at_once(window: int) -> None:
    sizes = [7, 1, 0, 12, 5, 9, 3, 20]
    shard_of = np.repeat(np.arange(8), sizes)
    orders = [shard_order(sizes, window, epoch, seed) for epoch in range(2) for seed in range(2)]
    for order in orders:
        assert sorted(order) == list(range(57))
        spread = [np.ptp(np.flatnonzero(shard_of[order] == shard)) + 1 for shard in range(8) if sizes[shard]]
        assert max(spread) <= sum(sorted(sizes)[-window:])  # from a shard's first sample to its last
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], shard_order(sizes, window, 0, 0))


def test_neighbours_in_a_shard_are_separated() -> None:
    order = shard_order([100] * 20, 10, epoch=0, seed=0)
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01
    assert len(set((order[:1000] // 100).tolist())) == 10
