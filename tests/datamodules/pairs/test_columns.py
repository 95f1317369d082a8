"""Blank captions of a whole column against checking each cell; captions in several columns."""

import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from datamodules.loading.bad_samples import BLANK, is_blank
from datamodules.open_source import open_source
from datamodules.pairs.column_names import blank_mask
from datamodules.pairs.source import Columns
from tests.datamodules.pairs.test_saved import save
from tests.helpers.epochs import tabulated

SPACES = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
WORDS = ["", "nan", "NaN", "NONE", "None", "null", "Null", "n/a", "N/A", "<NA>", "<na>"]
WORDS += ["nano", "none of", "a", "é", "n", "<"]
TEXTS = [f"{space}{word}{space}" for word in WORDS for space in ("", *SPACES, " \t\n")]
TEXTS += ["zero\0", "#hash", "#n/a b", "# ref!", *BLANK, *map(str.upper, BLANK)]
VISIBLE = "aé#東👩"
KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS)
def test_blank_mask_equals_is_blank_of_each_text(kind: pa.DataType) -> None:
    cells = [*TEXTS, None]
    encode = str.encode if kind in (pa.binary(), pa.large_binary()) else str
    column = pa.array([None if cell is None else encode(cell) for cell in cells], kind)
    expected = [is_blank(cell) for cell in cells]
    assert blank_mask(column).tolist() == expected
    assert 0 < sum(expected) < len(expected)
    for start, stop in ((1, 9), (100, 100), (333, None)):  # slices share their buffers with the whole
        assert blank_mask(column[start:stop]).tolist() == expected[start:stop]


@pytest.mark.slow
def test_only_invisible_characters_are_blank_in_a_cell_and_in_a_column() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    blank = [is_blank(character) for character in characters]
    assert blank_mask(pa.array(characters, pa.string())).tolist() == blank
    nothing = {character for character, is_nothing in zip(characters, blank, strict=True) if is_nothing}
    assert nothing >= {*SPACES, *"\0\x7f\xad\u200b\u200d\u2060\ufeff\u3164\u115f\ufe0f\u2800"}
    assert all(unicodedata.category(each)[0] in "ZCML" or each == "\u2800" for each in nothing)
    assert len(nothing) < 600
    assert not any(is_blank(f"{each}{letter}") for each in nothing for letter in VISIBLE)


def test_list_is_blank_if_all_its_texts_are() -> None:
    lists = [["a"], [], None, ["", "nan"], ["", "b"], [None], ["c", None, "d"]]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.string())):
        column = pa.array(lists, kind)
        assert blank_mask(column).tolist() == [False, True, True, True, False, True, False]
        assert blank_mask(column[3:6]).tolist() == [True, False, True]
    assert blank_mask(pa.array([], pa.string())).tolist() == []


def test_a_column_without_a_number_is_the_first_of_the_numbered_ones(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,image2,Caption,image,caption2,caption_1\nno,b.png,zero,a.png,two,one")
    source = open_source(tmp_path / "t.csv")
    assert source.captions(0) == ["zero", "one", "two"]
    assert source.key(0) == "a.png"
    (tmp_path / "one.csv").write_text("image,caption,text_1\na.png,zero,one")
    assert open_source(tmp_path / "one.csv").captions(0) == ["zero"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "saved"])
def test_numbered_columns_are_the_captions_of_one_image(tmp_path: Path, name: str) -> None:
    rows = [("a.png", "zero", "one", "ten"), ("b.png", None, "only", ""), ("c.png", "", "nan", None)]
    names = ["image", "caption_0", "Caption_1", "caption_10"]
    table = pa.table({column: [row[i] for row in rows] for i, column in enumerate(names)})
    for image, *_ in rows:
        Image.new("RGB", (4, 4)).save(tmp_path / image)
    if name == "saved":
        save(tmp_path / name, table.to_pydict())
    else:
        tabulated(tmp_path / name, table.to_pydict())
    source = open_source(tmp_path / name, columns=Columns(root=str(tmp_path)))
    assert [source.captions(row) for row in range(len(source))] == [["zero", "one", "ten"], ["only"]]
    assert source.left_out.counts == {"no caption": 1}
    assert [source.key(row) for row in range(2)] == ["a.png", "b.png"]
    alone = open_source(tmp_path / name, columns=Columns(root=str(tmp_path), caption="Caption_1"))
    assert [alone.captions(row) for row in range(len(alone))] == [["one"], ["only"]]
