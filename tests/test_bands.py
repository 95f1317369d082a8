"""Images of any number of bands, ``.npy`` and TIFF: learned, kept in the checkpoint, and read alike in every way in."""

import csv
import dataclasses
import io
import json
import sys
import tarfile
import tracemalloc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import AdamW
from torchvision.transforms import v2

from callbacks import EmbeddingProjector, SimilarityMatrix, ZeroShot, ZeroShotSet
from datamodules import Captions, CustomPairs
from datamodules.evaluation.image_files import images_in as images_of_set
from datamodules.evaluation.own_classes import ImageFolderClasses
from datamodules.loading.augmentation import Augmentation, TrainingTransform
from datamodules.loading.bad_samples import BadSamples
from datamodules.pairs.folder import FolderPairs
from datamodules.shards.pairs import TarPairs
from lit_clip import CLIP, LitCLIP, load_model
from lit_clip.cli.main import main
from lit_clip.commands.demo_trial import image_of
from lit_clip.commands.export import export
from lit_clip.embedding.image_files import FileRows, image_file
from lit_clip.embedding.image_files import images_in as listed_images
from lit_clip.embedding.reading import ImageBatches
from lit_clip.errors import BadSample, InputError
from lit_clip.losses import Contrastive
from lit_clip.models.config import CLIPConfig, Preprocessing, ResNetConfig, TextTransformerConfig, TimmConfig
from lit_clip.models.external_config import CustomImageConfig
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import image_for_model
from lit_clip.tools.levels import Window
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.small_sets import QUIET
from tests.helpers.tar_shards import write_tar

NAMES, SIZE = ("water", "forest"), 32


def config(bands: int, window: Window | None = None, image: Any = None) -> CLIPConfig:
    image = image or TimmConfig("test_resnet", image_size=SIZE)
    text = TextTransformerConfig(8, width=32, layers=1, heads=2)
    mean, std = (0.4, 0.5, 0.6, 0.3, 0.2)[:bands], (0.2, 0.3, 0.2, 0.25, 0.1)[:bands]
    return CLIPConfig(32, image, text, preprocessing=Preprocessing(SIZE, mean=mean, std=std, window=window))


def scene(number: int) -> np.ndarray:
    """uint8 ``[40, 48, 4]``: the same noise in three bands, and a fourth that is dark (even numbers) or bright."""
    rng = np.random.default_rng(number)
    values = rng.normal(120, 30, (40, 48, 4))
    values[..., 3] = rng.normal(60 + 120 * (number % 2), 20, (40, 48))
    return values.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 scenes to train on and 40 to validate on, with all four bands and with the first three."""
    folder = tmp_path_factory.mktemp("scenes")
    for bands in (3, 4):
        (folder / str(bands)).mkdir()
        for table, numbers in (("train", range(160)), ("val", range(160, 200))):
            for number in numbers:
                np.save(folder / f"{bands}/{number}.npy", scene(number)[..., :bands])
            rows = [f"{bands}/{number}.npy,{NAMES[number % 2]}" for number in numbers]
            (folder / f"{table}{bands}.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    return folder


def fitted(scenes: Path, bands: int) -> tuple[LitCLIP, Trainer]:
    train, val = (str(scenes / f"{table}{bands}.csv") for table in ("train", "val"))
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    steps = [*Augmentation().transforms(), *flips]
    data = Captions(train, val, batch_size=20, num_workers=0, seed=0, augmentation=steps)
    torch.manual_seed(0)
    schedule = partial(WarmupCosine, warmup_steps=1)
    loss = Contrastive(duplicates="positives")
    module = LitCLIP(config(bands), loss=loss, optimizer=partial(AdamW, lr=3e-3), lr_scheduler=schedule)
    trainer = Trainer(max_epochs=4, num_sanity_val_steps=0, limit_val_batches=0, **QUIET)
    trainer.fit(module, data)
    return module.eval(), trainer


def share_right(model: CLIP, scenes: Path, bands: int) -> float:
    files = [scenes / f"{bands}/{number}.npy" for number in range(160, 200)]
    found = model.similarity(files, list(NAMES)).argmax(dim=1)
    return float((found == torch.arange(40) % 2).float().mean())


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LitCLIP, Path]:
    module, trainer = fitted(scenes, 4)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def test_what_only_the_fourth_band_shows_is_learned(trained: tuple[LitCLIP, Path], scenes: Path) -> None:
    assert share_right(load_model(trained[1]), scenes, 4) > 0.9


@pytest.mark.slow
def test_the_first_three_bands_alone_are_at_chance(scenes: Path) -> None:
    module, _ = fitted(scenes, 3)
    assert 0.25 < share_right(module.model, scenes, 3) < 0.75


def by_numpy(values: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize each band by Pillow and normalise it, without anything of the package."""
    bands = []
    for band, mean, std in zip(np.moveaxis(values, 2, 0), preprocessing.mean, preprocessing.std, strict=True):
        height, width = band.shape
        size = (round(SIZE * width / min(band.shape)), round(SIZE * height / min(band.shape)))
        small = np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BICUBIC), np.float64)
        left, top = round((size[0] - SIZE) / 2), round((size[1] - SIZE) / 2)
        bands.append((small[top : top + SIZE, left : left + SIZE] / 255 - mean) / std)
    return torch.from_numpy(np.stack(bands)).float()


def test_every_way_in_has_the_pixels_of_all_bands(trained: tuple[LitCLIP, Path], scenes: Path) -> None:
    """Arrays, files, contents, the demo's upload, rows of commands, of training and of an own set of classes."""
    model, path = load_model(trained[1]), scenes / "4/160.npy"
    expected = pixels(model.preprocessing)(image_for_model(path))
    normalised = model.normalize(expected[None])[0]
    assert ((normalised - by_numpy(scene(160), model.preprocessing)).abs().amax((1, 2)) < 1.01 / 255 / 0.2).all()
    assert torch.equal(model.preprocess(scene(160)), normalised)
    assert torch.equal(model.preprocess(np.asfortranarray(scene(160))), normalised)
    assert torch.equal(model.preprocess(image_of(io.BytesIO(path.read_bytes()))), normalised)
    (batch,) = ImageBatches(FileRows([image_file("a", path)]), [[0]], model.preprocessing)
    assert batch.inputs is not None
    assert torch.equal(batch.inputs[0], expected)
    (scenes / "one.csv").write_text("image,caption\n4/160.npy,water\n")
    table = str(scenes / "one.csv")
    data = Captions(table, table, num_workers=0, augmentation=[])
    data.preprocessing = model.preprocessing
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert torch.equal(next(iter(loader)).images[0], expected)
    whole = model.encode_image(normalised[None], normalize=True)[0]
    assert torch.allclose(model.encode(str(path)), whole, atol=1e-6)


def test_a_checkpoint_gives_the_features_of_the_training(trained: tuple[LitCLIP, Path], scenes: Path) -> None:
    module, path = trained
    files = [scenes / f"4/{number}.npy" for number in range(160, 164)]
    for model in (load_model(path), LitCLIP.load_from_checkpoint(path).model):
        assert (model.preprocessing.mean, model.preprocessing.std) == ((0.4, 0.5, 0.6, 0.3), (0.2, 0.3, 0.2, 0.25))
        assert torch.allclose(model.encode(files), module.model.encode(files), atol=1e-6)


def test_three_bands_are_the_same_pixels_as_a_png(tmp_path: Path) -> None:
    values = scene(1)[..., :3]
    np.save(tmp_path / "a.npy", values)
    Image.fromarray(values).save(tmp_path / "a.png")
    found, expected = (pixels(Preprocessing(SIZE))(image_for_model(tmp_path / f"a.{kind}")) for kind in ("npy", "png"))
    assert torch.equal(found, expected)
    # Beside a fourth band torch resizes them, in place of Pillow: within one of 255 levels.
    four = pixels(Preprocessing(SIZE, mean=(0.5,) * 4, std=(0.5,) * 4))(_banded(scene(1)))
    assert (four[:3].int() - expected.int()).abs().max() <= 1


def _banded(values: np.ndarray) -> Image.Image:
    file = io.BytesIO()
    np.save(file, values)
    return image_for_model(file, "the array")


@pytest.mark.parametrize("bands", [1, 2, 4, 5])
def test_features_are_those_of_timms_own_model(bands: int) -> None:
    model: Any = CLIP(config(bands)).eval()
    peer: Any = timm.create_model("test_resnet", in_chans=bands, num_classes=0).eval()
    peer.load_state_dict(model.visual.trunk.state_dict())
    values = np.dstack([scene(0), scene(2)])[..., :bands]
    image = model.preprocess(values)[None]
    assert image.shape == (1, bands, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(model.visual.features(image), peer(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bands", [1, 2, 4, 5])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobileone_s0"])
def test_a_file_of_red_green_and_blue_is_adapted_as_timm_adapts_it(name: str, bands: int, tmp_path: Path) -> None:
    """Several first layers too, as in MobileOne."""
    size: dict[str, Any] = {"img_size": SIZE} if name == "test_vit" else {}
    torch.save(timm.create_model(name).state_dict(), tmp_path / "rgb.pth")
    overlay = {"file": str(tmp_path / "rgb.pth")}
    peer = timm.create_model(
        name, pretrained=True, in_chans=bands, num_classes=0, pretrained_cfg_overlay=overlay, **size
    )
    image = TimmConfig(name, image_size=SIZE, pretrained=str(tmp_path / "rgb.pth"))
    trunk = CLIP(config(bands, image=image)).visual.trunk
    assert isinstance(trunk, nn.Module)
    expected = peer.state_dict()
    assert trunk.state_dict().keys() == expected.keys()
    for key, value in trunk.state_dict().items():
        assert torch.equal(value, expected[key]), key
    torch.save(trunk.state_dict(), tmp_path / "own.pth")  # of the model's own bands: as it is
    again = CLIP(config(bands, image=dataclasses.replace(image, pretrained=str(tmp_path / "own.pth")))).visual.trunk
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())  # type: ignore[union-attr]


def test_a_file_of_other_bands_than_the_models_or_three_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", in_chans=2).state_dict(), tmp_path / "two.pth")
    with pytest.raises(
        InputError, match=r"two.pth: .*conv1.0.weight is \(16, 2, 3, 3\) there and \(16, 4, 3, 3\) here"
    ):
        CLIP(config(4, image=TimmConfig("test_resnet", image_size=SIZE, pretrained=str(tmp_path / "two.pth"))))


class Own(nn.Module):
    """An encoder of one's own of any number of bands."""

    image_size = SIZE

    def __init__(self, embed_dim: int, bands: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bands, embed_dim, 8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean((2, 3))


def test_an_encoder_of_ones_own_reads_the_bands_of_the_preprocessing() -> None:
    model = CLIP(config(4, image=CustomImageConfig(Own)))
    assert model.encode_image(model.preprocess(scene(0))[None]).shape == (1, 32)
    with pytest.raises(InputError, match=r"images are \[1, 3, 32, 32\], the model reads \[B, 4, 32, 32\]"):
        model.encode_image(torch.zeros(1, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CLIP(config(4, image=ResNetConfig((1, 1, 1, 1), 4, SIZE))), "mean has 4 bands.*timm"),
        (lambda: Preprocessing(SIZE, mean=(0.5,) * 4), "std: 3 numbers for 4 bands"),
        (lambda: Preprocessing(SIZE, mean=(), std=()), "preprocessing.mean"),
        (lambda: TimmConfig("test_resnet", options={"in_chans": 4}), "in_chans.*preprocessing.mean"),
        (lambda: Preprocessing(mean=(0.5,) * 4, std=(0.5,) * 4, max_patches=4, patch_size=8), "max_patches.*3 bands"),
    ],
)
def test_settings_that_do_not_agree_are_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


KINDS = {"grey": "L", "colours": "RGB", "transparent": "RGBA", "inks": "CMYK", "palette": "P", "bits": "1"}


@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("given", [1, 2, 3, 4, 5, *KINDS])
def test_another_number_of_bands_is_a_bad_sample_that_names_both(given: int | str, bands: int, tmp_path: Path) -> None:
    """But grey is shown to a model of red, green and blue as it is in every program."""
    if isinstance(given, str):
        name = "a.tif" if given == "inks" else "a.png"
        Image.fromarray(scene(0)[..., :3]).convert(KINDS[given]).save(tmp_path / name)
    else:
        name = "a.npy"
        np.save(tmp_path / name, np.dstack([scene(0), scene(2)])[..., :given])
    found = given if isinstance(given, int) else 1 if given in ("grey", "bits") else 3
    read = partial(pixels(config(bands).preprocessing or Preprocessing()), image_for_model(tmp_path / name, "row 3"))
    if found == bands or (found, bands) == (1, 3):
        assert read().shape == (bands, SIZE, SIZE)
    elif given == "inks":
        with pytest.raises(BadSample, match="row 3: cannot read its bands"):
            read()
    else:
        with pytest.raises(BadSample, match=f"row 3: it has {found} bands, the model reads {bands}"):
            read()


def test_in_training_such_a_sample_is_skipped_and_named(scenes: Path) -> None:
    (scenes / "mixed.csv").write_text("image,caption\n4/160.npy,water\n3/160.npy,water\n")
    for policy in ("error", "skip"):
        table = str(scenes / "mixed.csv")
        data = Captions(table, table, num_workers=0, bad_samples=BadSamples(policy))
        data.preprocessing = config(4).preprocessing or Preprocessing()
        data.setup("fit")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            if policy == "skip":
                batch = next(iter(loader))
                assert len(batch.images) == 1
                assert [reason for _, reason in batch.skipped] == ["another number of bands"]
            else:
                with pytest.raises(BadSample, match=r"mixed.csv row 3.*3 bands, the model reads 4"):
                    next(iter(loader))


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(color_jitter=0.1),
        Augmentation(grayscale=0.1),
        [v2.Compose([v2.RandomApply([v2.ColorJitter(0.1)])])],
    ],
)
def test_augmentation_of_colours_is_refused(augmentation: Any) -> None:
    preprocessing = config(4).preprocessing or Preprocessing()
    with pytest.raises(InputError, match="data.augmentation: .*4 bands.*color_jitter and grayscale"):
        TrainingTransform(augmentation, preprocessing)


@pytest.mark.parametrize("scale", [(0.01, 0.02), (1.0, 1.0)])
def test_a_training_crop_is_that_of_an_image_of_colours(scale: tuple[float, float]) -> None:
    """Of the same place, in the first three bands; a large image is averaged by another filter."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)).resize((300, 200)))
    crops = []
    for bands in (3, 4):
        transform = TrainingTransform(Augmentation(crop_scale=scale), config(bands).preprocessing or Preprocessing())
        torch.manual_seed(3)
        crops.append(transform(_banded(smooth[..., :bands]))[:3].int())
    assert (crops[0] - crops[1]).abs().float().mean() < 1


def deep(kind: str) -> np.ndarray:
    return scene(0).astype(np.float64).astype(kind) * (16 if kind == "uint16" else 1)


@pytest.mark.parametrize("kind", ["uint16", "int16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_a_window_scales_each_band(kind: str, bands: int) -> None:
    values = deep(kind)[..., :bands]
    windows: list[tuple[Any, Any]] = [
        ([10, 3000], [(10, 3000)] * bands),
        ({"percentiles": [1, 99]}, [np.percentile(values[..., band], [1, 99]) for band in range(bands)]),
    ]
    for window, ends in windows:
        found = pixels(Preprocessing((40, 48), mean=(0.5,) * bands, std=(0.5,) * bands, window=window))(_banded(values))
        for band, (low, high) in enumerate(ends):
            share = np.clip((values[..., band].astype(np.float64) - low) / (high - low), 0, 1)
            assert np.abs(found[band].numpy() - 255 * share).max() <= 1


def test_sixteen_bits_keep_the_highest_eight_with_a_warning_and_floats_need_a_window() -> None:
    model = CLIP(config(4))
    with pytest.warns(UserWarning, match="highest 8 are read"):
        found = model.preprocess(deep("uint16") * 16)
    assert torch.equal(found, model.preprocess(scene(0)))  # warnings are errors in tests
    with pytest.raises(BadSample, match="data.window"), pytest.warns(UserWarning, match="8 bits"):
        model.preprocess(deep("float32"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((40, 48, 4), bool), "preprocess: .*bool"),
        (np.zeros((2, 40, 48, 4), np.uint8), r"preprocess: .*\[2, 40, 48, 4\]"),
        (np.zeros((4, 40, 48), np.uint8), r"\[height, width, bands\].* 48 bands, the model reads 4"),
        (Image.new("RGBA", (48, 40)), "image without its path.* 3 bands, the model reads 4"),
    ],
)
def test_what_preprocess_cannot_read_is_one_line(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        CLIP(config(4)).preprocess(given)


def test_a_transform_for_other_bands_returns_a_tensor() -> None:
    transform = TrainingTransform([v2.Lambda(lambda bands: "text")], config(4).preprocessing or Preprocessing())
    with pytest.raises(InputError, match=r"must return a tensor \[4, H, W\]"):
        transform(_banded(scene(0)))


tifffile: Any = pytest.importorskip("tifffile")  # the extra tif; scikit-image brings it too
PLANES = {"planarconfig": "separate"}
TIFFS: dict[str, dict[str, Any]] = {
    "16 bits": {"photometric": "minisblack", "planarconfig": "contig"},
    "16 bits in planes": {"photometric": "minisblack", **PLANES},
    "16 bits of pages": {"photometric": "minisblack"},
    "16 bits in tiles, deflated": {"planarconfig": "contig", "compression": "zlib", "tile": (16, 16)},
    "16 bits, predicted": {"planarconfig": "contig", "compression": "zlib", "predictor": True},
    "8 bits": {"photometric": "minisblack", "planarconfig": "contig"},
    "8 bits of colours and one": {"photometric": "rgb", "extrasamples": ["unspecified"]},
    "8 bits of colours and one in planes": {"photometric": "rgb", "extrasamples": ["unspecified"], **PLANES},
    "16 bits of colours and one in planes": {"photometric": "rgb", "extrasamples": ["unspecified"], **PLANES},
    "8 bits of colours and alpha, as GDAL writes them": {"photometric": "rgb", "extrasamples": ["unassalpha"]},
    "8 bits of colours and multiplied alpha": {"photometric": "rgb", "extrasamples": ["assocalpha"]},
    "floats": {"photometric": "minisblack", "planarconfig": "contig"},
}


def tiff(kind: str) -> tuple[bytes, np.ndarray]:
    """Write a file with tifffile; return its content and the numbers in it, ``[H, W, 4]``."""
    options = {"photometric": "minisblack", **TIFFS[kind]}
    values = scene(0) if kind.startswith("8") else deep("float32" if kind == "floats" else "uint16")
    bands_first = "planes" in kind or "pages" in kind
    file = io.BytesIO()
    tifffile.imwrite(file, np.moveaxis(values, 2, 0).copy() if bands_first else values, **options)
    return file.getvalue(), values


@pytest.mark.parametrize("kind", TIFFS)
def test_every_kind_of_tiff_file_has_the_pixels_of_the_array(kind: str, tmp_path: Path) -> None:
    content, values = tiff(kind)
    (tmp_path / "a.tif").write_bytes(content)
    preprocessing = Preprocessing(SIZE, mean=(0.5,) * 4, std=(0.5,) * 4, window=[0, 4095])
    expected = pixels(preprocessing)(_banded(values))
    for source in (tmp_path / "a.tif", io.BytesIO(content)):
        assert torch.equal(pixels(preprocessing)(image_for_model(source, "row 1")), expected)
    if "alpha" not in kind and "pages" not in kind:  # which every program drops: alpha, and pages after the first
        with pytest.raises(BadSample, match="it has 4 bands, the model reads 3"):
            pixels(Preprocessing(SIZE, window=[0, 4095]))(image_for_model(tmp_path / "a.tif"))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("window", [None, [0, 4095]])
def test_sixteen_bit_colours_of_every_tiff_file_have_the_pixels_of_the_array(
    window: Any, planes: str, compression: str | None, tmp_path: Path
) -> None:
    values = deep("uint16")[..., :3]
    stored = values if planes == "contig" else np.moveaxis(values, 2, 0).copy()
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planes, compression=compression)
    expected = np.rint(values / 4095 * 255) if window else values >> 8
    found = pixels(Preprocessing((40, 48), window=window))(image_for_model(tmp_path / "a.tif"))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planes_of_grey_and_alpha_are_two_bands(compression: str | None) -> None:
    values, file = scene(0)[..., :2], io.BytesIO()
    options = {"photometric": "minisblack", "extrasamples": ["unassalpha"], "compression": compression, **PLANES}
    tifffile.imwrite(file, np.moveaxis(values, 2, 0).copy(), **options)
    preprocessing = Preprocessing((40, 48), mean=(0.5,) * 2, std=(0.5,) * 2)
    assert np.array_equal(pixels(preprocessing)(image_for_model(file, "a")).permute(1, 2, 0).numpy(), values)


def test_without_tifffile_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the file is not called broken: all such files would be skipped."""
    unreadable = tiff("16 bits")[0]
    readable = image_for_model(io.BytesIO(tiff("8 bits of colours and alpha, as GDAL writes them")[0]), "row 1")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    preprocessing = Preprocessing(SIZE, mean=(0.5,) * 4, std=(0.5,) * 4)
    for read in (
        lambda: image_for_model(io.BytesIO(unreadable), "row 1"),
        lambda: pixels(preprocessing)(readable),
    ):
        with pytest.raises(InputError, match="pip install tifffile") as refused:
            read()
        assert not isinstance(refused.value, BadSample)


def test_without_imagecodecs_lzw_is_one_line_and_not_a_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    file = io.BytesIO()
    Image.fromarray(scene(0), "RGBA").save(file, "TIFF", compression="tiff_lzw")
    colours = image_for_model(file, "row 1").convert("RGB")  # Pillow reads it
    assert np.array_equal(np.asarray(colours), scene(0)[..., :3])
    preprocessing = Preprocessing(SIZE, mean=(0.5,) * 4, std=(0.5,) * 4)
    for read in (
        lambda: image_for_model(io.BytesIO(claiming("16 bits", 259, 5)), "row 1"),
        lambda: pixels(preprocessing)(image_for_model(file, "row 1")),
    ):
        with pytest.raises(InputError, match="LZW needs imagecodecs: pip install imagecodecs, or write") as refused:
            read()
        assert not isinstance(refused.value, BadSample)


@pytest.mark.parametrize("kind", ["npy", "tif"])
def test_training_pairs_of_shards_are_those_of_a_table(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for number in range(6):
        values = deep("uint16") + number
        rows.append(f"{number}.{kind},{NAMES[number % 2]} {number}")
        if kind == "npy":
            np.save(tmp_path / f"{number}.npy", values)
        else:
            tifffile.imwrite(tmp_path / f"{number}.tif", values, photometric="minisblack", planarconfig="contig")
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    run(["shard", tmp_path / "t.csv", tmp_path / "written", "--shard_size", 4, "--num_workers", 0], monkeypatch)
    # As another program may write them, the caption first.
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        for number in range(6):
            (tmp_path / f"{number}.txt").write_text(f"{NAMES[number % 2]} {number}")
            for name in (f"{number}.txt", f"{number}.{kind}"):
                tar.add(tmp_path / name, arcname=name)
    batches = []
    for source in ("t.csv", "written", "other.tar"):
        pairs = str(tmp_path / source)
        data = Captions(pairs, pairs, batch_size=6, num_workers=0, augmentation=[])
        data.preprocessing = config(4, window=[0, 4095]).preprocessing or Preprocessing()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        order = np.lexsort(batch.tokens.numpy().T)
        batches.append((batch.images[order], batch.tokens[order]))
    images, tokens = batches[0]
    assert images.shape == (6, 4, SIZE, SIZE)
    assert len(images.unique(dim=0)) == len(tokens.unique(dim=0)) == 6
    for others in batches[1:]:
        assert torch.equal(others[0], images)
        assert torch.equal(others[1], tokens)


@pytest.mark.parametrize("kind", ["objects", "10^12 values", "code", "four dimensions"])
def test_a_hostile_array_in_a_shard_is_refused_without_memory(kind: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a", {"npy": HOSTILE[kind](), "txt": b"water"})])
    source = TarPairs(str(tmp_path / "x.tar"))
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match="x.tar sample a: cannot read"):
            source.load(0, None)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", [("npy", "png"), ("png", "npy")])
def test_an_array_beside_an_image_in_a_shard_is_no_image(order: tuple[str, str], tmp_path: Path) -> None:
    """Even twice; but a sample of two arrays alone is ambiguous."""
    photo, array = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(photo, "PNG")
    np.save(array, scene(0))
    content = {"png": photo.getvalue(), "npy": array.getvalue()}
    sample: Any = ("a", {**{kind: content[kind] for kind in order}, "txt": b"water"})
    write_tar(tmp_path / "x.tar", [sample, ("a", {"npy": b"features"})])
    source = TarPairs(str(tmp_path / "x.tar"))
    assert source.load(0, None).image.size == (8, 8)
    write_tar(tmp_path / "y.tar", [("a", {"npy": content["npy"], "txt": b"water"}), ("a", {"npy": content["npy"]})])
    with pytest.raises(InputError, match="y.tar sample a: duplicate key"):
        TarPairs(str(tmp_path / "y.tar"))


def array_file(header: str) -> bytes:
    text = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(100)


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    return file.getvalue()


def claiming(kind: str, tag: int, value: int) -> bytes:
    """Return a TIFF file with another value of a tag."""
    content = bytearray(tiff(kind)[0])
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        found = file.pages[0].tags[tag]
        size = found.valuebytecount
    content[found.valueoffset : found.valueoffset + size] = value.to_bytes(size, "little")
    return bytes(content)


def pages_of_zeros(kind: str, pages: int, shared: bool) -> bytes:
    """Return a TIFF file of pages of one strip of zeros each, which may all be the first page's."""
    file = io.BytesIO()
    zeros = np.zeros((pages, 512, 512), kind)
    tifffile.imwrite(file, zeros, photometric="minisblack", compression="zlib", rowsperstrip=512, metadata=None)
    content = bytearray(file.getvalue())
    with tifffile.TiffFile(io.BytesIO(content)) as opened:
        places = [page.tags[273].valueoffset for page in opened.pages]
    for place in places if shared else ():
        content[place : place + 4] = content[places[0] : places[0] + 4]
    return bytes(content)


HOSTILE = {
    "objects": pickled,
    "10^12 values": lambda: array_file("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}"),
    "10^12 bands": lambda: array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1000000000000)}"),
    "negative": lambda: array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -4)}"),
    "no values": lambda: array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 4)}"),
    "four dimensions": lambda: array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 2, 2)}"),
    "texts": lambda: array_file("{'descr': '<U9', 'fortran_order': False, 'shape': (1, 1)}"),
    "complex": lambda: array_file("{'descr': '<c8', 'fortran_order': False, 'shape': (1, 1)}"),
    "code": lambda: array_file("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1, 1)}"),
    "wrong magic": lambda: b"\x93NUMPZ" + array_file("{}")[6:],
    "long header": lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "cut": lambda: array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4)}")[:40],
    "width": lambda: claiming("16 bits", 256, 60_000),
    "bands": lambda: claiming("16 bits", 277, 60_000),
    "tile": lambda: claiming("16 bits in tiles, deflated", 322, 2**15),
    "truncated": lambda: tiff("16 bits")[0][:-100],
    "pages of one strip": lambda: pages_of_zeros("float64", 24, shared=True),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_without_memory(kind: str, tmp_path: Path) -> None:
    content = HOSTILE[kind]()
    (tmp_path / "a.npy").write_bytes(content)
    tracemalloc.start()
    try:
        for source in (tmp_path / "a.npy", io.BytesIO(content)):
            with pytest.raises(BadSample, match="row 1") as refused:
                image_for_model(source, "row 1")
            assert refused.value.reason in ("broken image", "not an image", "image too large")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shared", "bands", "words"), [(False, 4, "24 bands, the model reads 4"), (True, 24, "claims")]
)
def test_pages_that_pillow_opens_are_counted_before_they_are_decoded(shared: bool, bands: int, words: str) -> None:
    image = image_for_model(io.BytesIO(pages_of_zeros("uint8", 24, shared)), "row 1")
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match=words):
            pixels(Preprocessing(SIZE, mean=(0.5,) * bands, std=(0.5,) * bands))(image)
        assert tracemalloc.get_traced_memory()[1] < 4e6  # of 6.3
    finally:
        tracemalloc.stop()


class Arrays(CustomPairs):
    """Contents of files from Python."""

    def __len__(self) -> int:
        return 2

    def image(self, index: int) -> bytes:
        file = io.BytesIO()
        np.save(file, scene(index))
        return file.getvalue()

    def captions(self, index: int) -> list[str]:
        return [NAMES[index]]


def test_a_source_of_ones_own_gives_contents() -> None:
    data = Captions(Arrays(), Arrays(), num_workers=0)
    data.preprocessing = config(4).preprocessing or Preprocessing()
    data.setup("fit")
    images = next(iter(data.val_dataloader())).images
    assert torch.equal(images[1], pixels(data.preprocessing)(_banded(scene(1))))


def test_before_training_nothing_is_said_of_bands_that_the_model_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tif").write_bytes(tiff("8 bits of colours and alpha, as GDAL writes them")[0])
    (tmp_path / "t.csv").write_text("image,caption\na.tif,water\n")
    table = str(tmp_path / "t.csv")
    data = Captions(table, table, num_workers=0)
    data.preprocessing = config(4).preprocessing or Preprocessing()
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert not [record for record in caplog.records if record.message.startswith("images: ")]


def run(words: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-clip", *map(str, words)])
    main()


def test_commands_read_all_bands(
    trained: tuple[LitCLIP, Path], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "scenes").mkdir()
    for number in range(160, 164):
        np.save(tmp_path / f"scenes/{number}.npy", scene(number))
    monkeypatch.chdir(tmp_path)
    model = ["scenes", "--model", trained[1], "--num_workers", 0]
    run(["classify", *model, "--classes", *NAMES, "--templates", "{}", "--output_file", "out.csv"], monkeypatch)
    rows = csv.DictReader((tmp_path / "out.csv").open())
    assert [row["class"] for row in rows if row["rank"] == "1"] == list(NAMES) * 2
    run(["embed", *model, "--output", "out.parquet"], monkeypatch)
    features = pq.read_table(tmp_path / "out.parquet")
    expected = load_model(trained[1]).encode([tmp_path / f"scenes/{number}.npy" for number in range(160, 164)])
    assert np.allclose(np.stack(features["feature"].to_numpy()), expected.numpy(), atol=1e-5)
    capsys.readouterr()
    run(["search", "scenes", "forest", *model[1:], "--top_k", 2], monkeypatch)
    found = capsys.readouterr().out
    assert "161.npy" in found
    assert "163.npy" in found
    assert "160.npy" not in found


def test_an_own_set_of_classes_and_validation_read_all_bands(trained: tuple[LitCLIP, Path], scenes: Path) -> None:
    for number in range(160, 164):
        (scenes / f"classes/{NAMES[number % 2]}").mkdir(parents=True, exist_ok=True)
        np.save(scenes / f"classes/{NAMES[number % 2]}/{number}.npy", scene(number))
    images = ImageFolderClasses(str(scenes / "classes"))
    model = load_model(trained[1])
    found = pixels(model.preprocessing)(images.images(0)[0])
    assert torch.equal(found, pixels(model.preprocessing)(_banded(scene(161))))  # classes by name
    module = LitCLIP.load_from_checkpoint(trained[1])
    data = Captions(val=str(scenes / "val4.csv"), num_workers=0)
    (results,) = Trainer(**QUIET).validate(module, data, verbose=False)
    assert np.isfinite(results["val/loss"])


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_tensorboard_shows_the_first_three_bands_or_the_first_one(bands: int, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"classes/{NAMES[number % 2]}").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"classes/{NAMES[number % 2]}/{number}.npy", scene(number)[..., :bands])
    rows = [f"classes/{NAMES[number % 2]}/{number}.npy,{NAMES[number % 2]} {number}" for number in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    classes = ZeroShotSet(ImageFolderClasses(str(tmp_path / "classes")), ["{}"])
    callbacks = [EmbeddingProjector(4), SimilarityMatrix(4), ZeroShot({"land": classes}, examples=4)]
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    options = {**QUIET, "logger": logger, "callbacks": callbacks, "max_epochs": 1, "log_every_n_steps": 1}
    module = LitCLIP(config(bands), lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    table = str(tmp_path / "t.csv")
    Trainer(**options).fit(module, Captions(table, table, batch_size=2, num_workers=0, augmentation=[]))
    (sprite,) = (tmp_path / "run").rglob("sprite.png")
    preprocessing = module.preprocessing
    expected = pixels(preprocessing)(image_for_model(tmp_path / "classes/water/0.npy"))
    expected = expected[:3] if bands > 2 else expected[:1].expand(3, -1, -1)
    assert (
        np.abs(np.asarray(Image.open(sprite))[:SIZE, :SIZE].astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1
    )
    events = EventAccumulator(str(logger.log_dir)).Reload()
    assert set(events.Tags()["images"]) == {"val/similarity", "zero_shot/land"}


def test_arrays_beside_photographs_are_no_images(tmp_path: Path) -> None:
    """But their features; a folder of arrays alone is one of images."""
    for kind, files in (("both", ("1.png", "1.npy", "features.npy")), ("arrays", ("1.npy", "2.NPY"))):
        folder = tmp_path / kind / "water"
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_bytes(b"")
            (folder / name).with_suffix(".txt").write_text("water")
        images = ["1.png"] if kind == "both" else list(files)
        assert [file.key for file in listed_images(folder)] == images
        assert [file.name for file in ImageFolderClasses(str(tmp_path / kind)).files] == images
        assert images_of_set(folder) == images
        assert list(FolderPairs(folder).image_names() or []) == [pa.scalar(name) for name in images]
    np.save(tmp_path / "both/features.npy", np.zeros((2, 3)))  # as embed writes for a folder of folders
    assert [file.key for file in listed_images(tmp_path / "both")] == ["water/1.png"]


@pytest.mark.parametrize("format", ["open_clip", "hugging_face", "immich"])
def test_exports_that_read_colours_refuse(trained: tuple[LitCLIP, Path], format: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{format}.*use.* onnx"):
        export(str(trained[1]), output=str(tmp_path / format), format=format)


@pytest.mark.slow
def test_onnx_reads_all_bands(trained: tuple[LitCLIP, Path], tmp_path: Path) -> None:
    """The export itself compares its features with the model's."""
    export(str(trained[1]), output=str(tmp_path / "onnx"), format="onnx")
    about = json.loads((tmp_path / "onnx/model.json").read_text())
    assert about["image_encoder"]["shape"] == ["batch", 4, SIZE, SIZE]
    assert about["preprocessing"]["mean"] == [0.4, 0.5, 0.6, 0.3]
