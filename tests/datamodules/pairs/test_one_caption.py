"""One caption of each image in an epoch, by plain loops: which, over epochs, ranks, resumes, mixtures and scores."""

import csv
import random
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CaptionOptions, Captions, CustomPairs
from datamodules.open_source import open_source
from datamodules.pairs.image_captions import OneOfEach, one_caption_each, rows_of_each_image
from datamodules.pairs.kept import digest_of_kept
from datamodules.pairs.source import PairSource, Rows
from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing
from tests.conftest import TINY_YAML
from tests.datamodules.pairs.test_kept import write
from tests.helpers.frozen_runs import Run, fit
from tests.helpers.tar_shards import write_shards

ONE = CaptionOptions(per_image="one")
COUNTS = [1, 2, 3, 4, 5, 5, 2, 1, 5, 3, 4, 1]  # captions of the images
EPOCHS = 60  # after which every image has used its captions a whole number of times


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve images with one to five captions each, a row for each caption, in random order."""
    rows = [(f"{image}.png", f"caption {number} of {image}") for image, n in enumerate(COUNTS) for number in range(n)]
    for image in range(len(COUNTS)):
        Image.effect_noise((32, 32), 20 + 15 * image).convert("RGB").save(tmp_path / f"{image}.png")
    random.Random(0).shuffle(rows)
    return written(tmp_path / "captions.csv", rows)


def written(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return path


def opened(table: Any, **options: Any) -> Captions:
    train = str(table) if isinstance(table, Path) else table
    settings = {"batch_size": 4, "num_workers": 0, "captions": ONE, "augmentation": [], **options}
    data = Captions(train, **settings)
    data.preprocessing = Preprocessing(image_size=8)
    data.setup("fit")
    return data


Drawn = list[tuple[str, str]]


def epoch_of(data: Captions, epoch: int, rank: int = 0, world: int = 1) -> list[Drawn]:
    """Return the keys and captions of each batch of an epoch on a rank."""
    data._rank_and_world = lambda: (rank, world)  # pyright: ignore[reportAttributeAccessIssue]
    loader: Any = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return [list(zip(batch.keys, batch.captions, strict=True)) for batch in loader]


def test_an_epoch_has_each_image_once_and_no_caption_again_before_all_of_its_image_were_used(table: Path) -> None:
    source = one_caption_each(open_source(str(table)))
    assert (len(source), source.pairs_per_epoch) == (sum(COUNTS), len(COUNTS))
    used: dict[str, list[str]] = defaultdict(list)
    orders = set()
    for epoch in range(EPOCHS):
        pairs = [source.text(row, None) for row in source.order(epoch, seed=3).tolist()]
        assert sorted(pair.key for pair in pairs) == sorted(f"{image}.png" for image in range(len(COUNTS)))
        orders.add(tuple(pair.key for pair in pairs))
        for pair in pairs:
            used[pair.key].append(pair.caption)
    assert len(orders) == EPOCHS
    for image, count in enumerate(COUNTS):
        every = {f"caption {number} of {image}" for number in range(count)}
        passes = [used[f"{image}.png"][first : first + count] for first in range(0, EPOCHS, count)]
        for captions in passes:
            assert (len(captions), set(captions)) == (count, every)
        assert len(set(map(tuple, passes))) > 1 or count == 1  # shuffled again each time


def test_images_with_equally_many_captions_are_shuffled_independently_and_evenly() -> None:
    """Of 3,000 images with two captions each, half begin with the first one; pairs of neighbours are independent."""
    source = OneOfEach(Numbers(6000), np.repeat(np.arange(3000, dtype=np.int32), 2))
    first = np.zeros(3000, dtype=bool)
    rows = source.order(0, seed=0)
    first[rows // 2] = rows % 2 == 0
    assert 1390 < first.sum() < 1610  # four standard deviations
    assert 1390 < (first[1:] == first[:-1]).sum() < 1610
    assert not np.array_equal(np.sort(source.order(0, seed=1)), np.sort(rows))
    assert np.array_equal(np.sort(source.order(1, seed=0)) // 2, np.sort(rows) // 2)
    assert not np.isin(source.order(1, seed=0), rows).any()


class Numbers(CustomPairs):
    """Rows without files."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index % 256, 0, 0))

    def captions(self, index: int) -> list[str]:
        return [f"caption {index}"]

    def key(self, index: int) -> str:
        return f"image {index // 3}"


def test_the_rows_of_a_source_of_ones_own_with_one_key_are_one_image() -> None:
    data = opened(Numbers(36), val=Numbers(3), batch_size=12)
    assert data.steps_per_epoch == 1
    epochs = [dict(*epoch_of(data, epoch)) for epoch in range(3)]
    assert all(len(each) == 12 for each in epochs)
    assert len({caption for each in epochs for caption in each.values()}) == 36


@pytest.mark.parametrize(
    ("world", "workers"),
    [
        *[(1, 2), (2, 2), (3, 0)],
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (2, 0), (3, 2))],  # mostly starts of workers
    ],
)
def test_any_ranks_and_workers_share_the_batches_of_one_process(world: int, workers: int, table: Path) -> None:
    alone = opened(table, val=str(table), batch_size=6)
    data = opened(table, val=str(table), batch_size=6 // world, num_workers=workers)
    for epoch in (0, 4):
        ranks = [epoch_of(data, epoch, rank, world) for rank in range(world)]
        shared = [sorted(pair for batch in batches for pair in batch) for batches in zip(*ranks, strict=True)]
        assert shared == [sorted(batch) for batch in epoch_of(alone, epoch)]
        assert len({key for batch in shared for key, _ in batch}) == len(COUNTS)


def test_validation_has_all_captions_and_a_divided_table_keeps_images_apart(table: Path) -> None:
    data = opened(table, val=str(table))
    assert sum(len(batch.keys) for batch in data.val_dataloader()) == sum(COUNTS)
    data = opened(table)
    assert isinstance(data.train_source, OneOfEach)
    assert data.val_source is not None
    train, val = ({each.key(row) for row in range(len(each))} for each in (data.train_source, data.val_source))
    assert train.isdisjoint(val)
    assert len(train) == data.train_source.pairs_per_epoch
    rest = sum(count for image, count in enumerate(COUNTS) if f"{image}.png" in val)
    assert len(data.val_source) == rest


def run_of(table: Path, folder: Path, **options: Any) -> Run:
    folder.mkdir()
    return Run(str(folder), str(table), data={"captions": ONE, "batch_size": 4}, **options)


# Whole batches resume in the same way, and those of another order do in test_batch_order.
@pytest.mark.parametrize("micro_batch", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_a_run_resumed_within_an_epoch_continues_bit_for_bit(
    micro_batch: int | None, table: Path, tmp_path: Path
) -> None:
    model = {"micro_batch_size": micro_batch}
    whole, module = fit(run_of(table, tmp_path / "whole", model=model))
    assert len(whole.samples) == 2 * 3
    stopped = run_of(table, tmp_path / "stopped", model=model, stop_at=4)
    first, _ = fit(stopped)
    second, resumed = fit(stopped._replace(stop_at=None, resume=True))
    assert first.samples + second.samples == whole.samples
    weights = resumed.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(weights[name], value), name
    other = stopped._replace(stop_at=None, resume=True, data={"batch_size": 4})
    with pytest.raises(InputError, match=r"data\.captions\.per_image 'one' there and None here"):
        fit(other)


# The rows are what matters here; what is stored with each freeze is tested in callbacks/test_frozen_features.
@pytest.mark.parametrize("freeze", [pytest.param("unlock_last 0", marks=pytest.mark.slow), "unlock_last 1", "image"])
def test_stored_features_train_as_images_and_captions_do(freeze: str, table: Path, tmp_path: Path) -> None:
    run = run_of(table, tmp_path / "run", freeze=freeze)
    plain, _ = fit(run)
    stored, _ = fit(run._replace(cache=str(tmp_path / "cache")))
    assert stored.samples == plain.samples
    assert not stored.decoded
    assert stored.losses == pytest.approx(plain.losses, rel=1e-5)
    assert len({pair for keys, captions in plain.samples for pair in zip(keys, captions, strict=True)}) > len(COUNTS)
    # All rows a pass read the same files.
    files = sorted((tmp_path / "cache").iterdir())
    times = [file.stat().st_mtime_ns for folder in files for file in folder.iterdir()]
    fit(run._replace(cache=str(tmp_path / "cache"), data={"batch_size": 12}, epochs=1))
    assert sorted((tmp_path / "cache").iterdir()) == files
    assert [file.stat().st_mtime_ns for folder in files for file in folder.iterdir()] == times


def test_parts_of_a_mixture_have_their_weights_and_one_caption_of_an_image_in_a_pass(
    table: Path, tmp_path: Path
) -> None:
    rows = [(f"{image}.png", f"only {image}") for image in range(12)]
    other = written(tmp_path / "other.csv", rows)
    parts = [{"data": str(table), "weight": 1}, {"data": str(other), "weight": 3}]
    data = opened(parts, val=str(table), batch_size=24)
    assert data.train_source is not None
    assert data.train_source.pairs_per_epoch == 24
    drawn = [pair for epoch in range(20) for (batch,) in [epoch_of(data, epoch)] for pair in batch]
    stream = [pair for pair in drawn if pair[0].startswith("0:")]
    assert len(stream) == 20 * 6
    for first in range(0, len(stream), 12):  # a pass takes two epochs
        assert len({key for key, _ in stream[first : first + 12]}) == 12
    for image, count in enumerate(COUNTS):
        captions = [caption for key, caption in stream if key == f"0:{image}.png"]
        assert all(len(set(captions[at : at + count])) == count for at in range(0, 10 - count + 1, count))


def test_only_kept_pairs_are_chosen_from(table: Path, tmp_path: Path) -> None:
    kept = write(open_source(str(table)), str(tmp_path / "scores.parquet"), 0.6)
    data = opened(table, val=str(table), keep=str(tmp_path / "scores.parquet"), batch_size=1)
    images = {key for key, _ in kept}
    assert data.steps_per_epoch == len(images)
    epochs = [{pair for batch in epoch_of(data, epoch) for pair in batch} for epoch in range(EPOCHS)]
    assert set().union(*epochs) == kept
    assert all({key for key, _ in drawn} == images for drawn in epochs)
    plain = opened(table, val=str(table), keep=str(tmp_path / "scores.parquet"), captions=None)
    assert data.train_source is not None
    assert plain.train_source is not None
    assert digest_of_kept(data.train_source) == digest_of_kept(plain.train_source) != ""


def test_data_with_a_row_for_each_image_are_refused_in_one_line(table: Path, tmp_path: Path) -> None:
    listed = tmp_path / "listed.jsonl"
    listed.write_text("\n".join(f'{{"image": "{image}.png", "caption": ["a", "b"]}}' for image in range(12)))
    for data in (listed, write_shards(tmp_path / "shards")):
        message = r"^data\.captions\.per_image: one would change nothing: each image of .* is in one row, of whose"
        with pytest.raises(InputError, match=message):
            opened(data, val=str(table))
    with pytest.raises(InputError, match=r"^data\.captions\.per_image: 'first' must be 'all', 'one' or"):
        CaptionOptions(per_image="first")  # pyright: ignore[reportArgumentType]


def test_rows_of_each_image_are_counted_without_reading_images(table: Path, tmp_path: Path) -> None:
    for image in tmp_path.glob("*.png"):
        image.write_bytes(b"")
    source = open_source(str(table))
    assert rows_of_each_image(source) == sum(COUNTS) / len(COUNTS)
    half = Rows(source, np.arange(0, len(source), 2))
    names = {source.key(row) for row in range(0, len(source), 2)}
    assert rows_of_each_image(half) == len(half) / len(names)
    assert rows_of_each_image(one_caption_each(source)) is None
    shards: PairSource = open_source(str(write_shards(tmp_path / "shards")))
    assert rows_of_each_image(shards) is None


def test_the_plan_recommends_it_where_images_have_several_captions(
    cli: Callable[..., subprocess.CompletedProcess[str]], table: Path, tmp_path: Path
) -> None:
    words = ["fit", "--data", "datamodules.Captions", "--data.train", str(table), "--data.val", str(table)]
    words += ["--data.batch_size", "4", "--model.architecture", TINY_YAML, "--print_plan"]
    plan = " ".join(cli(*words).stdout.replace("│", " ").split())
    assert "captions 3 of each image on average" in plan
    assert "--data.captions.per_image one" in plan
    assert "9 per epoch" in plan
    plan = " ".join(cli(*words, "--data.captions.per_image", "one").stdout.replace("│", " ").split())
    assert "of each image on average" not in plan
    assert "3 per epoch" in plan
