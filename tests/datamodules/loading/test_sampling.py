"""Samplers against plain sets: nothing repeated, nothing lost, the same for any number of ranks."""

from collections import Counter

import numpy as np
import pytest

from datamodules.loading.sampling import (
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Position,
    TrainingSample,
    default_batch_size,
    draw_numbers,
    sample_seed,
)
from lit_clip.errors import InputError

WORLDS = (1, 2, 3, 4)


def global_batches(
    size: int, global_batch: int, world: int, seed: int = 0, epoch: int = 0
) -> list[list[tuple[int, ...]]]:
    """Return the rows of each rank in each step."""
    ranks = []
    for rank in range(world):
        sampler = GlobalBatchSampler(size, global_batch // world, rank, world, seed)
        sampler.set_epoch(epoch)
        ranks.append([tuple(sample.row for sample in batch) for batch in sampler])
    return [list(step) for step in zip(*ranks, strict=True)]


def rows_of(steps: list[list[tuple[int, ...]]]) -> list[int]:
    return [row for step in steps for batch in step for row in batch]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_step_has_the_same_samples_on_any_number_of_ranks(world: int) -> None:
    one_rank, all_ranks = global_batches(61, 12, 1, epoch=3), global_batches(61, 12, world, epoch=3)
    assert len(one_rank) == 5
    for (expected,), batches in zip(one_rank, all_ranks, strict=True):
        assert {row for batch in batches for row in batch} == set(expected)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", [12, 13, 61, 83])
def test_sample_occurs_at_most_once_per_epoch_and_only_the_incomplete_batch_is_dropped(size: int, world: int) -> None:
    rows = rows_of(global_batches(size, 12, world))
    assert len(rows) == len(set(rows)) == size - size % 12
    assert set(rows) <= set(range(size))


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_yields_len_full_batches(world: int) -> None:
    samplers = [GlobalBatchSampler(50, 3, rank, world, seed=0) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(sampler) for sampler in samplers} == {len(own) for own in batches} == {50 // (3 * world)}
    assert {len(batch) for own in batches for batch in own} == {3}


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = {(seed, epoch): rows_of(global_batches(60, 12, 2, seed, epoch)) for seed in (0, 1) for epoch in range(3)}
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert list(range(60)) not in orders.values()
    assert rows_of(global_batches(60, 12, 2, seed=1, epoch=2)) == orders[1, 2]


def test_samples_carry_the_epoch_that_was_set_last_although_it_is_an_earlier_one() -> None:
    sampler, found = GlobalBatchSampler(20, 4, 0, 1, seed=0), []
    for epoch in (3, 7, 3):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert {sample.epoch for batch in found[-1] for sample in batch} == {epoch}
    assert found[0] == found[2] != found[1]


def test_each_epoch_drops_other_samples() -> None:
    dropped = [frozenset(range(23)) - set(rows_of(global_batches(23, 12, 2, epoch=epoch))) for epoch in range(8)]
    assert all(len(rows) == 11 for rows in dropped)
    assert len(set(dropped)) == 8
    assert not frozenset.intersection(*dropped)


@pytest.mark.parametrize(("size", "batch_size", "world", "largest"), [(11, 12, 1, 11), (23, 6, 4, 5), (4, 64, 3, 1)])
def test_fewer_samples_than_a_batch_is_an_error_that_names_the_largest_batch_size(
    size: int, batch_size: int, world: int, largest: int
) -> None:
    with pytest.raises(InputError) as error:
        GlobalBatchSampler(size, batch_size, 0, world, seed=0)
    message = str(error.value)
    assert "\n" not in message
    assert f"{size} training pairs" in message
    assert f"batch_size to {largest} or less" in message
    assert len(GlobalBatchSampler(size, largest, 0, world, seed=0)) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_without_a_batch_size_has_as_many_pairs_on_any_number_of_ranks(world: int) -> None:
    """64 to 256 by the number of pairs, and never more than there are."""
    steps = {pairs: default_batch_size(pairs, world) * world for pairs in (40, 999, 1_000, 2_000, 400_000_000)}
    assert steps == {40: 40, 999: 64, 1_000: 128, 2_000: 256, 400_000_000: 256}
    assert default_batch_size(3, 4) == 1, "which is refused as too few for four processes"


def test_fewer_samples_than_processes_does_not_suggest_batch_size_zero() -> None:
    with pytest.raises(InputError) as error:
        GlobalBatchSampler(3, 1, 0, 4, seed=0)
    assert "3 training pairs" in str(error.value)
    assert "to 0 or less" not in str(error.value)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
@pytest.mark.parametrize("size", [0, 1, 3, 15, 21, 64])
def test_evaluation_has_each_sample_once_and_equal_batch_counts_where_possible(
    size: int, batch_size: int, world: int
) -> None:
    samplers = [EvaluationBatchSampler(size, batch_size, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    for rank, (sampler, own) in enumerate(zip(samplers, batches, strict=True)):
        assert [row for batch in own for row in batch] == list(range(rank, size, world))
        assert all(0 < len(batch) <= batch_size for batch in own)
        assert len(sampler) == max(len(own), min(size, 1))  # Lightning would skip a rank with length 0
    if size >= world and batch_size > 1:
        assert {len(own) for own in batches} == {-(-len(range(0, size, world)) // batch_size)}


@pytest.mark.parametrize(("size", "rows"), [(0, 1), (1, 1), (10, 3), (500, 40), (500, 100_000)])
def test_draw_numbers_count_how_often_a_row_came_before(size: int, rows: int) -> None:
    order = np.random.default_rng(size).integers(rows, size=size)
    seen: Counter[int] = Counter()
    expected = []
    for row in order.tolist():
        expected.append(seen[row])
        seen[row] += 1
    draws = draw_numbers(order)
    assert (draws is None) == (not any(expected))
    assert draws is None or draws.tolist() == expected


def repeated(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).integers(7, size=40)


@pytest.mark.parametrize("world", [2, 4])
def test_draws_of_a_repeated_row_are_the_same_on_any_number_of_ranks_and_after_a_resume(world: int) -> None:
    def steps(world: int, start: Position) -> list[set[TrainingSample]]:
        ranks = [list(GlobalBatchSampler(40, 8 // world, rank, world, 0, repeated, start)) for rank in range(world)]
        return [{sample for batch in batches for sample in batch} for batches in zip(*ranks, strict=True)]

    whole = steps(1, Position(epoch=2))
    assert [len(step) for step in whole] == [8] * 5  # no two samples of a step are the same
    assert len(set.union(*whole)) == 40
    assert steps(world, Position(epoch=2)) == whole
    assert steps(world, Position(epoch=2, batch=3)) == whole[3:]


def test_first_draws_seed_is_that_of_epoch_and_row_alone_and_later_draws_have_others() -> None:
    alone = int(np.random.SeedSequence((5, 1, 2)).generate_state(1, np.uint64)[0]) >> 1
    assert sample_seed(5, TrainingSample(1, 2)) == alone
    assert len({sample_seed(5, TrainingSample(1, 2, draw)) for draw in range(100)}) == 100
