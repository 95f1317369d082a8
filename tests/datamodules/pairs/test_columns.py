"""Columns of captions: a whole column says which rows have none as each cell by itself does."""

import sys

import numpy as np
import pyarrow as pa
import pytest

from datamodules.pairs.columns import blank_mask, is_blank

SPACES = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
WORDS = [
    "",
    "nan",
    "NaN",
    "NONE",
    "None",
    "null",
    "Null",
    "n/a",
    "N/A",
    "<NA>",
    "<na>",
    "nano",
    "none of",
    "a",
    "é",
    "n",
    "<",
]
TEXTS = [f"{space}{word}{space}" for word in WORDS for space in ("", *SPACES, " \t\n")] + ["zero\0", "\0", "\u200b"]
KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_finds_the_blank_texts_that_python_finds_one_by_one(kind: pa.DataType) -> None:
    cells = [*TEXTS, None]
    encode = str.encode if kind in (pa.binary(), pa.large_binary()) else str
    column = pa.array([None if cell is None else encode(cell) for cell in cells], kind)
    expected = [is_blank(cell) for cell in cells]
    assert blank_mask(column).tolist() == expected
    assert 0 < sum(expected) < len(expected)
    for start, stop in ((1, 9), (100, 100), (333, None)):  # slices share their buffers with the whole
        assert blank_mask(column[start:stop]).tolist() == expected[start:stop]


def test_a_list_is_blank_if_all_its_texts_are() -> None:
    lists = [["a"], [], None, ["", "nan"], ["", "b"], [None], ["c", None, "d"]]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.string())):
        column = pa.array(lists, kind)
        assert blank_mask(column).tolist() == [False, True, True, True, False, True, False]
        assert blank_mask(column[3:6]).tolist() == [True, False, True]


def test_columns_of_nothing_are_blank() -> None:
    assert blank_mask(pa.array([], pa.string())).tolist() == []
    assert blank_mask(pa.array([None, None], pa.string())).tolist() == [True, True]
    assert np.array_equal(blank_mask(pa.array([""], pa.string())), [True])
