"""Mixtures checked by counting: the share of each source, and no pair repeated before all were used."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datamodules.pairs.mixture import Mixture, proportional_counts
from datamodules.pairs.source import PairSource, Row
from lit_clip.errors import InputError


class Numbers(PairSource):
    """Pairs without files; row numbers are keys."""

    def __init__(self, size: int, group: str = "") -> None:
        self.size, self.group = size, group

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> Row:
        return Row(Image.new("RGB", (1, 1)), [f"of {self.size}: {index}"], str(index), self.group)


def test_each_source_has_its_weighted_share_of_an_epoch() -> None:
    mixture = Mixture([Numbers(1000), Numbers(10), Numbers(190)], [5, 3, 2])
    source_of = np.repeat([0, 1, 2], [1000, 10, 190])
    for epoch in range(4):
        order = mixture.order(epoch, seed=3)
        assert len(order) == len(mixture) == 1200
        assert np.bincount(source_of[order]).tolist() == [600, 360, 240]


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [([1, 1, 1], 10, [4, 3, 3]), ([0.7, 0.2, 0.1], 10, [7, 2, 1]), ([1, 999], 1001, [1, 1000]), ([2.5], 7, [7])],
)
def test_proportional_counts_are_the_nearest_whole_numbers(weights: list[float], total: int, counts: list[int]) -> None:
    assert proportional_counts(weights, total) == counts


def test_no_pair_repeats_before_its_source_is_used_up_across_epochs() -> None:
    mixture = Mixture([Numbers(7), Numbers(50)], [3, 2])  # 34 and 23 per epoch
    stream = np.concatenate([mixture.order(epoch, seed=0) for epoch in range(25)])
    for start, size in ((0, 7), (7, 50)):
        own = stream[(stream >= start) & (stream < start + size)] - start
        passes = [own[first : first + size] for first in range(0, len(own) - size + 1, size)]
        assert len(passes) == len(own) // size
        for rows in passes:
            assert sorted(rows) == list(range(size))
        assert len({tuple(rows) for rows in passes}) == len(passes)  # each in its own order


def test_order_is_a_pure_function_of_epoch_and_seed_and_mixes_the_sources() -> None:
    mixture = Mixture([Numbers(400), Numbers(400)], [1, 1])
    assert len(mixture) == 800
    orders = {(epoch, seed): mixture.order(epoch, seed) for epoch in (3, 0) for seed in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert np.array_equal(Mixture([Numbers(400), Numbers(400)], [1, 1]).order(3, 1), orders[3, 1])
    first = orders[0, 0]
    assert sorted(first) == list(range(800))
    assert 160 < (first[:400] < 400).sum() < 240
    assert not np.array_equal(first[first < 400], first[first >= 400] - 400)  # equal sources differ in order


def test_keys_and_groups_are_distinct_between_sources() -> None:
    mixture = Mixture([Numbers(3, "a"), Numbers(2, "a"), Numbers(1)], [1, 1, 1])
    pairs = [mixture.load(index, None) for index in range(len(mixture))]
    assert [pair.key for pair in pairs] == ["0:0", "0:1", "0:2", "1:0", "1:1", "2:0"]
    assert [pair.group for pair in pairs] == ["0:a", "0:a", "0:a", "1:a", "1:a", ""]
    assert [pair.caption for pair in pairs[3:5]] == ["of 2: 0", "of 2: 1"]
    assert [mixture.read(index).key for index in range(6)] == [pair.key for pair in pairs]
    assert mixture.captions(4) == ["of 2: 1"]


def test_nested_mixtures_keep_their_shares() -> None:
    inner = Mixture([Numbers(30), Numbers(30)], [2, 1])
    outer = Mixture([inner, Numbers(40)], [3, 2])
    source_of = np.repeat([0, 1, 2], [30, 30, 40])
    assert np.bincount(source_of[outer.order(5, seed=0)]).tolist() == [40, 20, 40]
    assert outer.load(45, None).key == "0:1:15"


def test_division_keeps_the_shares_and_validates_each_pair_once() -> None:
    train, held_out = Mixture([Numbers(100), Numbers(20)], [1, 1]).divide(0.1, seed=0)
    assert isinstance(train, Mixture)
    assert Counter(train.load(int(row), None).key[0] for row in train.order(0, 0)) == {"0": 54, "1": 54}
    held_out_keys = {held_out.load(index, None).key for index in range(len(held_out))}
    assert len(held_out_keys) == len(held_out) == 12
    assert not held_out_keys & {train.load(index, None).key for index in range(len(train))}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights for 2 sources"),
        ([1, 0], "weight 0 of source 1 must be above 0"),
        ([1, float("nan")], "weight nan of source 1"),
        ([1, float("inf")], "weight inf of source 1"),
        ([1000, 1], "an epoch of 6 pairs would have none of source 1"),
    ],
)
def test_invalid_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture([Numbers(3), Numbers(3)], weights)
