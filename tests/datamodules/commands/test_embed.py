"""``lit-clip embed`` writes the features of a plain loop, on any number of ranks, interrupted or not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.parts import Arrays, Parts
from lit_clip.embedding.reading import EncoderBatch
from lit_clip.errors import InputError
from lit_clip.models.config import VisionTransformerConfig
from lit_clip.models.fingerprint import fingerprint
from tests.conftest import lit_clip_command
from tests.helpers.encoding import changed_copy, watch_encoding

IMAGES = ["a.png", "b.jpg", "deep/c.png", "deep/d.webp", "deep/er/e.png", "f.PNG", "g.bmp"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working directory; its folder ``photos`` has seven noise images and two files to ignore."""
    noise = np.random.default_rng(0)
    for name in IMAGES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = noise.integers(20, 60, 2)
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos/notes.txt").write_text("no image")
    (tmp_path / "photos/.hidden.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def embed(*words: str) -> None:
    run_command(["embed", *words, "--num_workers", "0", "--accelerator", "cpu"])


def read(path: str) -> tuple[list[str], np.ndarray]:
    """Return the keys and features in an output file."""
    if path.endswith(".npy"):
        return json.loads(Path(path).with_suffix(".keys.json").read_text())["keys"], np.load(path)
    table = pq.read_table(path)
    return table["key"].to_pylist(), np.array(table["feature"].to_pylist(), dtype=np.float32)


@torch.no_grad()
def one_by_one(checkpoint: Path, keys: list[str]) -> np.ndarray:
    model = load_model(checkpoint)
    rows = [model.encode_image(model.preprocess(Image.open(key))[None])[0] for key in keys]
    return torch.stack([row / row.norm() for row in rows]).numpy()


@pytest.mark.parametrize(
    ("output", "batch_size"), [("features.npy", "1"), ("features.parquet", "3"), ("features.npy", "64")]
)
def test_features_equal_those_of_a_plain_loop(
    folder: Path, tiny_checkpoint: Path, output: str, batch_size: str
) -> None:
    embed("photos", "--model", str(tiny_checkpoint), "--output", output, "--batch_size", batch_size)
    keys, features = read(output)
    assert keys == sorted(f"photos/{name}" for name in IMAGES)
    assert features.dtype == np.float32
    assert np.abs(features - one_by_one(tiny_checkpoint, keys)).max() < 1e-5
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert not list(folder.glob(".*"))


def test_an_image_given_twice_has_one_row(folder: Path, tiny_checkpoint: Path) -> None:
    words = ["photos/g.bmp", "photos", "./photos/a.png", str(folder / "photos/deep")]
    embed(*words, "--model", str(tiny_checkpoint), "--output", "features.npy")
    keys, features = read("features.npy")
    assert len(keys) == len(set(keys)) == len(features) == len(IMAGES)
    assert {os.path.abspath(key) for key in keys} == {str(folder / "photos" / name) for name in IMAGES}


def test_parquet_metadata_identifies_the_model(folder: Path, tiny_checkpoint: Path) -> None:
    embed("photos", "--model", str(tiny_checkpoint), "--output", "features.parquet")
    schema = pq.read_schema("features.parquet")
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    assert metadata["model"] == str(tiny_checkpoint)
    assert metadata["model_sha256"] == fingerprint(load_model(tiny_checkpoint)).model
    assert str(schema.field("feature").type).startswith("fixed_size_list<")
    assert "float" in str(schema.field("feature").type)


def test_an_image_that_one_of_two_ranks_cannot_read_is_a_one_line_error(folder: Path, tiny_checkpoint: Path) -> None:
    (folder / "photos/deep/c.png").write_text("junk")
    options = ["--model", str(tiny_checkpoint), "--output", "features.npy", "--batch_size", "2"]
    options += ["--devices", "2", "--accelerator", "cpu", "--num_workers", "0"]
    result = lit_clip_command(folder, "embed", "photos", *options)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "error" in line.lower()] == [
        "lit-clip: error: photos/deep/c.png: cannot read this image (not an image); "
        "fix or remove it, or set --on_error skip"
    ]
    assert "Traceback" not in result.stderr
    assert not (folder / "features.npy").exists()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """A function that records the keys encoded from then on, and simulates Ctrl-C at the given batch."""

    def watch(interrupt_at: int | None) -> list[str]:
        keys, batches = list[str](), iter(range(1000))

        def see(task: EncodingTask, batch: EncoderBatch) -> None:
            if next(batches) == interrupt_at:
                raise KeyboardInterrupt
            keys.extend(task.identities[row][0] for row in batch.rows)

        watch_encoding(monkeypatch, see)
        return keys

    return watch


def test_images_changed_since_the_interruption_are_encoded_again(
    folder: Path, tiny_checkpoint: Path, encoded: Callable[[int | None], list[str]]
) -> None:
    options = ["photos", "--model", str(tiny_checkpoint), "--batch_size", "2", "--output", "features.npy"]
    encoded(2)
    with pytest.raises(KeyboardInterrupt):
        embed(*options)
    Image.new("RGB", (30, 30), "red").save(folder / "photos/b.jpg")
    (folder / "photos/deep/d.webp").unlink()
    keys = encoded(None)
    embed(*options)
    assert keys == ["photos/b.jpg", "photos/deep/er/e.png", "photos/f.PNG", "photos/g.bmp"]
    written, features = read("features.npy")
    assert "photos/deep/d.webp" not in written
    assert np.abs(features - one_by_one(tiny_checkpoint, written)).max() < 1e-5


@pytest.mark.parametrize("other", [["--model", "other.ckpt"], ["--precision", "bf16-mixed"]])
def test_another_model_or_precision_does_not_resume_from_the_features_of_the_first(
    folder: Path, tiny_checkpoint: Path, encoded: Any, capsys: pytest.CaptureFixture[str], other: list[str]
) -> None:
    changed_copy(tiny_checkpoint, "other.ckpt", "visual.proj")
    options = ["photos", "--model", str(tiny_checkpoint), "--batch_size", "2"]
    embed(*options, *other, "--output", "whole.npy")
    encoded(2)
    with pytest.raises(KeyboardInterrupt):
        embed(*options, "--output", "features.npy")
    keys = encoded(None)
    embed(*options, *other, "--output", "features.npy")
    assert len(keys) == len(IMAGES)
    assert "another model, data, precision" in capsys.readouterr().err
    assert (folder / "features.npy").read_bytes() == (folder / "whole.npy").read_bytes()


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The cosine of each row with the same row of the other, in float64."""
    unit = [
        rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1)[:, None] for rows in (ours, theirs)
    ]
    return (unit[0] * unit[1]).sum(axis=1)


@pytest.mark.parametrize("source", [["photos"], ["--texts", "captions.txt"]], ids=["images", "texts"])
def test_features_in_bfloat16_are_float32_unit_vectors_near_the_exact_ones(
    folder: Path, tiny_checkpoint: Path, source: list[str]
) -> None:
    Path("captions.txt").write_text("a red kite\ntwo dogs asleep\n", encoding="utf-8")
    options = [*source, "--model", str(tiny_checkpoint)]
    embed(*options, "--output", "exact.npy")
    embed(*options, "--output", "half.npy", "--precision", "bf16-mixed")
    (keys, exact), (same, half) = read("exact.npy"), read("half.npy")
    assert keys == same
    assert half.dtype == np.float32
    assert np.allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    distances = 1 - cosines(half, exact)
    assert (distances > 1e-9).all()  # float32 would be at 1e-14, rounding apart
    assert distances.max() < 1e-2
    assert json.loads(Path("half.keys.json").read_text())["precision"] == "bf16-mixed"


def test_bad_images_are_an_error_or_are_counted_and_listed(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos/b.jpg").write_bytes((folder / "photos/b.jpg").read_bytes()[:300])
    (folder / "photos/h.png").symlink_to(folder / "nowhere.png")
    options = ["photos", "--model", str(tiny_checkpoint), "--output", "features.npy"]
    with pytest.raises(InputError, match=r"photos/b.jpg: cannot read this image \(.*; fix or remove it"):
        embed(*options)
    assert not (folder / "features.npy").exists()
    embed(*options, "--on_error", "skip")
    keys, features = read("features.npy")
    assert keys == sorted(f"photos/{name}" for name in IMAGES if name != "b.jpg")
    assert np.abs(features - one_by_one(tiny_checkpoint, keys)).max() < 1e-5
    assert "skipped 2 that could not be read" in capsys.readouterr().err
    listed = (folder / "features.npy.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["photos/b.jpg", "photos/h.png"]
    assert "no such image file" in listed[1]
    for name in ("b.jpg", "h.png"):
        (folder / "photos" / name).unlink()
    embed(*options)
    assert not (folder / "features.npy.skipped.txt").exists()  # that was the previous run's


@torch.no_grad()
def test_each_distinct_line_of_a_text_file_is_embedded(folder: Path, tiny_checkpoint: Path) -> None:
    text = "a red kite\n\n two dogs asleep \na red kite\nÄpfel\n"
    Path("captions.txt").write_text(text, encoding="utf-8-sig")  # with a byte order mark, as Windows editors write it
    embed("--texts", "captions.txt", "--model", str(tiny_checkpoint), "--output", "texts.npy")
    keys, features = read("texts.npy")
    assert keys == ["a red kite", "two dogs asleep", "Äpfel"]
    model = load_model(tiny_checkpoint)
    for key, feature in zip(keys, features, strict=True):
        expected = model.encode_text(model.tokenize(key))[0]
        assert np.abs(feature - (expected / expected.norm()).numpy()).max() < 1e-5


def test_a_file_name_that_is_not_unicode_is_refused_for_parquet_before_encoding(
    folder: Path, tiny_checkpoint: Path
) -> None:
    try:
        (folder / "photos/a.png").rename(folder / "photos" / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("names are Unicode on this file system")
    with pytest.raises(InputError, match=r"features.parquet: the file name .* is not Unicode; rename"):
        embed("photos", "--model", str(tiny_checkpoint), "--output", "features.parquet")
    assert not (folder / ".features.parquet.parts").exists()


def test_the_fingerprint_depends_on_the_architecture_and_not_only_on_the_weights(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    first = fingerprint(model)
    assert first == fingerprint(load_model(tiny_checkpoint))
    image = model.config.image
    assert isinstance(image, VisionTransformerConfig)
    image.heads *= 2  # each half as wide: the same weights, other features
    assert fingerprint(model) != first


def test_parts_removed_by_another_run_with_the_same_output_are_an_error(
    folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Parts.add

    def late(parts: Parts, arrays: Arrays, first: int) -> None:
        shutil.rmtree(parts.folder)  # as the other run does once it is complete
        add(parts, arrays, first)
        shutil.rmtree(parts.folder)

    monkeypatch.setattr(Parts, "add", late)
    with pytest.raises(InputError, match="another run with the same output has ended meanwhile; run this one again"):
        embed("photos", "--model", str(tiny_checkpoint), "--output", "features.npy")


def test_a_full_disk_leaves_the_earlier_file_unchanged(
    folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("features.npy").write_text("the earlier one")

    def full(file: object, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"features.npy: cannot be written \(No space left on device\)"):
        embed("photos", "--model", str(tiny_checkpoint), "--output", "features.npy")
    assert Path("features.npy").read_text() == "the earlier one"
    assert sorted(path.name for path in folder.iterdir()) == [".features.npy.parts", "features.npy", "photos"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--output", "features.csv"], r"--output features.csv: must be a \.parquet or \.npy file"),
        (["photos", "--output", "absent/features.npy"], r"--output absent/features.npy: there is no folder absent"),
        (["--output", "features.npy"], "either images or --texts"),
        (["photos", "--texts", "captions.txt", "--output", "features.npy"], "either images or --texts"),
        (["--texts", "captions.txt", "--output", "features.npy"], "--texts: captions.txt: there is no such file"),
        (["empty", "--output", "features.npy"], "empty: no images in this folder or below"),
        (["absent", "--output", "features.npy"], "absent: no such file or folder"),
        (["photos", "--output", "features.npy", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["photos", "--output", "features.npy", "--devices", "0"], "devices"),
        (["photos", "--output", "features.npy", "--precision", "16-mixed"], "--precision 16-mixed: needs a GPU"),
        (["photos", "--output", "features.npy", "--precision", "bf16-true"], "precision: wants .* or bf16-mixed, not"),
    ],
)
def test_invalid_arguments_are_named_in_a_one_line_error(
    folder: Path, tiny_checkpoint: Path, words: list[str], message: str
) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(Exception, match=message) as raised:
        embed(*words, "--model", str(tiny_checkpoint))
    assert "\n" not in str(raised.value).strip()
    assert not list(folder.glob("features*"))
