"""12 bits in files of 16: with a window a model learns what is in them, the same in every way in and out."""

import csv
import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.optim import AdamW

from datamodules import Captions, CustomPairs
from datamodules.loading.augmentation import Augmentation
from datamodules.shards.writing import _image_file
from lit_clip import CLIP, LitCLIP, load_model
from lit_clip.cli.main import main
from lit_clip.commands.demo_trial import image_of
from lit_clip.commands.export import export
from lit_clip.embedding.image_files import FileRows, image_file
from lit_clip.embedding.reading import ImageBatches
from lit_clip.errors import BadSample, InputError
from lit_clip.losses import Contrastive
from lit_clip.models.config import (
    CLIPConfig,
    ImageConfig,
    Preprocessing,
    ResNetConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
)
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import open_image
from lit_clip.tools.levels import Window
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.exports import checkpoint
from tests.helpers.small_sets import QUIET

SIDES, SIZE = ("left", "right"), 32


def tiny(window: Window | None = None, image: ImageConfig = ResNetConfig((1, 1, 1, 1), 4, SIZE)) -> CLIPConfig:  # noqa: B008
    text = TextTransformerConfig(8, width=32, layers=1, heads=2)
    return CLIPConfig(32, image, text, preprocessing=Preprocessing(SIZE, window=window))


def scan(number: int) -> np.ndarray:
    """12 bits: noise, with a bright blob at the left (even numbers) or at the right."""
    rng = np.random.default_rng(number)
    levels = rng.normal(1000, 60, (40, 40))
    row, column = int(rng.integers(4, 24)), int(rng.integers(2, 6)) + 20 * (number % 2)
    levels[row : row + 12, column : column + 12] += 2800
    return levels.clip(0, 4095).astype(np.uint16)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 scans with the captions left and right, and 60 to validate on."""
    folder = tmp_path_factory.mktemp("scans")
    for table, numbers in (("train.csv", range(200)), ("val.csv", range(200, 260))):
        for number in numbers:
            Image.fromarray(scan(number)).save(folder / f"{number}.{'png' if number % 4 < 2 else 'tif'}")
        rows = [f"{number}.{'png' if number % 4 < 2 else 'tif'},{SIDES[number % 2]}" for number in numbers]
        (folder / table).write_text("\n".join(["image,caption", *rows]) + "\n")
    return folder


def fitted(scans: Path, window: Any, epochs: int) -> tuple[LitCLIP, Trainer]:
    data = Captions(
        str(scans / "train.csv"),
        str(scans / "val.csv"),
        batch_size=20,
        num_workers=0,
        seed=0,
        augmentation=Augmentation(crop_scale=(0.9, 1.0)),
        window=window,
    )
    torch.manual_seed(0)
    loss = Contrastive(duplicates="positives")
    schedule = partial(WarmupCosine, warmup_steps=1)
    module = LitCLIP(tiny(), loss=loss, optimizer=partial(AdamW, lr=3e-3), lr_scheduler=schedule)
    trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, limit_val_batches=0, **QUIET)
    trainer.fit(module, data)
    return module, trainer


def share_right(model: CLIP, scans: Path) -> float:
    files = [next(scans.glob(f"{number}.*")) for number in range(200, 260)]
    found = model.similarity(files, list(SIDES)).argmax(dim=1)
    return float((found == torch.arange(60) % 2).float().mean())


@pytest.fixture(scope="module")
def trained(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit with a window and save the checkpoint."""
    module, trainer = fitted(scans, [0, 4095], 6)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trainer.save_checkpoint(path)
    assert module.model.preprocessing.window == [0, 4095]
    return path


def windowed(levels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale levels to 8 bits in float64, without anything of the package."""
    share = np.clip((levels.astype(np.float64) - low) / (high - low), 0, 1)
    return np.floor(255 * share + 0.5).astype(np.uint8)


def test_with_the_window_a_model_learns_where_the_blob_is(trained: Path, scans: Path) -> None:
    """Also without one, from the highest 8 bits of these scans: what a window changes are the pixels below."""
    assert share_right(load_model(trained), scans) > 0.9


def test_every_way_in_has_the_pixels_of_the_window(trained: Path, scans: Path) -> None:
    """Files, PIL images, contents, the demo's upload, and rows of commands; of training without augmentation."""
    model, path = load_model(trained), scans / "200.png"
    plain = Image.fromarray(windowed(scan(200), 0, 4095)).convert("RGB")
    expected = pixels(Preprocessing(SIZE))(plain)
    normalised = model.normalize(expected[None])[0]
    assert torch.equal(model.preprocess(Image.open(path)), normalised)
    assert torch.equal(model.preprocess(open_image(path)), normalised)
    assert torch.equal(model.preprocess(image_of(io.BytesIO(path.read_bytes()))), normalised)
    (batch,) = ImageBatches(FileRows([image_file("a", path)]), [[0]], model.preprocessing)
    assert batch.inputs is not None
    assert torch.equal(batch.inputs[0], expected)
    (scans / "one.csv").write_text("image,caption\n200.png,left\n")
    data = Captions(*[str(scans / "one.csv")] * 2, num_workers=0, augmentation=[], window=[0, 4095])
    data.preprocessing = Preprocessing(SIZE)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert torch.equal(next(iter(loader)).images[0], expected)
    whole = model.encode_image(normalised[None], normalize=True)[0]
    assert torch.allclose(model.encode(path), whole, atol=1e-6)


def test_a_checkpoint_and_its_export_embed_the_same(trained: Path, scans: Path, tmp_path: Path, capsys: Any) -> None:
    files = [next(scans.glob(f"{number}.*")) for number in range(200, 204)]
    expected = load_model(trained).encode(files)
    assert torch.allclose(LitCLIP.load_from_checkpoint(trained).model.encode(files), expected, atol=1e-6)
    export(str(trained), output=str(tmp_path / "folder"), format="open_clip")
    said = capsys.readouterr().out
    assert "open_clip has no window of grey levels: scale them by [0.0, 4095.0] to 8 bits before" in said
    assert json.loads((tmp_path / "folder/open_clip_config.json").read_text())["preprocess_cfg"]["window"] == [0, 4095]
    assert torch.allclose(load_model(tmp_path / "folder").encode(files), expected, atol=1e-6)


def test_an_export_to_transformers_keeps_a_window_of_percentiles(tmp_path: Path) -> None:
    model = checkpoint(tiny({"percentiles": [1, 99]}, VisionTransformerConfig(SIZE, 16, 64, 1, 1)), tmp_path / "a.ckpt")
    export(str(tmp_path / "a.ckpt"), output=str(tmp_path / "folder"), format="hugging_face")
    there = load_model(tmp_path / "folder")
    assert there.preprocessing.window == {"percentiles": [1, 99]}
    assert torch.allclose(there.encode(Image.fromarray(scan(0))), model.encode(Image.fromarray(scan(0))), atol=1e-5)


def test_without_a_window_fit_and_preprocess_say_that_the_levels_are_dark(
    scans: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fitted(scans, None, 0)
    (line,) = (record.message for record in caplog.records if record.message.startswith("images: "))
    assert "have more than 8 bits a level" in line
    assert "dark" in line
    assert "data.window" in line
    model = CLIP(tiny())
    with pytest.warns(UserWarning, match="highest 8 are read.*preprocessing.window") as warned:
        model.preprocess(Image.open(scans / "200.png"))
    assert warned[0].filename == __file__
    model.preprocessing.window = [0, 4095]
    model.preprocess(Image.open(scans / "200.png"))  # warnings are errors in tests


def test_with_a_window_fit_says_nothing_of_the_levels(scans: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fitted(scans, [0, 4095], 0)
    assert not [record for record in caplog.records if record.message.startswith("images: ")]


KINDS = {  # levels as in a file, and the largest of the file's bits
    "uint16 png": (scan(0), "a.png"),
    "uint16 tif": (scan(0), "a.tif"),
    "int32 tif": (scan(0).astype(np.int32) - 1000, "a.tif"),
    "float32 tif": ((scan(0) / 4095).astype(np.float32), "a.tif"),
}
WINDOWS: list[tuple[Any, Callable[[np.ndarray], tuple[float, float]]]] = [
    ([0.25, 0.9], lambda _: (0.25, 0.9)),
    ([-1000, 3000], lambda _: (-1000, 3000)),
    ({"percentiles": [1, 99]}, lambda levels: (np.percentile(levels, 1), np.percentile(levels, 99))),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "ends"), WINDOWS)
def test_levels_of_every_kind_are_scaled_as_by_numpy(kind: str, window: Any, ends: Any, tmp_path: Path) -> None:
    """To one level of 255: the package computes in float32 what float32 holds."""
    levels, name = KINDS[kind]
    Image.fromarray(levels).save(tmp_path / name)
    found = pixels(Preprocessing(40, window=window))(Image.open(tmp_path / name))
    expected = windowed(levels, *ends(levels.astype(np.float64)))
    assert np.abs(found.numpy().astype(int) - expected.astype(int)).max() <= 1
    assert (found[0].numpy() == expected).mean() > 0.99


def test_bit_depth_is_the_range_of_the_files_bits_and_8_bits_stay() -> None:
    deep = Image.fromarray(scan(0) * 16)
    found = pixels(Preprocessing(40, window="bit_depth"))(deep)
    assert np.array_equal(found[0].numpy(), scan(0) // 16)
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK"):
        shallow = Image.fromarray(windowed(scan(0), 0, 4095)).convert(mode)
        plain = pixels(Preprocessing(SIZE))(shallow)
        windows: tuple[Window, ...] = ([0, 4095], {"percentiles": [1, 99]}, "bit_depth")
        for window in windows:
            assert torch.equal(pixels(Preprocessing(SIZE, window=window))(shallow), plain)


def test_levels_that_are_equal_everywhere_or_no_numbers_do_not_end_a_run() -> None:
    for levels in (np.full((40, 40), 7.5, np.float32), np.full((40, 40), np.nan, np.float32)):
        assert pixels(Preprocessing(40, window={"percentiles": [1, 99]}))(Image.fromarray(levels)).max() == 0


def test_floats_without_a_window_are_a_bad_sample_of_their_row(tmp_path: Path) -> None:
    Image.fromarray(scan(0).astype(np.float32)).save(tmp_path / "a.tif")
    (tmp_path / "t.csv").write_text("image,caption\na.tif,left\n")
    data = Captions(*[str(tmp_path / "t.csv")] * 2, num_workers=0)
    data.setup("fit")
    with pytest.raises(BadSample, match="t.csv row 2.*data.window") as refused:
        next(iter(data.train_dataloader()))
    assert refused.value.reason == "levels without a range"


class Own(CustomPairs):
    """Floats from Python."""

    def __len__(self) -> int:
        return 2

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(scan(index).astype(np.float32))

    def captions(self, index: int) -> list[str]:
        return [SIDES[index]]


def test_a_source_of_ones_own_may_give_floats() -> None:
    data = Captions(Own(), Own(), num_workers=0, window={"percentiles": [1, 99]})
    data.preprocessing = Preprocessing(40)
    data.setup("fit")
    images = next(iter(data.val_dataloader())).images
    assert images.min() == 0
    assert images.max() == 255


def test_a_run_resumes_only_with_its_window(trained: Path, scans: Path) -> None:
    module, data = LitCLIP(tiny()), Captions(val=str(scans / "val.csv"), num_workers=0)
    with pytest.raises(InputError, match=r"window \[0.0, 4095.0\], not null; set data.window"):
        Trainer(**QUIET).validate(module, data, ckpt_path=trained, weights_only=True, verbose=False)


def test_a_run_that_starts_from_a_checkpoint_has_its_window(trained: Path, scans: Path) -> None:
    module = LitCLIP(pretrained=trained)
    data = Captions(val=str(scans / "val.csv"), num_workers=0)
    Trainer(**QUIET).validate(module, data, verbose=False)
    assert data.preprocessing.window == [0, 4095]


def test_embed_and_classify_read_with_the_checkpoints_window(
    trained: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(200, 204):
        Image.fromarray(scan(number)).save(tmp_path / f"photos/{number}.png")
    monkeypatch.chdir(tmp_path)
    model = ["photos", "--model", str(trained), "--num_workers", "0"]
    for words in (
        ["classify", *model, "--classes", "left", "right", "--templates", "{}", "--output_file", "out.csv"],
        ["embed", *model, "--output", "out.parquet"],
    ):
        monkeypatch.setattr(sys, "argv", ["lit-clip", *words])
        main()
    rows = csv.DictReader((tmp_path / "out.csv").open())
    assert [row["class"] for row in rows if row["rank"] == "1"] == ["left", "right"] * 2
    features = pq.read_table(tmp_path / "out.parquet")
    expected = load_model(trained).encode([tmp_path / f"photos/{number}.png" for number in range(200, 204)])
    assert np.allclose(np.stack(features["feature"].to_numpy()), expected.numpy(), atol=1e-5)


def test_shards_keep_deep_levels(scans: Path, tmp_path: Path) -> None:
    source = Captions(val=str(scans / "val.csv")).sources(fit=False)[1]
    for row in range(4):  # PNG and TIFF
        pair = source.read(row)
        assert _image_file(pair, 16)[1:] == (pair.image, {})
