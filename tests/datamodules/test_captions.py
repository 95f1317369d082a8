"""Data module for any format: sources, mixtures, splits, refused options; from Python, with the module it feeds."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image

from datamodules import CaptionDataModule, Captions, NoCaptions, OpenMoji
from datamodules.loading.augmentation import Augmentation
from datamodules.pairs.source import Columns
from lit_clip import LitCLIP
from lit_clip.cli.lightning import CLI, run
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, VisionTransformerConfig
from tests.helpers.coloured_sets import message_of
from tests.helpers.epochs import opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tables of 30 and 10 pairs, and a folder of 6 images with texts."""
    for name, size in (("a", 30), ("b", 10)):
        lines = ["image,caption"]
        for i in range(size):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{name}{i}.png")
            lines.append(f"{name}{i}.png,{name} {i}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "c").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (0, i, 0)).save(tmp_path / f"c/{i}.png")
        (tmp_path / f"c/{i}.txt").write_text(f"c {i}", encoding="utf-8")
    return tmp_path


def captions(data: Captions, epochs: int = 1) -> list[list[str]]:
    """Return the captions of each training epoch."""
    data.setup("fit")
    loader: Any = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        found.append([caption for batch in loader for caption in batch.captions])
    return found


def module(folder: Path, **options: Any) -> Captions:
    data = Captions(val=str(folder / "b.csv"), batch_size=2, num_workers=0, **options)
    data.preprocessing = Preprocessing(image_size=8)
    return data


def test_several_paths_are_concatenated(folder: Path) -> None:
    (found,) = captions(module(folder, train=[str(folder / "a.csv"), str(folder / "c")]))
    assert sorted(found) == sorted([f"a {i}" for i in range(30)] + [f"c {i}" for i in range(6)])


def test_mixture_has_its_shares_and_repeats_no_pair_early(folder: Path) -> None:
    parts: Any = [{"data": str(folder / "a.csv"), "weight": 1}, {"data": str(folder / "c"), "weight": 3}]
    first, second = captions(module(folder, train=parts), epochs=2)
    for texts in (first, second):
        assert Counter(caption[0] for caption in texts) == {"a": 9, "c": 27}
    assert all(first.count(f"c {i}") in (4, 5) for i in range(6))
    assert len({caption for caption in first + second if caption[0] == "a"}) == 18


def test_mixture_in_a_yaml_file_reaches_the_data_module(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CLI, "before_instantiate_classes", lambda self: None)
    parts = [{"data": str(folder / "a.csv"), "weight": 1}, {"data": str(folder / "c"), "weight": 3}]
    options = {"train": parts, "val": str(folder / "b.csv"), "shards": {"shuffle_shards": 3}}
    config = {"data": {"class_path": "datamodules.Captions", "init_args": options}}
    (tmp_path / "mixture.yaml").write_text(json.dumps(config), encoding="utf-8")
    data = run(["--config", str(tmp_path / "mixture.yaml"), "--model.architecture", "ViT-tiny-16-64"], False).datamodule
    assert isinstance(data, Captions)
    data.setup("fit")
    assert data.train_source is not None
    assert len(data.train_source) == 36


def test_invalid_data_options_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="set train, val or both"):
        Captions()
    (folder / "photographs.csv").touch()
    for train, message in (
        ([{"data": str(folder / "a.csv")}, str(folder / "c")], "a bare path among them"),
        ([{"data": str(folder / "a.csv"), "wheight": 1}], "wheight"),
        (str(folder / "nowhere.csv"), r"nowhere\.csv: no such file or folder$"),
        (str(folder / "photograph.csv"), rf"photograph\.csv: .*; did you mean {folder / 'photographs.csv'}\?$"),
    ):
        with pytest.raises(InputError, match=message):
            captions(module(folder, train=train))


def module_of(stage: str, **options: Any) -> Captions:
    data = Captions(**{"num_workers": 0, **options})
    data.setup(stage)
    return data


def keys_of(source: Any) -> list[str]:
    return [source.load(index, None).key for index in range(len(source))]


@pytest.fixture
def two_captions_each(tmp_path: Path) -> Path:
    """Table of 21 images with two rows each, far apart, and a third row for one of them."""
    names = [f"{i:02}.png" for i in range(21)]
    for name in names:
        Image.new("RGB", (6, 6)).save(tmp_path / name)
    rows = [(name, f"caption {i}") for i, name in enumerate([*names, *names, names[7]])]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},{text}\n" for name, text in rows))
    return tmp_path / "t.csv"


def division(table: Path, seed: int) -> tuple[list[str], list[str]]:
    data = module_of("fit", train=str(table), seed=seed, batch_size=1)
    return keys_of(data.train_source), keys_of(data.val_source)


def test_without_validation_data_images_are_divided_and_no_row_is_lost(two_captions_each: Path) -> None:
    for seed in range(5):
        train, val = division(two_captions_each, seed)
        assert not set(train) & set(val)
        assert len(set(val)) == 2  # a tenth of 21
        assert len(train) + len(val) == 43
        assert set(train) | set(val) == {f"{i:02}.png" for i in range(21)}


def test_a_message_says_that_a_tenth_of_the_images_validates(
    two_captions_each: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = module_of("fit", train=str(two_captions_each))
    assert data.val_source is not None
    told = f"data.val: not set; {len(data.val_source)} of 43 pairs, a tenth of the images, validate"
    assert f"{told}; too few to judge a model by, set data.val" in caplog.text


def test_division_depends_on_the_seed_only(two_captions_each: Path) -> None:
    divisions = [division(two_captions_each, seed) for seed in range(5)]
    assert division(two_captions_each, 3) == divisions[3]
    assert len({tuple(val) for _, val in divisions}) > 1


def test_validate_divides_as_fit_did(two_captions_each: Path) -> None:
    data = module_of("validate", train=str(two_captions_each), seed=3)
    assert keys_of(data.val_source) == division(two_captions_each, 3)[1]


def test_seed_everything_orders_and_augments_anew_and_divides_as_before(two_captions_each: Path) -> None:
    before = module_of("fit", train=str(two_captions_each))
    seed_everything(3, verbose=False)
    after, same = module_of("fit", train=str(two_captions_each)), module_of("fit", train=str(two_captions_each), seed=0)
    assert keys_of(after.val_source) == keys_of(before.val_source) == division(two_captions_each, 0)[1]
    orders = [[*next(iter(data.train_dataloader().batch_sampler or []))] for data in (before, after, same)]
    assert orders[0] == orders[2] != orders[1]
    datasets: list[Any] = [data.train_dataloader().dataset for data in (before, after, same)]
    assert [dataset.seed for dataset in datasets] == [0, 3, 0]  # of captions and augmentation


def test_separate_validation_table_leaves_the_training_table_undivided(folder: Path) -> None:
    data = module_of("fit", train=str(folder / "a.csv"), val=str(folder / "b.csv"), batch_size=2)
    assert keys_of(data.train_source) == [f"a{i}.png" for i in range(30)]
    assert keys_of(data.val_source) == [f"b{i}.png" for i in range(10)]


def test_validate_needs_no_training_data_but_fit_does(folder: Path) -> None:
    for options in ({}, {"train": str(folder / "not there.csv")}):
        data = module_of("validate", val=str(folder / "b.csv"), **options)
        found = [caption for batch in data.val_dataloader() for caption in batch.captions]
        assert found == [f"b {i}" for i in range(10)]
    message = message_of(lambda: module_of("fit", val=str(folder / "b.csv")))
    assert "data.train" in message
    assert "train" in message_of(Captions)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_below_one_is_refused(batch_size: int) -> None:
    message = message_of(lambda: Captions("t.csv", batch_size=batch_size))
    assert f"batch_size: {batch_size}" in message


def test_fewer_pairs_than_a_batch_is_an_error_that_names_the_largest_batch_size(folder: Path) -> None:
    both = {"train": str(folder / "b.csv"), "val": str(folder / "b.csv")}
    data = module_of("fit", batch_size=11, **both)
    message = message_of(data.train_dataloader)
    assert "10 training pairs" in message
    assert "data.batch_size to 10 or less" in message
    assert message_of(lambda: data.steps_per_epoch) == message
    fits = module_of("fit", batch_size=10, **both)
    assert fits.steps_per_epoch == len(list(fits.train_dataloader())) == 1


def test_groups_come_from_their_column_and_blank_cells_are_no_group(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table = tmp_path / "t.jsonl"
    rows = [{"image": "a.png", "caption": "a", "product": 7}, {"image": "a.png", "caption": "b", "product": None}]
    rows += [{"image": "a.png", "caption": "c", "product": " NaN "}, {"image": "a.png", "caption": "d"}]
    table.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    for columns, groups in ((Columns(group="product"), ["7", "", "", ""]), (None, ())):
        (batch,) = module_of("validate", val=str(table), columns=columns).val_dataloader()
        assert batch.groups == groups
    missing = r"no column 'brand'; its columns are image, caption, product; set --data.columns.group"
    with pytest.raises(InputError, match=missing):
        module_of("validate", val=str(table), columns=Columns(group="brand"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pair_that_a_mixture_repeats_in_an_epoch_has_another_crop_and_caption_each_time(
    tmp_path: Path, num_workers: int
) -> None:
    noise = np.random.default_rng(0).integers(256, size=(2, 40, 40, 3), dtype=np.uint8)
    words = [f"word {number}" for number in range(1000)]
    for number, pairs in ((0, 1), (1, 7)):
        Image.fromarray(noise[number]).save(tmp_path / f"{number}.png")
        rows = [{"image": f"{number}.png", "caption": words}] * pairs
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [{"data": str(tmp_path / f"{number}.jsonl")} for number in range(2)]
    crop = Augmentation(crop_scale=(0.2, 1.0))
    data = opened(parts, val=str(tmp_path / "0.jsonl"), num_workers=num_workers, augmentation=crop)
    batches = list(data.train_dataloader())
    drawn = {(key, *texts) for batch in batches for key, *texts in zip(batch.keys, batch.captions, strict=True)}
    assert Counter(key for key, _ in drawn) == {"0:0.png": 4, "1:1.png": 4}
    assert len({image.numpy().tobytes() for batch in batches for image in batch.images}) == 8
    again = list(data.train_dataloader())
    for batch, other in zip(batches, again, strict=True):
        assert batch.captions == other.captions
        assert batch.images.equal(other.images)


@pytest.mark.parametrize("name", ["columns", "splits", "classes", "bad_samples"])
def test_settings_that_are_no_object_of_their_class_are_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"data: .*'root'.* must be lit_clip\.datamodules\.[\w.]+\(\.\.\.\)"):
        Captions("t.csv", **{name: {"root": "."}})


QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def small(size: int, context_length: int, **options: Any) -> CLIPConfig:
    return CLIPConfig(
        embed_dim=16,
        image=VisionTransformerConfig(image_size=size, patch_size=16, width=64, layers=1, heads=1),
        text=TextTransformerConfig(context_length=context_length, width=64, layers=1, heads=1),
        **options,
    )


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten JPEGs and a table of their captions in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(f"{i}.jpg")
    Path("captions.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,photo {i}\n" for i in range(10)))


@pytest.mark.usefixtures("photos")
def test_a_model_and_a_table_are_all_that_fit_needs() -> None:
    """The trainer's own defaults, its distributed sampler among them, are right for one process."""
    module, data = LitCLIP("ViT-tiny-16-64"), Captions("captions.csv", batch_size=9, num_workers=0)
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.warns(UserWarning, match=r"pass Trainer\(callbacks=callbacks.defaults\(\)\)"):
        trainer.fit(module, data)
    assert trainer.global_step == 1
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()


class _Shapes(LightningModule):
    """Records the shapes of the batches of every stage; asks for images of 24 pixels."""

    def __init__(self, wrapped: LitCLIP) -> None:
        super().__init__()
        self.preprocessing, self.tokenize = wrapped.preprocessing, wrapped.tokenize
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, tuple[int, int]] = {}

    def _see(self, stage: str, batch: Any) -> torch.Tensor:
        self.seen[stage] = batch.images.shape[-1], max(batch.lengths)
        return self.weight * 1

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self._see("fit", batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self._see("validate", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._see("test", batch)

    def predict_step(self, batch: Any, _: int) -> None:
        self._see("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _own(drawings_cache: Path) -> CaptionDataModule:
    return OpenMoji(batch_size=50, num_workers=0, cache_dir=str(drawings_cache))


def _table(_: Path) -> CaptionDataModule:
    return Captions("captions.csv", "captions.csv", batch_size=5, num_workers=0)


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("make", [_table, _own])
def test_every_stage_reads_images_and_texts_as_its_own_module_wants_them(make: Any, drawings_cache: Path) -> None:
    """Also when one data module feeds a second module of another size."""
    data = make(drawings_cache)
    for size, context in ((32, 4), (48, 3)):
        module = _Shapes(LitCLIP(small(size, context)))
        options = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, **QUIET}
        for stage in ("validate", "fit", "test", "predict"):
            getattr(Trainer(max_steps=1, limit_val_batches=1, **options), stage)(module, data)
        assert module.seen == dict.fromkeys(("validate", "fit", "test", "predict"), (size, context))


@pytest.mark.usefixtures("photos")
def test_a_subclass_of_the_module_decides_how_images_are_preprocessed() -> None:
    class Bilinear(LitCLIP):
        @property
        def preprocessing(self) -> Preprocessing:
            return Preprocessing(32, interpolation="bilinear", resize_mode="squash")

    data = Captions(val="captions.csv", num_workers=0)
    Trainer(logger=False, **QUIET).validate(Bilinear(small(32, 8)), data, verbose=False)
    (batch,) = data.val_dataloader()
    with Image.open("0.jpg") as image:
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), expected)


def test_loader_is_empty_and_has_no_length() -> None:
    loader = NoCaptions().val_dataloader()
    assert list(loader) == []
    with pytest.raises(TypeError):  # a length of 0 would make Lightning skip the epoch with its hooks
        len(loader)
