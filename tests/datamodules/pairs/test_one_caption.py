"""One caption of each image in an epoch, or all in one step: over epochs, ranks, formats, resumes, stored features."""

import csv
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import TrainingMonitor
from datamodules import Augmentation, BadSamples, BatchOptions, CaptionOptions, Captions, Columns, CustomPairs
from datamodules.open_source import open_source
from datamodules.pairs.image_captions import OneOfEach, chosen_pairs
from datamodules.pairs.kept import digest_of_kept
from datamodules.pairs.source import ImageOptions
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Sum, WeightedContrastive
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.training.even_batches import even_batches
from lit_clip.training.plan import measure_run, plan_rows
from lit_clip.training.teacher import Distillation
from tests.datamodules.pairs.test_kept import write
from tests.helpers.epochs import assert_resumes, batches_of, epoch_of, opened, shared_by, written
from tests.helpers.frozen_runs import Run, fit
from tests.helpers.tar_shards import write_shards
from tests.training.test_plan import trainer

ONE, TOGETHER = CaptionOptions(per_image="one"), CaptionOptions(per_image="together")
COUNTS = [1, 2, 3, 4, 5, 5, 2, 1, 5, 3, 4, 1]  # captions of the images
EPOCHS = 60  # after which every image has used its captions a whole number of times


def painted(folder: Path) -> Path:
    for image in range(len(COUNTS)):
        Image.effect_noise((32, 32), 20 + 15 * image).convert("RGB").save(folder / f"{image}.png")
    return folder / "captions.csv"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve images with one to five captions each, a row for each caption, in random order."""
    rows = [(f"{image}.png", f"caption {number} of {image}") for image, n in enumerate(COUNTS) for number in range(n)]
    random.Random(0).shuffle(rows)
    return written(painted(tmp_path), rows)


def one(table: Any, **options: Any) -> Captions:
    return opened(table, **{"captions": ONE, **options})


def test_an_epoch_has_each_image_once_and_no_caption_again_before_all_of_its_image_were_used(table: Path) -> None:
    source = chosen_pairs(open_source(str(table)), "one", "all")
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
    data = one(Numbers(36), val=Numbers(3), batch_size=12)
    assert data.steps_per_epoch == 1
    epochs = [dict(*epoch_of(data, epoch)) for epoch in range(3)]
    assert all(len(each) == 12 for each in epochs)
    assert len({caption for each in epochs for caption in each.values()}) == 36


@pytest.mark.parametrize(
    ("captions", "world", "workers"),
    [
        *[(ONE, 1, 2), (ONE, 2, 2), (ONE, 3, 0), (TOGETHER, 2, 2), (TOGETHER, 3, 0)],
        *[pytest.param(ONE, *case, marks=pytest.mark.slow) for case in ((1, 0), (2, 0), (3, 2))],  # starts of workers
    ],
)
def test_any_ranks_and_workers_share_the_batches_of_one_process(
    captions: CaptionOptions, world: int, workers: int, table: Path
) -> None:
    options: dict[str, Any] = {"val": str(table), "captions": captions}
    alone = opened(table, batch_size=6, **options)
    data = opened(table, batch_size=6 // world, num_workers=workers, **options)
    for epoch in (0, 4):
        shared = shared_by([data] * world, epoch)
        assert shared == shared_by([alone], epoch)
        assert len({key for batch in shared for key, _ in batch}) == len(COUNTS)
    trainer: Any = type("Trainer", (), {"datamodule": data})()
    assert captions is ONE or even_batches(trainer, negatives=False) is None  # counts are exchanged


def test_validation_has_all_captions_and_a_divided_table_keeps_images_apart(table: Path) -> None:
    data = one(table, val=str(table))
    assert sum(len(batch.keys) for batch in data.val_dataloader()) == sum(COUNTS)
    data = one(table)
    assert isinstance(data.train_source, OneOfEach)
    assert data.val_source is not None
    train, val = ({each.key(row) for row in range(len(each))} for each in (data.train_source, data.val_source))
    assert train.isdisjoint(val)
    assert len(train) == data.train_source.pairs_per_epoch
    rest = sum(count for image, count in enumerate(COUNTS) if f"{image}.png" in val)
    assert len(data.val_source) == rest


def run_of(table: Path, folder: Path, captions: CaptionOptions = ONE, **options: Any) -> Run:
    folder.mkdir(exist_ok=True)
    if captions is TOGETHER:
        options["model"] = {"loss": Contrastive("positives"), **options.get("model", {})}
    options["data"] = {"captions": captions, "batch_size": 4, **options.get("data", {})}
    return Run(str(folder), str(table), **options)


# Whole batches resume in the same way, and those of another order do in test_batch_order.
@pytest.mark.parametrize("micro_batch", [pytest.param(None, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("captions", [ONE, TOGETHER])
def test_a_run_resumed_within_an_epoch_continues_bit_for_bit(
    captions: CaptionOptions, micro_batch: int | None, table: Path, tmp_path: Path
) -> None:
    augmentation = [] if captions is ONE else Augmentation((0.3, 1.0))
    options: dict[str, Any] = {"model": {"micro_batch_size": micro_batch}, "data": {"augmentation": augmentation}}
    monitor = TrainingMonitor()
    refused = rf"data\.captions\.per_image '{captions.per_image}' there and None here"
    run = run_of(table, tmp_path / "run", captions, **options)
    whole = assert_resumes(run, 4, {"batch_size": 4, "augmentation": []}, refused, monitor)
    assert len(whole.samples) == 2 * 3
    assert monitor.state_dict()["samples_seen"] == 2 * (len(COUNTS) if captions is ONE else sum(COUNTS))


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
    data = one(parts, val=str(table), batch_size=24)
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
    data = one(table, val=str(table), keep=str(tmp_path / "scores.parquet"), batch_size=1)
    images = {key for key, _ in kept}
    assert data.steps_per_epoch == len(images)
    epochs = [{pair for batch in epoch_of(data, epoch) for pair in batch} for epoch in range(EPOCHS)]
    assert set().union(*epochs) == kept
    assert all({key for key, _ in drawn} == images for drawn in epochs)
    plain = one(table, val=str(table), keep=str(tmp_path / "scores.parquet"), captions=None)
    assert data.train_source is not None
    assert plain.train_source is not None
    assert digest_of_kept(data.train_source) == digest_of_kept(plain.train_source) != ""


def test_data_without_several_captions_of_an_image_are_refused_in_one_line(table: Path, tmp_path: Path) -> None:
    listed, single = tmp_path / "listed.jsonl", tmp_path / "single.csv"
    listed.write_text("\n".join(f'{{"image": "{image}.png", "caption": ["a", "b"]}}' for image in range(12)))
    written(single, [(f"{image}.png", f"only {image}") for image in range(12)])
    shards = write_shards(tmp_path / "shards")
    for data, captions, why in (
        *[
            (data, ONE, "one would change nothing: each image of .* is in one row, of whose")
            for data in (listed, shards)
        ],
        *[(data, TOGETHER, "together would change nothing: no image of") for data in (single, shards)],
    ):
        with pytest.raises(InputError, match=rf"^data\.captions\.per_image: {why}"):
            opened(data, val=str(table), captions=captions)
    with pytest.raises(InputError, match=r"^data\.captions\.per_image: 'first' must be 'all', 'one' or"):
        CaptionOptions(per_image="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"^data\.images\.per_thing: two reads one caption"):
        opened(table, val=str(table), captions=TOGETHER, images=ImageOptions("two"))


# All captions of an image in one step

TEXTS = [1, 2, 3, 7, 5, 5, 2, 1, 5, 3, 4, 1]  # captions of the images
OF = {f"{image}.png": [f"caption {n} of {image}" for n in range(count)] for image, count in enumerate(TEXTS)}


@pytest.fixture
def by_number(tmp_path: Path) -> Path:
    """Twelve images with one to seven captions each, a row for each caption, the images' first captions first."""
    rows = [(image, captions[n]) for n in range(max(TEXTS)) for image, captions in OF.items() if n < len(captions)]
    return written(painted(tmp_path), rows)


def together(table: Any, **options: Any) -> Captions:
    return opened(table, **{"captions": TOGETHER, **options})


def captions_of(batches: Sequence[CaptionBatch]) -> list[tuple[str, list[str]]]:
    """Return the key and the captions of each image; what a batch says of an image must agree."""
    found = []
    for batch in batches:
        assert batch.image_of is not None
        for image in range(len(batch.images)):
            pairs = (batch.image_of == image).nonzero()[:, 0].tolist()
            assert len({batch.keys[pair] for pair in pairs}) == 1
            found.append((batch.keys[pairs[0]], [batch.captions[pair] for pair in pairs]))
        assert len(batch.tokens) == len(batch.lengths) == len(batch.image_of) == batch.pairs
    assert sum(len(texts) for _, texts in found) == sum(batch.pairs for batch in batches)
    return found


def test_an_epoch_has_each_image_once_with_the_captions_of_all_its_rows(by_number: Path) -> None:
    data = together(by_number, val=str(by_number))
    assert data.steps_per_epoch == 3
    epochs = [captions_of(batches_of(data, epoch)) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(OF.items()) for epoch in epochs)
    assert len({tuple(key for key, _ in epoch) for epoch in epochs}) == 3
    assert sum(batch.pairs for batch in data.val_dataloader()) == sum(TEXTS)


def test_an_image_in_several_rows_and_in_one_row_with_a_list_give_the_same_batches(
    by_number: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"image": image, "caption": captions}) for image, captions in OF.items()]
    (tmp_path / "lists.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wide = [(image, *captions, *[""] * (7 - len(captions))) for image, captions in OF.items()]
    with (tmp_path / "wide.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", *(f"caption_{n}" for n in range(7))), *wide])
    augmented: dict[str, Any] = {"augmentation": Augmentation((0.3, 0.8)), "val": str(by_number)}
    expected = [batches_of(together(by_number, **augmented), epoch) for epoch in range(2)]
    for other in (tmp_path / "lists.jsonl", tmp_path / "wide.csv"):
        for epoch, batches in enumerate(expected):
            for ours, theirs in zip(batches_of(together(other, **augmented), epoch), batches, strict=True):
                assert (ours.keys, ours.captions) == (theirs.keys, theirs.captions)
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.tokens, theirs.tokens)


def test_each_caption_keeps_its_rows_group_weight_and_negative_and_copies_count_once(by_number: Path) -> None:
    rows = [
        *(
            ("0.png", "a dog", "g1", 2, "a cat"),
            ("0.png", "a dog", "g1", 5, "a cow"),
            ("0.png", "an animal", "", 1, ""),
        ),
        *(("1.png", "a pear", "", 3, ""), ("1.png", "fruit", "g2", 4, "a nut")),
    ]
    path = written(by_number.with_name("columns.csv"), rows, ["image", "caption", "kind", "score", "wrong"])
    columns = Columns(group="kind", weight="score", negative="wrong")
    (batch,) = batches_of(together(path, val=str(path), batch_size=2, columns=columns), 0)
    found = zip(batch.captions, batch.groups, batch.extra["weight"].tolist(), batch.negatives, batch.keys, strict=True)
    assert sorted(found) == [
        ("a dog", "g1", 2.0, "a cat", "0.png"),
        ("a pear", "", 3.0, "", "1.png"),
        ("an animal", "", 1.0, "", "0.png"),
        ("fruit", "g2", 4.0, "a nut", "1.png"),
    ]
    assert batch.negative_tokens is not None
    assert len(batch.negative_tokens) == 2


class Own(CustomPairs):
    """Rows of three images, each with two captions of its own."""

    def __len__(self) -> int:
        return 6

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index // 2 * 50, 0, 0))

    def captions(self, index: int) -> list[str]:
        return [f"{index} a", f"{index} b"]

    def key(self, index: int) -> str:
        return f"image {index // 2}"


def test_rows_of_a_source_of_ones_own_with_several_captions_each_join_them_all() -> None:
    data = together(Own(), val=Own(), batch_size=3)
    expected = [(f"image {i}", [f"{row} {x}" for row in (2 * i, 2 * i + 1) for x in "ab"]) for i in range(3)]
    assert sorted(captions_of(batches_of(data, 0))) == expected
    assert data.captions_per_image == 4


def test_the_plan_counts_images_each_with_its_captions(by_number: Path, tiny_config: CLIPConfig) -> None:
    of_run = trainer(datamodule=together(by_number, val=str(by_number)), num_devices=1, num_nodes=1)
    rows = dict(plan_rows(measure_run(LitCLIP(tiny_config), of_run)))
    assert rows["images per step"] == "4, each with all of its 3.2 captions on average"
    assert rows["steps"] == "12, 3 per epoch"


def test_parts_of_a_mixture_behave_alike_and_kept_pairs_are_joined(by_number: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    parts = [{"data": str(by_number), "weight": 1}, {"data": str(shards), "weight": 1}]
    data = together(parts, val=str(by_number), batch_size=2)
    drawn = dict(captions_of(batches_of(data, 0)))
    assert {key: texts for key, texts in drawn.items() if key.startswith("0:")}.items() <= {
        (f"0:{key}"): texts for key, texts in OF.items()
    }.items()
    assert any(key.startswith("1:") for key in drawn)
    kept = write(
        together(by_number, val=str(by_number), captions=None).train_source, str(tmp_path / "scores.parquet"), 0.6
    )
    data = together(by_number, val=str(by_number), keep=str(tmp_path / "scores.parquet"), batch_size=1)
    found = {(key, caption) for key, texts in captions_of(batches_of(data, 0)) for caption in texts}
    assert found == kept


def test_long_captions_are_each_cut_into_sentences_and_no_batch_shares_a_caption(
    by_number: Path, tmp_path: Path
) -> None:
    long = "One two three four five six seven eight nine ten. " * 12
    rows = [(f"{i}.png", text) for i in range(12) for text in (f"{long}End {i}.", "the same" if i < 4 else f"own {i}")]
    path = written(tmp_path / "long.csv", rows)
    sentences = CaptionOptions("sentences", "together")
    data = together(path, val=str(by_number), captions=sentences, batches=BatchOptions("avoided"), batch_size=3)
    batches = batches_of(data, 0)
    assert all(sum(caption == "the same" for caption in batch.captions) <= 1 for batch in batches)
    found = dict(captions_of(batches))
    assert all(len(texts) == 2 and texts[0].endswith(".") and len(texts[0]) < len(long) for texts in found.values())


def test_a_bad_image_is_skipped_with_all_of_its_captions(by_number: Path) -> None:
    by_number.with_name("3.png").write_bytes(b"no image")
    data = together(by_number, val=str(by_number), bad_samples=BadSamples("skip", 1.0), batch_size=12)
    (batch,) = batches_of(data, 0)
    assert dict(captions_of([batch])) == {key: texts for key, texts in OF.items() if key != "3.png"}
    assert len(batch.skipped) == 1


@pytest.mark.parametrize(
    "freeze",
    [*(pytest.param(each, marks=pytest.mark.slow) for each in ("unlock_last 0", "text")), "unlock_last 1", "image"],
)
def test_stored_features_train_as_images_and_all_their_captions_do(
    freeze: str, by_number: Path, tmp_path: Path
) -> None:
    model = {"loss": Sum([Contrastive("positives"), Distillation()])}
    run = run_of(by_number, tmp_path / "run", TOGETHER, freeze=freeze, model=model)
    plain, _ = fit(run)
    model["loss"] = Sum([Contrastive("positives"), Distillation()])
    stored, _ = fit(run._replace(cache=str(tmp_path / "cache"), model=model))
    assert stored.samples == plain.samples
    assert stored.decoded == (freeze == "text")
    assert stored.losses == pytest.approx(plain.losses, rel=1e-5)


def test_an_image_has_one_stored_version_in_a_step_and_other_modes_do_not_read_it(
    by_number: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    run = run_of(by_number, tmp_path / "run", TOGETHER, epochs=1, data={"augmentation": Augmentation((0.3, 1.0))})
    plain, _ = fit(run)
    stored, _ = fit(run._replace(cache=cache, augmentations=1))
    assert stored.losses == pytest.approx(plain.losses, rel=1e-5)
    fit(run._replace(cache=cache, augmentations=1, data={**run.data, "captions": None}))
    assert len(list(Path(cache).glob("image-*"))) == 2


@pytest.mark.parametrize("loss", [None, Contrastive(), WeightedContrastive()])
def test_captions_of_an_image_that_would_be_wrong_for_it_are_refused(
    loss: Any, by_number: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"model\.loss\.duplicates: negatives .* set it to positives"):
        fit(run_of(by_number, tmp_path / "run", TOGETHER, model={"loss": loss}))
