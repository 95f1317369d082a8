"""Formats are recognised, and the same pairs in any format give the same batches."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules import CaptionDataModule, CustomPairs
from datamodules.open_source import open_data, open_source
from datamodules.pairs.findings import DataOptions
from datamodules.pairs.mixture import Concatenated
from datamodules.pairs.source import Columns, PairSource, Rows
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing

PAIRS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 noise images with a text beside each, and tables of them that only differ in format."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(PAIRS):
        name = f"{'ab'[i // 100]}/{i:03}.png"
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + i % 4, 12, 3), dtype=np.uint8)).save(root / name)
        rows.append((name, f"image {i}; of {i % 7} cats, é"))
        (root / name).with_suffix(".txt").write_text(rows[-1][1], encoding="utf-8")
    for name, delimiter, encoding in (("c.csv", ",", "utf-8"), ("s.csv", ";", "utf-8"), ("t.tsv", "\t", "utf-8-sig")):
        lines = [delimiter.join(["image", "caption"]), *(f'{image}{delimiter}"{text}"' for image, text in rows)]
        (root / name).write_text("\n".join(lines), encoding=encoding)
    objects = [{"image": image, "caption": text} for image, text in rows]
    (root / "l.jsonl").write_text("\n".join(map(json.dumps, objects)), encoding="utf-8")
    (root / "parquet").mkdir()  # in its own folder: a folder with parquet files is not read as a folder of images
    pq.write_table(pa.Table.from_pylist(objects), root / "parquet/p.parquet", row_group_size=70)
    for part in "ab":
        shutil.copytree(root / part, root / "parquet" / part, ignore=shutil.ignore_patterns("*.txt"))
    return root


class Batches(CaptionDataModule):
    """Data module of a given source."""

    def __init__(self, source: PairSource, **options: Any) -> None:
        super().__init__(batch_size=32, **options)
        self.source, self.preprocessing = source, Preprocessing(image_size=7)

    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        return self.source, self.source


def batches(path: Path) -> list[CaptionBatch]:
    """Return an epoch of training and one of validation, without options."""
    module = Batches(open_source(path), num_workers=0)
    module.setup("fit")
    return [*module.train_dataloader(), *module.val_dataloader()]


def test_every_format_of_the_same_pairs_gives_identical_batches(folder: Path) -> None:
    expected = batches(folder / "c.csv")
    assert sum(len(batch.keys) for batch in expected) == 192 + PAIRS
    for name in ("s.csv", "t.tsv", "l.jsonl", "parquet/p.parquet", "."):
        found = batches(folder / name)
        assert len(found) == len(expected)
        for batch, other in zip(found, expected, strict=True):
            assert torch.equal(batch.images, other.images), name
            assert torch.equal(batch.tokens, other.tokens), name
            assert (batch.keys, batch.captions) == (other.keys, other.captions), name


@pytest.mark.parametrize("name", ["missing.xls", "notes.docx", "none", "empty"])
def test_unknown_data_is_an_error_that_lists_the_supported_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.docx").write_text("image,caption")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        open_source(tmp_path / name)
    for part in (name, ".txt") if name == "empty" else (name, ".csv", ".parquet", "tar shards", "folder"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="empty list"):
        open_source([])


def test_options_that_do_not_apply_to_a_source_are_refused(folder: Path) -> None:
    for name in ("c.csv", "l.jsonl", "parquet/p.parquet", "."):
        with pytest.raises(InputError, match="no splits"):
            open_source(folder / name, split="train")
        assert len(open_source(folder / name, default_split="train")) == PAIRS
    with pytest.raises(InputError, match="is not a table, but columns.caption is 'text'"):
        open_source(folder, columns=Columns(caption="text"))


def test_list_of_tables_is_concatenated(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "o.csv"
    other.write_text(f"image,caption\n{folder}/a/003.png,another\na/003.png,lost\n")
    same = open_source([folder / "c.csv", folder / "l.jsonl"])
    assert isinstance(same, Concatenated)
    assert len(same) == 2 * PAIRS
    assert same.load(3, None).key == same.load(203, None).key == "a/003.png"  # one image: both roots are equal
    distinct = open_source([folder / "c.csv", other])
    assert len(distinct) == PAIRS + 2
    assert [distinct.load(row, None)[1:3] for row in (3, 200)] == [
        ("image 3; of 3 cats, é", "0:a/003.png"),
        ("another", f"1:{folder}/a/003.png"),
    ]
    assert distinct.captions(201) == ["lost"]
    assert distinct.read(200)[1:3] == (["another"], f"1:{folder}/a/003.png")
    assert sorted(distinct.order(1, 2)) == list(range(PAIRS + 2))
    with pytest.raises(InputError, match="o.csv row 3"):
        distinct.check()


class Prepared(CustomPairs):
    """A source that knows its length once it is prepared."""

    prepared = False

    def __len__(self) -> int:
        assert self.prepared
        return 2

    def prepare(self) -> None:
        self.prepared = True

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8))

    def captions(self, index: int) -> list[str]:
        return [f"row {index}"]


def test_a_source_is_prepared_before_its_length_is_asked() -> None:
    opened = open_data(DataOptions([f"{{class_path: {Prepared.__module__}.Prepared}}"]))
    assert len(opened.pairs) == 2


def test_rows_of_a_source_keep_its_order(folder: Path) -> None:
    class Backwards(Rows):
        def order(self, epoch: int, seed: int) -> np.ndarray:
            return np.roll(np.arange(len(self))[::-1], epoch)

    whole = Backwards(open_source(folder / "c.csv"), np.arange(PAIRS))
    some = Rows(whole, np.array([1, 5, 150]))
    assert len(some) == 3
    assert [some.load(i, None).key for i in range(3)] == ["a/001.png", "a/005.png", "b/150.png"]
    assert some.order(0, 0).tolist() == [2, 1, 0]
    assert some.order(2, 0).tolist() == [0, 2, 1]  # then rows 1 and 0 come first
    assert some.captions(2) == ["image 150; of 3 cats, é"]
    assert some.read(2).image == (folder / "b/150.png").read_bytes()


def test_division_has_every_image_once(folder: Path) -> None:
    train, val = open_source(folder).divide(0.25, seed=3)
    keys = [[source.read(i).key for i in range(len(source))] for source in (train, val)]
    assert [len(part) for part in keys] == [150, 50]
    assert sorted([*keys[0], *keys[1]]) == sorted(f"{'ab'[i // 100]}/{i:03}.png" for i in range(PAIRS))
    images = sorted([*keys[0], *keys[1]])
    assert keys[1] == sorted(random.Random(3).sample(images, 50))


def test_tables_that_share_images_hold_the_same_out(folder: Path, tmp_path: Path) -> None:
    def keys(parts: tuple[PairSource, PairSource]) -> list[set[str]]:
        return [{part.key(row) for row in range(len(part))} for part in parts]

    rows = [f"{'ab'[i // 100]}/{i:03}.png,{word} {i}" for i in range(40) for word in ("one", "two", "three")]
    for name, first in (("few.csv", 0), ("other.csv", 60)):
        (folder / name).write_text("\n".join(["image,caption", *rows[first:]]))
    train, val = keys(open_source([folder / "few.csv", folder / "other.csv"]).divide(0.25, seed=3))
    assert (len(train), len(val), train & val) == (30, 10, set())
    (tmp_path / "few.csv").write_text((folder / "few.csv").read_text())  # its images are others
    train, val = keys(open_source([folder / "few.csv", tmp_path / "few.csv"]).divide(0.25, seed=3))
    assert (len(train), len(val), train & val) == (60, 20, set())
