"""Data module for any format: several sources, mixtures, splits, and refused options."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules import Captions, Weighted
from lit_clip.cli.lightning import CLI, run
from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing
from lit_clip.models.tokenizer import CLIPTokenizer


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
    size = Preprocessing(image_size=8)
    return Captions(val=str(folder / "b.csv"), batch_size=2, num_workers=0, preprocessing=size, **options)


def test_several_paths_are_concatenated(folder: Path) -> None:
    (found,) = captions(module(folder, train=[str(folder / "a.csv"), str(folder / "c")]))
    assert sorted(found) == sorted([f"a {i}" for i in range(30)] + [f"c {i}" for i in range(6)])


@pytest.mark.parametrize("as_objects", [False, True])
def test_mixture_has_its_shares_and_repeats_no_pair_early(folder: Path, as_objects: bool) -> None:
    parts: Any = [{"data": str(folder / "a.csv"), "weight": 1}, {"data": str(folder / "c"), "weight": 3}]
    parts = [Weighted(**part) for part in parts] if as_objects else parts
    first, second = captions(module(folder, train=parts, epoch_size=16), epochs=2)
    for texts in (first, second):
        assert Counter(caption[0] for caption in texts) == {"a": 4, "c": 12}
    assert all(first.count(f"c {i}") == 2 for i in range(6))
    assert len({caption for caption in first + second if caption[0] == "a"}) == 8


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
    assert data.train_source.epoch_size == 36


def test_invalid_data_options_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="set train, val or both"):
        Captions()
    with pytest.raises(InputError, match="a bare path among them"):
        captions(module(folder, train=[{"data": str(folder / "a.csv")}, str(folder / "c")]))
    with pytest.raises(InputError, match="wheight"):
        captions(module(folder, train=[{"data": str(folder / "a.csv"), "wheight": 1}]))
    with pytest.raises(InputError, match="nowhere.csv: no such file or folder"):
        captions(module(folder, train=str(folder / "nowhere.csv")))
    with pytest.raises(InputError, match=r"a\d+.png: its caption has 4 tokens, the model reads 3"):
        captions(module(folder, train=str(folder / "a.csv"), long_captions="error", tokenize=CLIPTokenizer(3)))
