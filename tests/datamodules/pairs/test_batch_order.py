"""Batches without duplicates and with hard negatives, by plain loops: over epochs, ranks, workers and resumes."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules import BatchOptions, CaptionOptions, Captions, CustomPairs
from datamodules.open_source import open_source
from datamodules.pairs.batch_order import BatchOrder
from datamodules.pairs.decisions import FINDINGS, label_of, pair_text
from datamodules.pairs.related_rows import Neighbours, name_pairs, stored_neighbours
from lit_clip.embedding.feature_files import write_features
from lit_clip.errors import InputError
from lit_clip.tools.hashing import pair_hash
from tests.helpers import epochs
from tests.helpers.epochs import assert_resumes, epoch_of, shared_by, written
from tests.helpers.frozen_runs import Run

AVOIDED = BatchOptions(duplicates="avoided")
IMAGES, WORDS = 40, 30


def unit(rows: int, seed: int = 0) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


class Drawn(CustomPairs):
    """Rows whose images, groups and captions often repeat; opening an image is an error."""

    def __init__(self, rows: int, images: int = IMAGES, words: int = WORDS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.images, self.words = rng.integers(images, size=rows), rng.integers(words, size=(rows, 2))
        self.groups = rng.integers(200, size=rows)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        raise AssertionError("no image is needed")

    def key(self, index: int) -> str:
        return f"{self.images[index]}.png"

    def group(self, index: int) -> str:
        return f"group {self.groups[index]}" if self.groups[index] < 20 else ""

    def captions(self, index: int) -> list[str]:
        return [f"  Word {self.words[index, 0]}", f"word {self.words[index, 1]} "]


def names(source: Any, row: int) -> set[str]:
    """Everything that makes two rows duplicates."""
    captions = {" ".join(caption.lower().split()) for caption in source.captions(row)}
    group = source.text(row, None).group
    return {f"image {source.key(row)}", *captions, *([f"group {group}"] if group else [])}


def duplicates(source: Any, batch: list[int]) -> int:
    """Count the pairs of rows of a batch that are duplicates."""
    every = [names(source, row) for row in batch]
    return sum(not one.isdisjoint(other) for one, other in itertools.combinations(every, 2))


def ordered(source: Any, options: BatchOptions = AVOIDED, near: Neighbours | None = None, seed: int = 0) -> BatchOrder:
    return BatchOrder(source, options, seed, name_pairs(source, 0).shared, near)


def cut(order: np.ndarray, size: int) -> list[list[int]]:
    return order.reshape(-1, size).tolist()


@pytest.mark.parametrize(("rows", "size"), [(400, 1), (400, 4), (401, 7), (1000, 9)])
def test_no_two_pairs_of_a_batch_share_a_caption_an_image_or_a_group(rows: int, size: int) -> None:
    source = Drawn(rows)
    order = ordered(source)
    plain = [duplicates(source, batch) for batch in cut(source.order(0, 0)[: rows // size * size], size)]
    assert size == 1 or sum(plain) > len(plain) / 2
    for epoch in range(3):
        batches = cut(order.order(epoch, size), size)
        assert len(batches) == order.batches(size)
        assert sum(duplicates(source, batch) for batch in batches) == 0
        assert len(set(sum(batches, []))) > 0.9 * rows
    assert not np.array_equal(order.order(0, size), order.order(1, size))


def test_rows_without_duplicates_keep_the_sources_order() -> None:
    source = Drawn(300, images=10**9, words=10**9)
    source.groups[:] = 99
    order = ordered(source)
    assert np.array_equal(order.order(2, 7), source.order(2, 0)[:294])


@pytest.mark.parametrize("epoch", range(12))
def test_first_fit_by_a_plain_loop(epoch: int) -> None:
    """Each row, in the source's order, goes into the first batch with room that has no duplicate of it.

    Where this leaves the last batch without two rows, these two have changed places with rows of other batches.
    """
    source, size = Drawn(200, images=100, words=400), 10
    batches: list[list[int]] = [[] for _ in range(20)]
    for row in source.order(epoch, 0).tolist():
        fits = (batch for batch in batches if len(batch) < size and not duplicates_of(source, row, batch))
        next(fits, []).append(row)
    found = cut(ordered(source).order(epoch, size), size)
    assert sorted(sum(found, [])) == list(range(200))
    full = [sorted(batch) for batch in batches if len(batch) == size]
    assert len(full) >= 19
    changed = [len(set(one) - set(other)) for one, other in zip(found, full, strict=False)]
    assert sum(changed) <= (0 if len(full) == 20 else 2)


@pytest.mark.parametrize("hard", [0.0, 0.5, 0.75])
@pytest.mark.parametrize(("images", "words"), [(130, 10**9), (130, 130), (60, 10**9)])
def test_hard_batches_leave_no_row_out_that_can_be_placed(images: int, words: int, hard: float) -> None:
    source = Drawn(240, images=images, words=words)
    source.groups[:] = 99
    near = neighbours(source) if hard else None
    order = ordered(source, BatchOptions("avoided", hard), near)
    for epoch in range(8):
        batches = cut(order.order(epoch, 12), 12)
        assert sorted(sum(batches, [])) == list(range(240))
        assert sum(duplicates(source, batch) for batch in batches) == 0


def neighbours(source: Any) -> Neighbours:
    """Neighbours of a source's images by features drawn at random."""
    _, items = np.unique(name_pairs(source, 0).images, return_inverse=True)
    cosines = unit(items.max() + 1, 3) @ unit(items.max() + 1, 3).T
    np.fill_diagonal(cosines, -2)
    return Neighbours.of(items.astype(np.int32), np.argsort(-cosines)[:, :32].astype(np.int32))


@pytest.mark.parametrize(("hard", "most"), [(0.01, 1), (0.5, 4), (0.95, 7)])
def test_the_nearest_possible_share_of_a_small_batch_is_hard(hard: float, most: int) -> None:
    """Of eight pairs: never none, and one is left whose neighbours the others are."""
    source = Drawn(400, images=10**9, words=10**9)
    source.groups[:] = 99
    near = neighbours(source)
    for batch in cut(ordered(source, BatchOptions("avoided", hard), near).order(0, 8), 8)[:5]:
        nearest = set(np.concatenate([near.near(np.array([row]), np.ones(400))[0] for row in batch[: 8 - most]]))
        assert set(batch[8 - most :]) <= nearest


def test_an_epoch_that_repeats_batches_is_told_once() -> None:
    """Of thirty words each batch of twelve pairs needs about twenty-four: the last batches are seldom found."""
    source = Drawn(400)
    order = ordered(source)
    size, wanted = 12, order.batches(12)
    with pytest.warns(UserWarning, match="repeats") as told:
        filled = [len(set(order.order(epoch, size).tolist())) // size for epoch in range(8)]
    first = next(epoch for epoch, batches in enumerate(filled) if batches < wanted)
    assert [str(each.message).split(";")[0] for each in told if "data.batches" in str(each.message)] == [
        f"data.batches: epoch {first} fills {filled[first]} of {wanted} batches and repeats its first ones"
    ]


def duplicates_of(source: Any, row: int, batch: list[int]) -> bool:
    return any(not names(source, row).isdisjoint(names(source, other)) for other in batch)


class Classes(Drawn):
    """A class is a group; images and captions differ."""

    def __init__(self, counts: list[int]) -> None:
        self.classes = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self.classes)

    def key(self, index: int) -> str:
        return str(index)

    def group(self, index: int) -> str:
        return f"class {self.classes[index]}"

    def captions(self, index: int) -> list[str]:
        return [f"caption {index}"]


def test_a_class_for_each_place_gives_as_many_batches_as_the_smallest_class_has_images() -> None:
    source = Classes([30, 20, 25, 400])
    order = ordered(source)
    assert order.batches(4) == 20
    for batch in cut(order.order(3, 4), 4):
        assert sorted(source.classes[batch]) == [0, 1, 2, 3]
    with pytest.raises(
        InputError, match=r"^data\.batches: no 5 of 475 pairs are without duplicates of each other; set"
    ):
        order.batches(5)


def test_an_epoch_that_fills_fewer_batches_than_the_first_repeats_its_first_ones() -> None:
    source = Classes([20] * 6)
    order = ordered(source)
    every = [order.order(epoch, 5) for epoch in range(30)]
    assert {len(rows) for rows in every} == {order.batches(5) * 5} == {max(len(set(rows.tolist())) for rows in every)}
    assert all(len(set(source.classes[batch])) == 5 for rows in every for batch in cut(rows, 5))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Sixty rows, two for each of thirty images; every third caption is the same."""
    for image in range(30):
        Image.effect_noise((32, 32), 20 + 5 * image).convert("RGB").save(tmp_path / f"{image}.png")
    rows = [(f"{row // 2}.png", f"a caption, the {row if row % 12 else 0}th") for row in range(60)]
    return written(tmp_path / "captions.csv", rows)


def opened(table: Path, **options: Any) -> Captions:
    return epochs.opened(table, **{"val": str(table), "batch_size": 6, **options})


def embedded(table: Path) -> str:
    """Features of the table's images, of which 2i and 2i + 1 are nearest neighbours."""
    features = np.repeat(unit(15), 2, axis=0) + 0.05 * unit(30, seed=1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    path = table.with_name("features.parquet")
    write_features(path, [f"{image}.png" for image in range(30)], features, {"content": "image"})
    return str(path)


@pytest.mark.parametrize(
    ("world", "workers", "hard"),
    [
        *[(2, 1, 0.5), (3, 0, 0.0)],
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1, 0.0), (3, 0, 0.5))],
    ],
)
def test_any_ranks_and_workers_share_the_batches_of_one_process(
    world: int, workers: int, hard: float, table: Path
) -> None:
    batches = BatchOptions("avoided", hard, embedded(table)) if hard else AVOIDED
    alone = opened(table, batches=batches)
    data = opened(table, batches=batches, batch_size=6 // world, num_workers=workers)
    for epoch in (0, 4):
        shared = shared_by([data] * world, epoch)
        assert shared == shared_by([alone], epoch)
        assert all(len(set(column)) == 6 for batch in shared for column in zip(*batch, strict=True))
    assert data.steps_per_epoch == len(shared)


@pytest.mark.parametrize(("hard", "most"), [(0.5, 0.5), (0.25, 0.25)])
def test_a_share_of_each_batch_are_nearest_neighbours_of_the_rest(hard: float, most: float, table: Path) -> None:
    """Image 2i is nearest to 2i + 1: with half of the places hard, nearly all pairs have their partner beside them."""
    data = opened(table, batches=BatchOptions(hard=hard, features=embedded(table)), batch_size=8)
    plain = opened(table, batches=AVOIDED, batch_size=8)
    partners = {name: Counter() for name in ("hard", "plain")}
    for name, each in (("hard", data), ("plain", plain)):
        for batch in epoch_of(each, 0) + epoch_of(each, 1):
            images = {int(key.removesuffix(".png")) for key, _ in batch}
            assert len(images) == 8
            partners[name].update(image ^ 1 in images for image in images)
    share = {name: found[True] / found.total() for name, found in partners.items()}
    assert share["hard"] > 1.5 * most
    assert share["plain"] < 0.4


def test_no_row_is_used_twice_in_an_epoch_of_hard_batches(table: Path) -> None:
    data = opened(table, batches=BatchOptions(hard=0.7, features=embedded(table)), batch_size=8)
    pairs = Counter(pair for batch in epoch_of(data, 0) for pair in batch)
    assert set(pairs.values()) == {1}
    assert len(pairs) >= 48


def test_features_of_captions_and_of_some_images_give_neighbours_to_their_rows(table: Path) -> None:
    source = open_source(str(table))
    found = name_pairs(source, 0)
    path = table.with_name("captions.parquet")
    keys, captions = zip(*((source.key(row), source.captions(row)[0]) for row in range(0, 60, 3)), strict=True)
    write_features(path, keys, unit(20), {}, captions)
    near = stored_neighbours(str(path), found)
    assert near.items.tolist() == [row // 3 if row % 3 == 0 else -1 for row in range(60)]
    cosines = unit(20) @ unit(20).T
    np.fill_diagonal(cosines, -2)
    nearest, every = (3 * np.argsort(-cosines[3])[:19]).tolist(), np.ones(60, dtype=bool)
    assert near.near(np.array([9, 10, 9]), every) == [nearest, [], nearest]
    every[nearest[0]] = False
    assert near.near(np.array([9]), every) == [nearest[1:]]


def test_rows_that_a_mixture_repeats_are_not_in_one_batch_twice(table: Path) -> None:
    parts = [{"data": str(table), "weight": 1}, {"data": str(table), "weight": 20}]
    data = epochs.opened(parts, val=str(table), batch_size=6, batches=AVOIDED)
    drawn = Counter(pair for batch in epoch_of(data, 0) for pair in batch)
    assert max(drawn.values()) > 1
    for batch in epoch_of(data, 1):
        assert all(len(set(column)) == 6 for column in zip(*batch, strict=True))


def test_copies_that_a_kept_table_names_are_one_image(table: Path) -> None:
    """As ``inspect`` writes near copies with another caption: images 0, 1 and 2 look the same."""
    source, findings = open_source(str(table)), table.with_name("findings.csv")
    pairs = [pair_text(pair_hash(source.key(row), source.captions(row)[0])) for row in range(6)]
    lines = [("keep", "1 of 1", 0, row, pairs[row], label_of(source, FINDINGS)) for row in (2, 3, 4, 5)]
    written(findings, lines, ("decision", "captions", "copy_of_row", "row", "pair", "data"))
    data = opened(table, batches=AVOIDED, keep=str(findings))
    batches = [batch for epoch in range(4) for batch in epoch_of(data, epoch)]
    shared = {caption for batch in batches for key, caption in batch if key == "0.png"}
    assert shared >= {source.captions(row)[0] for row in range(1, 6)}
    assert all(len({key for key, _ in batch}) == 6 for batch in batches)


def test_a_run_resumed_within_an_epoch_continues_bit_for_bit(table: Path, tmp_path: Path) -> None:
    batches = BatchOptions(hard=0.5, features=embedded(table))
    run = Run(str(tmp_path / "run"), str(table), epochs=2, data={"batches": batches, "batch_size": 8})
    refused = r"digest of data\.batches '\w+' there and None here"
    assert len(assert_resumes(run, 10, {"batch_size": 8}, refused).samples) == 14  # stopped after 3 of the second epoch


def test_one_caption_of_each_image_and_no_duplicates_go_together(table: Path) -> None:
    data = opened(table, batches=AVOIDED, captions=CaptionOptions(per_image="one"))
    assert data.steps_per_epoch == 5
    for batch in epoch_of(data, 0):
        assert all(len(set(column)) == 6 for column in zip(*batch, strict=True))


def test_options_that_do_nothing_or_cannot_be_are_refused(table: Path) -> None:
    for wrong, message in [
        ({"duplicates": "no"}, r"^data\.batches\.duplicates: 'no' must be 'allowed' or 'avoided'"),
        ({"hard": 1.0}, r"^data\.batches\.hard: 1.0 must be a share from 0 to below 1"),
        ({"features": "f.parquet"}, r"^data\.batches\.features: nothing reads them without data\.batches\.hard"),
    ]:
        with pytest.raises(InputError, match=message):
            BatchOptions(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"^data\.batches\.hard: nothing says which pairs are near; set"):
        epoch_of(opened(table, batches=BatchOptions(hard=0.5)), 0)
    other = table.with_name("other.parquet")
    write_features(other, ["x"], unit(1), {})
    with pytest.raises(InputError, match=r"^data\.batches\.features: .* of none of the 60 training pairs; write it"):
        opened(table, batches=BatchOptions(hard=0.5, features=str(other)))
    pq.write_table(pq.read_table(other)[:0], other)
    with pytest.raises(InputError, match=r"^data\.batches\.features: .* of none of the 60 training pairs"):
        opened(table, batches=BatchOptions(hard=0.5, features=str(other)))
