"""Data sets saved by Hugging Face's ``datasets``, written here in its documented file format."""

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from datamodules.open_source import open_source
from datamodules.pairs.source import Columns
from lit_clip.errors import BadSample, InputError

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


def save(folder: Path, columns: dict[str, Any], files: int = 2, batch: int = 3) -> Path:
    """Write what ``Dataset.save_to_disk(folder, num_shards=files)`` does: IPC streams and a state."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        part = table.slice(table.num_rows * i // files, table.num_rows * (i + 1) // files - table.num_rows * i // files)
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(part, max_chunksize=batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "a", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


CAPTIONS = [["zero", "nought"], [], ["two"], ["three"], [" "], ["five"], ["six"], None, ["eight"], ["nine"]]
USABLE = [0, 2, 3, 5, 6, 8, 9]


def columns() -> dict[str, Any]:
    images = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(10)], IMAGE)
    return {"image": images, "captions": CAPTIONS, "source": ["web"] * 10}


def test_saved_data_set_is_read_without_the_datasets_library(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(save(tmp_path / "set", columns()), columns=Columns(group="source"))))
    assert len(source) == len(USABLE)
    assert source.left_out.counts == {"no caption": 3}
    for index, row in enumerate(USABLE):
        pair = source.load(index, None)
        assert (pair.image.getpixel((0, 0)), pair.caption, pair.group) == ((row, 0, 0), CAPTIONS[row][0], "web")
        assert pair.key == f"data-0000{row // 5}-of-00002.arrow:{row % 5}"
    assert {source.load(0, random.Random(seed)).caption for seed in range(20)} == {"zero", "nought"}
    assert source.read(1).image == png(2)
    train, val = source.divide(0.3, seed=0)
    assert (len(train), len(val)) == (5, 2)


def test_relative_paths_start_at_the_folder_or_at_root(tmp_path: Path) -> None:
    save(tmp_path / "set", {"image_path": ["a.png", "b.png", "a.png"], "text": ["a", "", "c"]})
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    source = open_source(tmp_path / "set", columns=Columns(root=str(tmp_path)))
    source.check()
    assert [source.load(i, None)[1:3] for i in range(2)] == [("a", "a.png"), ("c", "a.png")]
    with pytest.raises(InputError, match=r"data-00000-of-00002.arrow row 0: no such image file"):
        open_source(tmp_path / "set").check()
    with pytest.raises(InputError, match="one image cannot be divided"):
        source.divide(0.1, seed=0)


def test_dictionary_of_data_sets_is_one_source_per_split(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        save(tmp_path / split, columns(), files=1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    for split in ("validation", "val"):
        assert open_source(tmp_path, split=split).read(0).where.startswith(str(tmp_path / "validation"))
    with pytest.raises(InputError, match="several splits; its splits are train, validation; set split"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="has no splits"):
        open_source(tmp_path / "train", split="train")


def test_damaged_data_set_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", columns())
    file = folder / "data-00001-of-00002.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(InputError, match="data-00001-of-00002.arrow: not a readable Arrow file"):
        open_source(folder)
    file.unlink()
    with pytest.raises(InputError, match="data-00001-of-00002.arrow: there is no such file"):
        open_source(folder)
    for state, message in (
        ("{", "state.json: not a readable JSON file"),
        ("[]", "not a JSON object"),
        ("{}", "no data files"),
    ):
        (folder / "state.json").write_text(state)
        with pytest.raises(InputError, match=message):
            open_source(folder)


def test_a_text_that_is_not_utf8_is_a_bad_sample_and_no_damaged_file(tmp_path: Path) -> None:
    texts = pa.array([b"zero", b"\xff", b"two"]).view(pa.string())
    for name, captions in (("texts", texts), ("lists", pa.ListArray.from_arrays([0, 1, 2, 3], texts))):
        images = pa.array([{"bytes": png(row), "path": None} for row in range(3)], IMAGE)
        source = open_source(save(tmp_path / name, {"image": images, "caption": captions}, files=1))
        assert [source.load(row, None).caption for row in (0, 2)] == ["zero", "two"]
        with pytest.raises(BadSample, match="row 1: not UTF-8 text"):
            source.load(1, None)


@pytest.mark.parametrize("value", [2**31 - 5, -(2**30), 0])
@pytest.mark.parametrize("column", ["image", "captions"])
def test_arrow_offsets_that_point_elsewhere_are_refused_and_not_followed(
    tmp_path: Path, column: str, value: int
) -> None:
    folder = save(tmp_path / "set", columns(), files=1, batch=100)
    file = folder / "data-00000-of-00001.arrow"
    content = bytearray(file.read_bytes())
    array = pa.ipc.open_stream(bytes(content)).read_all()[column].chunk(0)
    offsets = (array.field(0) if column == "image" else array.values).buffers()[1].to_pybytes()
    damaged = np.frombuffer(offsets, np.int32).copy()
    damaged[3] = value
    start = bytes(content).index(offsets)
    content[start : start + len(offsets)] = damaged.tobytes()
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match="not a readable Arrow file"):
        open_source(folder)


def test_randomly_damaged_arrow_gives_pairs_or_an_input_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", columns(), files=1)
    file = folder / "data-00000-of-00001.arrow"
    whole, refused = file.read_bytes(), 0
    for seed in range(60):
        rng, content = random.Random(seed), bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(bytes(content))
        try:
            source = open_source(folder)
            for index in range(len(source)):
                source.load(index, None)
        except InputError:
            refused += 1
    assert 0 < refused < 60


@pytest.mark.parametrize(
    "files",
    [5, "abc", ["a"], [{}], [{"filename": 5}], [{"filename": "../x.arrow"}], [{"filename": "/dev/zero"}], [None]]
    + [{"filename": "x"}, [{"filename": "\ud800"}], [{"filename": "a\0b"}], [{"filename": "x" * 5000}]],
)
def test_state_of_wrong_types_or_with_files_elsewhere_is_one_line(tmp_path: Path, files: object) -> None:
    folder = save(tmp_path / "set", columns())
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    with pytest.raises(InputError, match="state.json: _data_files is not a list of names in this folder"):
        open_source(folder)
