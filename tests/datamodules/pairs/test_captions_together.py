"""All captions of an image in one step, by plain tables: over epochs, ranks, formats, resumes and stored features."""

import csv
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from callbacks import TrainingMonitor
from datamodules import Augmentation, BadSamples, BatchOptions, CaptionOptions, Captions, Columns, CustomPairs
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Sum, WeightedContrastive
from lit_clip.models.config import Preprocessing
from lit_clip.training.even_batches import even_batches
from lit_clip.training.teacher import Distillation
from tests.conftest import TINY_YAML
from tests.datamodules.pairs.test_kept import write
from tests.helpers.frozen_runs import Run, fit
from tests.helpers.tar_shards import write_shards

TOGETHER = CaptionOptions(per_image="together")
COUNTS = [1, 2, 3, 7, 5, 5, 2, 1, 5, 3, 4, 1]  # captions of the images
OF = {f"{image}.png": [f"caption {n} of {image}" for n in range(count)] for image, count in enumerate(COUNTS)}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve images with one to seven captions each, a row for each caption, the images' first captions first."""
    for image in range(len(COUNTS)):
        Image.effect_noise((32, 32), 20 + 15 * image).convert("RGB").save(tmp_path / f"{image}.png")
    rows = [(image, captions[n]) for n in range(max(COUNTS)) for image, captions in OF.items() if n < len(captions)]
    return written(tmp_path / "captions.csv", rows)


def written(path: Path, rows: Sequence[Sequence[Any]], *names: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption", *names), *rows])
    return path


def opened(table: Any, **options: Any) -> Captions:
    train = str(table) if isinstance(table, Path) else table
    settings = {"batch_size": 4, "num_workers": 0, "captions": TOGETHER, "augmentation": [], **options}
    data = Captions(train, **settings)
    data.preprocessing = Preprocessing(image_size=8)
    data.setup("fit")
    return data


def epoch_of(data: Captions, epoch: int, rank: int = 0, world: int = 1) -> list[CaptionBatch]:
    data._rank_and_world = lambda: (rank, world)  # pyright: ignore[reportAttributeAccessIssue]
    loader: Any = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


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


def test_an_epoch_has_each_image_once_with_the_captions_of_all_its_rows(table: Path) -> None:
    data = opened(table, val=str(table))
    assert data.steps_per_epoch == 3
    epochs = [captions_of(epoch_of(data, epoch)) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(OF.items()) for epoch in epochs)
    assert len({tuple(key for key, _ in epoch) for epoch in epochs}) == 3
    assert sum(batch.pairs for batch in data.val_dataloader()) == sum(COUNTS)


def test_an_image_in_several_rows_and_in_one_row_with_a_list_give_the_same_batches(table: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"image": image, "caption": captions}) for image, captions in OF.items()]
    (tmp_path / "lists.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wide = [(image, *captions, *[""] * (7 - len(captions))) for image, captions in OF.items()]
    with (tmp_path / "wide.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", *(f"caption_{n}" for n in range(7))), *wide])
    augmented: dict[str, Any] = {"augmentation": Augmentation((0.3, 0.8)), "val": str(table)}
    expected = [epoch_of(opened(table, **augmented), epoch) for epoch in range(2)]
    for other in (tmp_path / "lists.jsonl", tmp_path / "wide.csv"):
        for epoch, batches in enumerate(expected):
            for ours, theirs in zip(epoch_of(opened(other, **augmented), epoch), batches, strict=True):
                assert (ours.keys, ours.captions) == (theirs.keys, theirs.captions)
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize(("world", "workers"), [(2, 2), (3, 0)])
def test_any_ranks_and_workers_share_the_images_of_one_process(world: int, workers: int, table: Path) -> None:
    alone = opened(table, val=str(table), batch_size=6)
    data = opened(table, val=str(table), batch_size=6 // world, num_workers=workers)
    ranks = [[captions_of([batch]) for batch in epoch_of(data, 4, rank, world)] for rank in range(world)]
    shared = [sorted(image for batch in batches for image in batch) for batches in zip(*ranks, strict=True)]
    assert shared == [sorted(captions_of([batch])) for batch in epoch_of(alone, 4)]
    trainer = type("Trainer", (), {"datamodule": data})
    assert even_batches(trainer(), negatives=False) is None  # pyright: ignore[reportArgumentType]  # counts are exchanged


def test_each_caption_keeps_its_rows_group_weight_and_negative_and_copies_count_once(table: Path) -> None:
    rows = [
        *(
            ("0.png", "a dog", "g1", 2, "a cat"),
            ("0.png", "a dog", "g1", 5, "a cow"),
            ("0.png", "an animal", "", 1, ""),
        ),
        *(("1.png", "a pear", "", 3, ""), ("1.png", "fruit", "g2", 4, "a nut")),
    ]
    path = written(table.with_name("columns.csv"), rows, "kind", "score", "wrong")
    columns = Columns(group="kind", weight="score", negative="wrong")
    (batch,) = epoch_of(opened(path, val=str(path), batch_size=2, columns=columns), 0)
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
    data = opened(Own(), val=Own(), batch_size=3)
    expected = [(f"image {i}", [f"{row} {x}" for row in (2 * i, 2 * i + 1) for x in "ab"]) for i in range(3)]
    assert sorted(captions_of(epoch_of(data, 0))) == expected
    assert data.captions_per_image == 4


def test_parts_of_a_mixture_behave_alike_and_kept_pairs_are_joined(table: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    parts = [{"data": str(table), "weight": 1}, {"data": str(shards), "weight": 1}]
    data = opened(parts, val=str(table), batch_size=2)
    drawn = dict(captions_of(epoch_of(data, 0)))
    assert {key: texts for key, texts in drawn.items() if key.startswith("0:")}.items() <= {
        (f"0:{key}"): texts for key, texts in OF.items()
    }.items()
    assert any(key.startswith("1:") for key in drawn)
    kept = write(opened(table, val=str(table), captions=None).train_source, str(tmp_path / "scores.parquet"), 0.6)
    data = opened(table, val=str(table), keep=str(tmp_path / "scores.parquet"), batch_size=1)
    found = {(key, caption) for key, texts in captions_of(epoch_of(data, 0)) for caption in texts}
    assert found == kept


def test_long_captions_are_each_cut_into_sentences_and_no_batch_shares_a_caption(table: Path, tmp_path: Path) -> None:
    long = "One two three four five six seven eight nine ten. " * 12
    rows = [(f"{i}.png", text) for i in range(12) for text in (f"{long}End {i}.", "the same" if i < 4 else f"own {i}")]
    path = written(tmp_path / "long.csv", rows)
    sentences = CaptionOptions("sentences", "together")
    data = opened(path, val=str(table), captions=sentences, batches=BatchOptions("avoided"), batch_size=3)
    batches = epoch_of(data, 0)
    assert all(sum(caption == "the same" for caption in batch.captions) <= 1 for batch in batches)
    found = dict(captions_of(batches))
    assert all(len(texts) == 2 and texts[0].endswith(".") and len(texts[0]) < len(long) for texts in found.values())


def test_a_bad_image_is_skipped_with_all_of_its_captions(table: Path) -> None:
    table.with_name("3.png").write_bytes(b"no image")
    data = opened(table, val=str(table), bad_samples=BadSamples("skip", 1.0), batch_size=12)
    (batch,) = epoch_of(data, 0)
    assert dict(captions_of([batch])) == {key: texts for key, texts in OF.items() if key != "3.png"}
    assert len(batch.skipped) == 1


def run_of(table: Path, folder: Path, **options: Any) -> Run:
    folder.mkdir(exist_ok=True)
    options["model"] = {"loss": Contrastive("positives"), **options.get("model", {})}
    options["data"] = {"captions": TOGETHER, "batch_size": 4, **options.get("data", {})}
    return Run(str(folder), str(table), **options)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_run_resumed_within_an_epoch_continues_bit_for_bit(
    micro_batch: int | None, table: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model": {"micro_batch_size": micro_batch},
        "data": {"augmentation": Augmentation((0.3, 1.0))},
    }
    monitor = TrainingMonitor()
    whole, module = fit(run_of(table, tmp_path / "whole", **options), monitor)
    assert len(whole.samples) == 2 * 3
    assert monitor.state_dict()["samples_seen"] == 2 * sum(COUNTS)
    stopped = run_of(table, tmp_path / "stopped", **options, stop_at=4)
    first, _ = fit(stopped)
    second, resumed = fit(stopped._replace(stop_at=None, resume=True))
    assert first.samples + second.samples == whole.samples
    assert first.losses + second.losses == whole.losses
    weights = resumed.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(weights[name], value), name
    other = stopped._replace(stop_at=None, resume=True, data={"batch_size": 4, "augmentation": []})
    with pytest.raises(InputError, match=r"data\.captions\.per_image 'together' there and None here"):
        fit(other)


@pytest.mark.parametrize("freeze", ["unlock_last 0", "unlock_last 1", "image", "text"])
def test_stored_features_train_as_images_and_captions_do(freeze: str, table: Path, tmp_path: Path) -> None:
    model = {"loss": Sum([Contrastive("positives"), Distillation()])}
    run = run_of(table, tmp_path / "run", freeze=freeze, model=model)
    plain, _ = fit(run)
    model["loss"] = Sum([Contrastive("positives"), Distillation()])
    stored, _ = fit(run._replace(cache=str(tmp_path / "cache"), model=model))
    assert stored.samples == plain.samples
    assert stored.decoded == (freeze == "text")
    assert stored.losses == pytest.approx(plain.losses, rel=1e-5)


def test_an_image_has_one_stored_version_in_a_step_and_other_modes_do_not_read_it(table: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    run = run_of(table, tmp_path / "run", epochs=1, data={"augmentation": Augmentation((0.3, 1.0))})
    plain, _ = fit(run)
    stored, _ = fit(run._replace(cache=cache, augmentations=1))
    assert stored.losses == pytest.approx(plain.losses, rel=1e-5)
    fit(run._replace(cache=cache, augmentations=1, data={**run.data, "captions": None}))
    assert len(list(Path(cache).glob("image-*"))) == 2


@pytest.mark.parametrize("loss", [None, Contrastive(), WeightedContrastive()])
def test_captions_of_an_image_that_would_be_wrong_for_it_are_refused(loss: Any, table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.loss\.duplicates: negatives .* set it to positives"):
        fit(run_of(table, tmp_path / "run", model={"loss": loss}))


def test_what_it_does_not_fit_is_refused_in_one_line(table: Path, tmp_path: Path) -> None:
    single = written(tmp_path / "single.csv", [(f"{image}.png", f"only {image}") for image in range(12)])
    for data in (single, write_shards(tmp_path / "shards")):
        with pytest.raises(InputError, match=r"^data\.captions\.per_image: together would change nothing: no image of"):
            opened(data, val=str(table))
    with pytest.raises(InputError, match=r"^data\.columns\.other_image: .* set it to one"):
        opened(table, val=str(table), columns=Columns(other_image="image"))


def test_the_plan_counts_images_and_shares_their_cost_among_captions(
    cli: Callable[..., subprocess.CompletedProcess[str]], table: Path
) -> None:
    words = ["fit", "--data", "datamodules.Captions", "--data.train", str(table), "--data.val", str(table)]
    words += [
        "--data.batch_size",
        "4",
        "--model.architecture",
        TINY_YAML,
        "--print_plan",
        "--model.loss",
        "Contrastive",
    ]
    words += ["--model.loss.duplicates", "positives"]
    all_rows = " ".join(cli(*words).stdout.replace("│", " ").split())
    together = " ".join(cli(*words, "--data.captions.per_image", "together").stdout.replace("│", " ").split())
    assert "9 per epoch" in all_rows
    assert "3 per epoch" in together
    assert "images per step 4, each with all of its 3.2 captions on average" in together
