"""Parquet files: paths or encoded images, one caption or several, in bounded memory."""

import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.open_source import open_source
from datamodules.pairs import parquet
from datamodules.pairs.source import Columns
from lit_clip.errors import BadSample, InputError

CAPTIONS = ["zero", None, "two", " ", "four", "NaN", "six", "seven", "eight", ""]
USABLE = [0, 2, 4, 6, 7, 8]


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lit-clip/tables"


def write(file: Path, columns: dict[str, Any], group: int = 3) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file


def paths(folder: Path) -> Path:
    """Write a table of ten paths, six of them with a caption, in row groups of three."""
    names = [f"{i}.png" for i in range(10)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(i))
    groups = [7, None, 8, 8, 8, 8, 9, 9, 9, 9]
    return write(folder / "t.parquet", {"filename": names, "caption": CAPTIONS, "product": groups})


@pytest.mark.parametrize("copied", [False, True])
def test_rows_with_a_caption_are_read_in_any_order(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    if copied:
        monkeypatch.setattr(parquet, "IN_MEMORY", 0)
    source = open_source(paths(tmp_path), columns=Columns(group="product"))
    source.prepare()
    assert len(list(cache.glob("*"))) == (4 if copied else 0)  # a file per row group
    assert len(source) == len(USABLE)
    assert source.left_out.counts == {"no caption": 4}
    assert source.left_out.listed == [(f"{tmp_path / 't.parquet'} row {row}", "no caption") for row in (1, 3, 5, 9)]
    source = pickle.loads(pickle.dumps(source))
    for index in np.random.default_rng(0).permutation(np.repeat(np.arange(len(USABLE)), 2)).tolist():
        row = USABLE[index]
        pair = source.load(index, None)
        assert (pair.caption, pair.key) == (CAPTIONS[row], f"{row}.png")
        assert pair.group == {0: "7", 6: "9", 7: "9", 8: "9"}.get(row, "8")
        assert pair.image.getpixel((0, 0)) == (row, 0, 0)
        assert source.read(index).where == f"{tmp_path / 't.parquet'} row {row}"
    train, val = source.divide(0.4, seed=1)
    names = [f"{row}.png" for row in USABLE]
    assert [val.load(i, None).key for i in range(len(val))] == sorted(random.Random(1).sample(names, 2))
    assert len(train) == 4


def test_copies_are_made_on_demand_and_again_for_a_changed_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "IN_MEMORY", 0)
    source = open_source(paths(tmp_path))
    assert not cache.exists()
    assert source.captions(5) == ["eight"]
    (copy,) = cache.iterdir()  # of the third row group only
    write(tmp_path / "t.parquet", {"filename": ["9.png"] * 9, "caption": ["changed"] * 9})
    assert open_source(tmp_path / "t.parquet").captions(7) == ["changed"]
    assert copy.exists()
    assert len(list(cache.iterdir())) == 2


def test_blank_captions_of_a_large_file_are_searched_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "LARGE", 10)
    table = paths(tmp_path)
    assert len(open_source(table)) == len(USABLE)
    monkeypatch.setattr(parquet, "blank_rows", None)
    source = open_source(table)
    assert len(source) == len(USABLE)
    assert source.captions(3) == ["six"]


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_encoded_images_have_keys_of_file_and_row(tmp_path: Path, kind: str) -> None:
    data = [png(i) for i in range(10)]
    column = data if kind == "bytes" else pa.array([{"bytes": d, "path": "image.png"} for d in data], STRUCT)
    source = open_source(write(tmp_path / "t.parquet", {"image": column, "text": CAPTIONS}))
    pairs = [source.load(index, None) for index in range(len(source))]
    assert [pair.image.getpixel((0, 0)) for pair in pairs] == [(row, 0, 0) for row in USABLE]
    assert [pair.caption for pair in pairs] == [CAPTIONS[row] for row in USABLE]
    assert [pair.key for pair in pairs] == [f"t.parquet:{row}" for row in USABLE]
    assert source.read(2).image == data[4]
    train, val = source.divide(0.5, seed=0)
    assert (len(train), len(val)) == (3, 3)
    assert set(train.load(i, None).key for i in range(3)) | set(val.load(i, None).key for i in range(3)) == {
        pair.key for pair in pairs
    }


def test_struct_without_bytes_is_a_path_and_without_either_a_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, {"bytes": b"no image", "path": "a.png"}]
    source = open_source(write(tmp_path / "t.parquet", {"image": pa.array(cells, STRUCT), "caption": ["a", "b", "c"]}))
    assert source.load(0, None).image.getpixel((0, 0)) == (7, 0, 0)
    reasons = []
    for row in (1, 2):
        with pytest.raises(BadSample, match=f"t.parquet row {row}") as error:
            source.load(row, None)
        reasons.append(error.value.reason)
    assert reasons == ["missing image", "not an image"]


def test_epoch_of_images_has_each_once_and_few_row_groups_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ["a caption"] * 60
    captions[7] = captions[31] = ""
    table = write(tmp_path / "t.parquet", {"image": [png(i) for i in range(60)], "caption": captions}, group=5)
    size = open_source(table).sizes[0]  # pyright: ignore[reportAttributeAccessIssue]  # ParquetPairs'
    monkeypatch.setattr(parquet, "IMAGE_MEMORY", int(size * 3.5))
    source: Any = open_source(table)
    orders = [source.order(epoch, seed=1) for epoch in (0, 1, 0)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(58))
        assert order.dtype == np.int32
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    groups = [source.number(int(index)) // 5 for index in orders[0]]
    for start in range(0, 58, 13):
        assert len(set(groups[start : start + 13])) <= 8  # of twelve
    assert len(set(groups[:13])) > 1
    for index in orders[0].tolist():
        row = source.number(index)
        assert source.load(index, None).image.getpixel((0, 0)) == (row, 0, 0)
        assert len([key for key in source._open if isinstance(key, int)]) <= 4


def test_captions_may_be_lists_bytes_or_dictionary_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    lists = [["one", None, "two"], [], ["", "three"], None]
    source = open_source(write(tmp_path / "l.parquet", {"image": ["a.png"] * 4, "caption": lists}))
    assert [source.captions(i) for i in range(len(source))] == [["one", "two"], ["three"]]
    assert {source.load(0, random.Random(seed)).caption for seed in range(20)} == {"one", "two"}
    cells = ["é".encode(), b" ", "é".encode("latin-1")]
    source = open_source(write(tmp_path / "b.parquet", {"image": ["a.png"] * 3, "caption": cells}))
    assert source.captions(0) == ["é"]
    with pytest.raises(BadSample, match="b.parquet row 2: the caption is not UTF-8"):
        source.captions(1)
    names = pa.array(["a.png", "a.png"]).dictionary_encode()
    source = open_source(
        write(tmp_path / "d.parquet", {"image": names, "caption": pa.array(["c", ""]).dictionary_encode()})
    )
    assert [source.load(i, None)[1:3] for i in range(len(source))] == [("c", "a.png")]


def test_folder_of_parquet_files_is_one_source_of_the_wanted_split(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        cells = {"image": [png(1)] * 2, "caption": [f"{name} {i}" for i in range(2)]}
        write(tmp_path / f"data/{name}.parquet", cells)
    source = open_source(tmp_path, split="train")
    assert [source.captions(i)[0][:14] for i in range(len(source))] == ["train-00000-of"] * 2 + ["train-00001-of"] * 2
    assert source.load(3, None).key == "train-00001-of-00002.parquet:1"
    assert len(open_source(tmp_path, default_split="test")) == 2
    with pytest.raises(InputError, match="several splits; its splits are test, train; set split"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="no split 'val'; its splits are test, train"):
        open_source(tmp_path, split="val")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "numbers as captions": ({"image": ["a.png"], "caption": [7]}, "'caption' holds int64"),
    "numbers as images": ({"image": [7], "caption": ["a"]}, "'image' holds int64"),
    "no caption at all": ({"image": ["a.png"] * 2, "caption": ["", None]}, "no row with an image and a caption"),
    "no rows": ({"image": pa.array([], pa.string()), "caption": pa.array([], pa.string())}, "no row"),
    "URLs": ({"URL": ["http://x/a.jpg"], "TEXT": ["a"]}, "img2dataset"),
    "unusual names": ({"photo": ["a.png"], "words": ["a"]}, r"\(photo, words\).*columns.image"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unusable_table_is_an_error_that_names_it(tmp_path: Path, case: str) -> None:
    columns, message = BROKEN[case]
    with pytest.raises(InputError, match=f"t.parquet: .*{message}"):
        open_source(write(tmp_path / "t.parquet", columns))


def test_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    table = paths(tmp_path)
    whole = table.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"image,caption\na.png,a cat\n"):
        table.write_bytes(data)
        with pytest.raises(InputError, match="t.parquet: not a readable parquet file"):
            open_source(table)


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_damaged_pages_are_bad_samples_that_name_their_row(tmp_path: Path, compression: str) -> None:
    columns = pa.table({"image": [png(i) * 9 for i in range(9)], "caption": ["a caption"] * 9})
    pq.write_table(columns, tmp_path / "t.parquet", row_group_size=3, compression=compression, use_dictionary=False)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "t.parquet").write_bytes(data)
    source = open_source(tmp_path / "t.parquet")
    assert len(source) == 9
    for index in range(9):
        if index // 3 == 1:
            with pytest.raises(BadSample, match=f"t.parquet row {index}: cannot read") as error:
                source.load(index, None)
            assert "\n" not in str(error.value)
        else:
            assert source.load(index, None).image.getpixel((0, 0)) == (index, 0, 0)


class CaptionAndColour(Dataset[tuple[str, int]]):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.source.captions(index)[0], self.source.load(index, None).image.getpixel((0, 0))[0]


@pytest.mark.parametrize("images", ["paths", "bytes"])
def test_data_workers_read_files_that_their_parent_has_open(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, images: str
) -> None:
    if images == "paths":
        monkeypatch.setattr(parquet, "IN_MEMORY", 0)
        table = paths(tmp_path)
    else:
        table = write(tmp_path / "t.parquet", {"image": [png(i) for i in range(10)], "caption": CAPTIONS})
    source = open_source(table)
    assert source.captions(0) == ["zero"]
    loader = DataLoader(CaptionAndColour(source), None, num_workers=2, timeout=60)
    assert list(map(tuple, loader)) == [(CAPTIONS[row], row) for row in USABLE]


MILLIONS = 20
OPEN = """
import sys
from datamodules.open_source import open_source

def used():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) // 1024

before = used()
source = open_source(sys.argv[1])
assert len(source) == int(sys.argv[2]), len(source)
assert source.captions(len(source) - 2) == ["caption of a row"]
print(used() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_twenty_million_rows_open_in_less_than_300_mb(tmp_path: Path) -> None:
    rows = 1_000_000
    names = pa.array([f"folder/{i:09}.jpg" for i in range(rows)])
    captions = pa.array(["caption of a row"] * (rows - 1) + [""])
    with pq.ParquetWriter(tmp_path / "t.parquet", pa.schema({"image": pa.string(), "caption": pa.string()})) as writer:
        for _ in range(MILLIONS):
            writer.write_table(pa.table({"image": names, "caption": captions}))
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    for _ in range(2):  # the first run also searches for blank captions and copies a row group
        arguments = [sys.executable, "-c", OPEN, str(tmp_path / "t.parquet"), str(MILLIONS * (rows - 1))]
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) < 300
