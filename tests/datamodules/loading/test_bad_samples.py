"""Images and captions that cannot be used: refused with their row, or skipped, counted, listed and limited."""

import csv
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from callbacks.skipped_samples import Tally
from datamodules import Augmentation, Captions
from datamodules.loading.augmentation import RandomSquareCrop, TrainingTransform
from datamodules.loading.bad_samples import BadSamples, SkippingDataset, check_caption
from lit_clip.batch import JUDGED_AFTER, CaptionBatch
from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import MAX_PIXELS, MOST_ELONGATED, decoding_at_least, open_image
from tests.conftest import ROOT, TINY_YAML, run_lightning_ranks
from tests.fuzz.driver import Driver
from tests.fuzz.inputs import Input, mutated
from tests.fuzz.samples import encoded, image, whole_images
from tests.fuzz.targets.stores import whole_sources

Cli = Callable[..., subprocess.CompletedProcess[str]]
SMALL = Preprocessing(image_size=32)
ROWS = 160


def broken_images() -> dict[str, tuple[bytes, str]]:
    """File name -> content of an unusable image, and the reason that it is counted under."""
    whole = whole_images()
    bomb = bytearray(whole["rgb.bmp"])
    bomb[18:26] = (20_000).to_bytes(4, "little") * 2  # width and height
    return {
        "empty.jpg": (b"", "not an image"),
        "text.jpg": (b"<html>404 Not Found</html>", "not an image"),
        "cut.jpg": (whole["rgb.jpg"][:900], "broken image"),
        "cut.png": (whole["rgb.png"][: len(whole["rgb.png"]) // 2], "broken image"),
        "bomb.bmp": (bytes(bomb), "image too large"),
        "thread.png": (encoded(Image.new("L", (MOST_ELONGATED + 1, 1)), "PNG"), "broken image"),
        "drawn.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n", "not an image"),
    }


@pytest.mark.parametrize("name", list(broken_images()))
def test_broken_image_raises_with_its_row_and_reason(name: str, tmp_path: Path) -> None:
    data, reason = broken_images()[name]
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, io.BytesIO(data)):
        with pytest.raises(BadSample, match=r"^t.csv row 7: ") as error:
            open_image(source, "t.csv row 7")
        assert (error.value.where, error.value.reason) == ("t.csv row 7", reason)
        assert "\n" not in str(error.value)
    assert MAX_PIXELS < 20_000**2


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe"])
def test_path_without_a_regular_file_is_a_missing_image(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":  # reading it would block for ever
        os.mkfifo(path)
    with pytest.raises(BadSample, match=re.escape(str(path))) as error:
        open_image(path, "t.csv row 2")
    assert error.value.reason == "missing image"


@pytest.mark.parametrize("name", [name for name in whole_images() if name != "float.tif"])
def test_every_image_format_gives_the_pixels_that_published_models_saw(name: str) -> None:
    """CMYK, palettes, animations: first frame, resized, then converted to RGB; EXIF rotation ignored.

    Of 16-bit grey levels, which published models saw clipped, the highest 8 bits.
    """
    data = whole_images()[name]
    stored = Image.open(io.BytesIO(data))
    deep = name.startswith("sixteen")
    expected = pixels(SMALL)(Image.fromarray((np.asarray(stored) // 256).astype(np.uint8)) if deep else stored)
    assert torch.equal(pixels(SMALL)(open_image(io.BytesIO(data), "")), expected)
    augmented = TrainingTransform(Augmentation(), SMALL)(open_image(io.BytesIO(data), ""))
    assert (augmented.dtype, tuple(augmented.shape)) == (torch.uint8, (3, 32, 32))
    crop = RandomSquareCrop((1.0, 1.0), exact=True, size=32, interpolation="bicubic")
    middle = crop.transform(open_image(io.BytesIO(data), ""), {"side": 1.0, "x": 0.5, "y": 0.5}).convert("RGB")
    if not name.startswith(("palette", "bits", "fax", "animated.gif")):  # resized by nearest pixel
        assert (torch.from_numpy(np.asarray(middle).copy()).permute(2, 0, 1).float() - expected).abs().mean() < 3


@pytest.mark.parametrize("caption", [None, math.nan, "", " \t\n", "NaN", "null", "N/A", 7, ["a"], "a \ud800 cat"])
def test_missing_or_invalid_caption_is_refused(caption: object) -> None:
    with pytest.raises(BadSample, match=r"^row 3: ") as error:
        check_caption(caption, "row 3")
    assert error.value.reason in ("no caption", "caption is not text")


@pytest.mark.parametrize("caption", ["a cat", "x" * 100_000, "猫", "not none", "0"])
def test_caption_of_any_length_or_script_is_unchanged(caption: str) -> None:
    assert check_caption(caption, "row 3") == caption


def test_bad_sample_error_survives_pickling_and_reraising_from_a_data_worker() -> None:
    error = BadSample("t.csv row 7", "broken image", "cannot read it")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.where, again.reason) == ("t.csv row 7: cannot read it", "t.csv row 7", "broken image")
    assert str(BadSample("Caught BadSample in worker 0.")) == "Caught BadSample in worker 0."  # as data loaders do


class Refused(Dataset[str]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> str:
        try:
            raise OSError("a cause")
        except OSError as error:
            raise InputError(f"t.csv row {row}: what: is\nwrong") from error


def test_an_input_error_of_a_data_worker_is_its_one_line() -> None:
    with pytest.raises(InputError) as error:
        list(DataLoader(Refused(), num_workers=1, multiprocessing_context="fork"))
    assert str(error.value) == "t.csv row 0: what: is wrong"


def test_a_skipped_sample_keeps_nothing_of_what_was_read() -> None:
    class Broken(Refused):
        def __getitem__(self, row: int) -> str:
            try:
                return super().__getitem__(row)
            except InputError as error:
                raise BadSample("t.csv row 0", "broken image", "cannot be read") from error

    error = SkippingDataset(Broken())[0]
    assert str(error) == "t.csv row 0: cannot be read"
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


# Draft decoding


def photo_like(width: int = 1280, height: int = 960) -> Image.Image:
    """Image of smooth shapes and fine noise, like a photograph."""
    return image(3, width // 8, height // 8).resize((width, height), Image.Resampling.BICUBIC)


def test_small_image_is_decoded_at_full_size() -> None:
    data = encoded(photo_like(400, 300), "JPEG")
    with decoding_at_least(RandomSquareCrop((0.9, 1.0), size=224).least_size):
        assert open_image(io.BytesIO(data), "").size == (400, 300)
    with decoding_at_least(RandomSquareCrop((0.01, 1.0), size=32).least_size):  # a crop may be 30 pixels wide
        assert open_image(io.BytesIO(data), "").size == (400, 300)
    with decoding_at_least(RandomSquareCrop((0.5, 1.0), size=32).least_size):
        assert open_image(io.BytesIO(data), "").size == (100, 75)


# Batches


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A table of 160 rows, and where -> reason of the five that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    for i in range(ROWS):
        image(i, 40, 36).save(folder / f"{i}.png")
    bad = {}
    for row, (name, (data, reason)) in zip((3, 50, 51, 120), broken_images().items(), strict=False):
        (folder / f"{row}.png").write_bytes(data)
        bad[f"captions.csv row {row + 2}"] = reason
        assert name
    (folder / "77.png").unlink()
    bad["captions.csv row 79"] = "missing image"
    lines = [f"{i}.png,{'long ' * 20_000 if i == 9 else f'noise {i}'}" for i in range(ROWS)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    return folder / "captions.csv", {str(folder / where): reason for where, reason in bad.items()}


def batches_of(table: Path, workers: int = 0, **options: Any) -> tuple[list[CaptionBatch], list[CaptionBatch]]:
    data = Captions(str(table), str(table), batch_size=8, num_workers=workers, **options)
    data.preprocessing = SMALL
    data.setup("fit")
    return list(data.train_dataloader()), list(data.val_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_samples_shrink_their_batch_and_are_listed(table: tuple[Path, dict[str, str]], workers: int) -> None:
    path, bad = table
    for batches in batches_of(path, workers, bad_samples=BadSamples("skip")):
        assert {where: reason for batch in batches for where, reason in batch.skipped} == bad
        keys = [key for batch in batches for key in batch.keys]
        assert sorted(keys) == sorted(f"{i}.png" for i in set(range(ROWS)) - {3, 50, 51, 120, 77})
        for batch in batches:
            sizes = {len(batch.images), len(batch.tokens), len(batch.keys), len(batch.captions)}
            assert sizes == {8 - len(batch.skipped)}


def test_batch_of_only_bad_samples_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{i}.png,a\n" for i in range(8)))
    for (batch,) in batches_of(tmp_path / "a.csv", bad_samples=BadSamples("skip")):
        assert (tuple(batch.images.shape), batch.images.dtype) == ((0, 3, 32, 32), torch.uint8)
        assert (len(batch.tokens), batch.keys, len(batch.skipped)) == (0, [], 8)


def test_bad_image_is_an_error_by_default(table: tuple[Path, dict[str, str]]) -> None:
    path, bad = table
    with pytest.raises(InputError) as error:
        batches_of(path)
    assert any(str(error.value).startswith(f"{where}: ") for where in bad)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_error": "ignore"}, "on_error: 'ignore' must be 'error' or 'skip'"),
        ({"max_skipped": 5}, "max_skipped: 5 must be between 0 and 1"),
    ],
)
def test_invalid_policy_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BadSamples(**options)


def test_stretched_batch_repeats_its_last_pair() -> None:
    images, tokens = torch.arange(6).reshape(2, 3, 1, 1), torch.arange(4).reshape(2, 2)
    batch = CaptionBatch(images, tokens, ["a", "b"], ["A", "B"], skipped=[("c", "broken image")])
    more = batch.stretched(4)
    assert more.keys == ["a", "b", "b", "b"]
    assert more.captions == ["A", "B", "B", "B"]
    assert torch.equal(more.images, images[[0, 1, 1, 1]])
    assert torch.equal(more.tokens, tokens[[0, 1, 1, 1]])
    assert batch.stretched(2) is batch
    assert [part.keys for part in more.split(3)] == [["a"], ["b"], ["b", "b"]]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_no_part_of_a_stretched_thing_of_several_images_lacks_images_or_texts(parts: int) -> None:
    images, tokens = torch.arange(15).reshape(5, 3, 1, 1), torch.arange(2).reshape(1, 2)
    thing = CaptionBatch(images, tokens, ["a"], ["A"], image_of=torch.arange(5).reshape(1, 5))
    found = thing.stretched(parts).split(parts)
    assert len(found) == parts
    assert all(len(part.images) and len(part.tokens) == len(part.captions) > 0 for part in found)
    encoded = torch.cat([part.images for part in found])
    assert torch.equal(encoded[:5], images)
    assert thing.stretched(1) is thing


# Counting


def tally_of(drawn: int, skipped: int) -> Tally:
    tally = Tally()
    tally.add(
        CaptionBatch(torch.zeros(drawn - skipped, 0), torch.zeros(0), [], skipped=[("x", "not an image")] * skipped)
    )
    tally.join()
    return tally


@pytest.mark.parametrize(
    ("drawn", "skipped", "at_end", "expected"),
    [
        (99, 98, False, False),
        (99, 98, True, False),
        (100, 5, False, False),
        (100, 6, False, True),
        (1000, 50, True, False),
        (3, 3, False, False),
        (3, 3, True, True),
        (0, 0, True, False),
    ],
)
def test_limit_applies_from_a_hundred_samples_or_when_all_were_skipped(
    drawn: int, skipped: int, at_end: bool, expected: bool
) -> None:
    assert JUDGED_AFTER == 100
    assert tally_of(drawn, skipped).too_many(0.05, at_end) is expected


def test_skip_reasons_become_metric_names() -> None:
    assert tally_of(10, 2).metrics("data/skipped") == {"data/skipped": 2.0, "data/skipped_not_an_image": 2.0}


# Runs of the command


def fit(table: Path, devices: int, *more: str) -> list[str]:
    return [
        "fit",
        *("--data", "datamodules.Captions", "--data.train", str(table), "--data.val", str(table)),
        *("--data.num_workers", "1", "--data.batch_size", "4", "--model.architecture", TINY_YAML),
        *("--trainer.accelerator", "cpu", "--trainer.devices", str(devices), "--trainer.max_epochs", "1"),
        *("--trainer.strategy", "auto" if devices == 1 else "ddp", "--trainer.log_every_n_steps", "4"),
        *("--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0"),
        *("--trainer.logger", "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}"),
        *more,
    ]


def test_two_processes_sum_their_skipped_samples_and_list_each_once(
    table: tuple[Path, dict[str, str]], cli: Cli, tmp_path: Path
) -> None:
    path, bad = table
    result = cli(*fit(path, 2, "--data.bad_samples.on_error", "skip"), timeout=180)
    assert result.returncode == 0, result.stderr
    assert "5 of 160 samples (3.1%) could not be used" in result.stderr
    (listed,) = tmp_path.rglob("skipped.jsonl")
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {line["where"]: line["reason"] for line in lines} == bad
    assert len(lines) == len(bad)  # once, though validation skipped them too
    with (listed.parent / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0] if "skipped" in name}
    reasons = {f"data/skipped_{reason.replace(' ', '_')}" for reason in bad.values()}
    assert counts.keys() == {"data/skipped", "data/val_skipped"} | reasons | {
        name.replace("skipped", "val_skipped", 1) for name in reasons
    }
    assert counts["data/skipped"] == sorted(counts["data/skipped"])
    assert counts["data/skipped"][-1] == 5  # the last step, the twentieth, is logged
    assert counts["data/val_skipped"] == [5]


def test_bad_sample_ends_a_run_of_several_processes_with_one_line(table: tuple[Path, dict[str, str]], cli: Cli) -> None:
    path, _ = table
    (path.parent / "one.csv").write_text(
        "image,caption\n" + "".join(f"{i}.png,a\n" for i in range(40) if i != 3) + "77.png,a\n"
    )
    result = cli(*fit(path.parent / "one.csv", 2), timeout=120)
    assert result.returncode == 2, result.stderr
    assert re.search(
        r"lit-clip: error: \S+one.csv row 41: no such image file: .*77.png; a path starts at", result.stderr
    ), result.stderr
    assert "Traceback" not in result.stderr


def test_too_many_skipped_samples_end_the_run_on_all_processes(
    table: tuple[Path, dict[str, str]], cli: Cli, tmp_path: Path
) -> None:
    path, _ = table
    options = ("--data.bad_samples.on_error", "skip", "--data.bad_samples.max_skipped", "0.02")
    result = cli(*fit(path, 2, *options), timeout=120)
    assert result.returncode == 2, result.stderr
    assert re.search(
        r"error: \d of 1\d\d samples \(\d.\d%\) could not be used: .* raise data.bad_samples.max", result.stderr
    )
    assert list(tmp_path.rglob("skipped.jsonl"))


# Batches without pairs


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "positives": {"duplicates": "positives"},
    "parts": {"micro_batch_size": 3, "checkpointed": True, "duplicates": "ignored"},
    "sharded": {"micro_batch_size": 3, "strategy": "fsdp"},
    "batch_norm": {"batch_norm": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train each case on two ranks, some of whose batches have no pairs, and on one rank with all pairs."""
    folder = tmp_path_factory.mktemp("no_pairs")
    for world in (1, 2):
        jobs = [
            {"output": str(folder / f"{case}_{world}.ckpt"), "world": world, "strategy": "ddp", **options}
            for case, options in CASES.items()
            if world == 2 or case != "batch_norm"
        ]
        jobs = [job | ({"strategy": "auto"} if world == 1 else {}) for job in jobs]
        run_lightning_ranks(world, folder, str(ROOT / "tests/helpers/ranks_skipped.py"), "train_all", json.dumps(jobs))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("case", [case for case in CASES if case != "batch_norm"])
def test_ranks_without_pairs_train_like_one_process_with_all_pairs(case: str, runs: Path) -> None:
    """Also for a step without pairs on any rank: it is counted and does not change the weights."""
    single, both = (torch.load(runs / f"{case}_{world}.ckpt", weights_only=True) for world in (1, 2))
    assert single["global_step"] == both["global_step"] == 5
    torch.testing.assert_close(both["state_dict"], single["state_dict"], rtol=0, atol=1e-5)
    metrics = [json.loads((runs / f"{case}_{world}.json").read_text()) for world in (1, 2)]
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-5)


def test_placeholder_images_do_not_change_batch_norm_statistics(runs: Path) -> None:
    state = torch.load(runs / "batch_norm_2.ckpt", weights_only=True)["state_dict"]
    counts = {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert counts == {3}  # rank 0, whose statistics are kept, had pairs in three of five steps
    assert all(value.isfinite().all() for value in state.values())


# Damaged files


DAMAGED = {"images": whole_images(), "sources": whole_sources()}


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("images", 100),
        ("sources", 50),
        pytest.param("images", 2000, marks=pytest.mark.slow),
        pytest.param("sources", 500, marks=pytest.mark.slow),
    ],
)
def test_damaged_files_are_refused_or_skipped_without_other_errors(target: str, count: int) -> None:
    """The files are damaged in the same way with any version of hypothesis."""
    whole, driver = DAMAGED[target], Driver()
    inputs = []
    for number in range(count):
        rng = random.Random(f"1 {number}")
        name = rng.choice(list(whole))
        inputs.append(Input(name, mutated(whole[name], list(whole.values()), rng)))
    driver.batch(f"tests/fuzz/targets/{'pairs' if target == 'images' else 'stores'}.py:{target}", 0, 900, count, inputs)
    assert not driver.summary.found, driver.summary.found
    (outcomes,) = driver.summary.outcomes.values()
    assert outcomes["used"] > count // 4
    assert outcomes["skipped"] + outcomes["refused"] > count // 4
