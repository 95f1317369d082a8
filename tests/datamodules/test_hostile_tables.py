"""Odd and hostile tables are read right, counted, or refused in one line; nothing waits, runs code or fills the memory.

The files are ``tests/corpus/tables``; what is large or no regular file is made here.
"""

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules.open_source import open_source
from datamodules.pairs import parquet, text_table
from datamodules.pairs.source import Columns, PairSource
from lit_clip.errors import BadSample, InputError

CORPUS = Path(__file__).parents[1] / "corpus" / "tables"
READ = {  # file -> rows left out, by reason; besides them it holds a cat and a dog
    "utf32.csv": {},
    "utf32_big_endian.tsv": {},
    "excel_sep.csv": {},
    "excel_sep_quoted.csv": {},
    "blank_lines_first.csv": {},
    "newlines_mixed.csv": {},
    "line_separators.csv": {},
    "unnamed_columns.csv": {},
    "excel_errors.csv": {"no caption": 8},
    "invisible.csv": {"no caption": 5},
    "not_a_number.jsonl": {"no caption": 1},
    "coco_orphans.json": {"annotation without an image": 2},
}
REFUSED = {  # file -> its error
    "cp1252_after_lines.csv": "row 4: not UTF-8 text; save it as UTF-8",
    "quote_not_closed.csv": "row 2: .*check its double quotes",
    "same_column_twice.csv": "two columns are called 'caption'; rename one",
    "zero_bytes.csv": "not UTF-8 text .zero at byte 1.; save it as UTF-8",
    "lone_surrogate.jsonl": "row 1: not UTF-8 text",
    "nested.jsonl": "row 1: the caption is not text",
    "devices.csv": "row 2: not a file: /dev/zero",
    "class_path.csv": "row 2: no such image file: .*class_path",
    "coco_one_id_twice.json": "images 0 and 2 have the same id 1, so their captions cannot be told apart",
    "coco_id_list.json": "image 0 needs a file_name and an integer id",
    "coco_image_id_list.json": r"annotation 0 has the image_id \[1\], which is not an integer",
    "coco_id_too_large.json": "image 0 needs a file_name and an integer id",
    "coco_id_text.json": "image 0 needs a file_name and an integer id",
    "coco_id_float.json": "image 0 needs a file_name and an integer id",
    "coco_lone_surrogate.json": "image id 1: not UTF-8 text",
    "karpathy_sentences_null.json": "image 0 needs a filename and a list of sentences",
    "karpathy_filepath_number.json": "image 0 has the filepath 3, no text",
}
ALL_BAD = {  # with on_error skip -> why no row is left
    "lone_surrogate.jsonl": r"no row with an image and a caption \(2 rows \(not UTF-8\)\)",
    "nested.jsonl": r"\(1 row \(caption is not text\)\)",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def copied(name: str, folder: Path) -> str:
    return str(shutil.copy(CORPUS / name, folder / name))


def opened(path: Path | str, **options: str) -> PairSource:
    """Open a table and read every pair, as training with on_error error would."""
    source = open_source(path, default_split="train", **options)
    source.check()
    for row in range(len(source)):
        source.load(row, random.Random(0))
    return source


def test_every_file_of_the_corpus_has_an_expected_outcome() -> None:
    of_fuzzer = {path.name for path in CORPUS.iterdir() if "--" in path.name}  # tests/fuzz replays them
    assert {*READ, *REFUSED, "group_surrogate.jsonl"} == {path.name for path in CORPUS.iterdir()} - of_fuzzer


@pytest.mark.parametrize("name", READ)
def test_odd_table_is_read_and_what_it_lacks_is_counted(folder: Path, name: str) -> None:
    source = opened(copied(name, folder))
    assert [source.captions(row)[0].strip() for row in range(len(source))] == ["a cat", "a dog"]
    assert source.left_out.counts == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_table_is_refused_in_one_line_that_names_it(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]) as error:
        opened(copied(name, folder))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ALL_BAD)
def test_table_without_a_usable_row_says_why_with_on_error_skip(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=ALL_BAD[name]):
        open_source(copied(name, folder), on_error="skip")


def test_group_that_is_no_text_is_refused_and_only_loses_its_row_with_skip(folder: Path) -> None:
    path = Path(copied("group_surrogate.jsonl", folder))
    with pytest.raises(InputError, match="row 1: not UTF-8 text"):
        open_source(path, columns=Columns(group="group"))
    with path.open("a") as file:
        file.write('{"image":"a.png","caption":"a cat","group":[1]}\n{"image":"a.png","caption":"a cat","group":7}\n')
    source = open_source(path, columns=Columns(group="group"), on_error="skip")
    assert source.left_out.counts == {"not UTF-8": 1, "group is not text": 1}
    assert len(source) == 1


@pytest.mark.parametrize("quote", ["", '"'])
def test_long_caption_is_read_and_a_longer_one_is_not_blamed_on_its_quotes_alone(
    folder: Path, quote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "t.csv"
    path.write_text(f"image,caption\na.png,{quote}{'word ' * 30_000}{quote}\nb.png,a dog\n")  # above csv's own limit
    assert len(opened(path)) == 2
    monkeypatch.setattr(text_table, "LONGEST_FIELD", 1000)
    with pytest.raises(InputError, match="row 2: a field has more than 1,000 characters; shorten it, or close its"):
        open_source(path)


def test_many_columns_are_read_and_not_all_listed(folder: Path) -> None:
    names = [f"column {number}" for number in range(100_000)]
    path = folder / "t.csv"
    path.write_text(",".join(["image", "caption", *names]) + "\na.png,a cat" + ",1" * len(names) + "\n")
    assert opened(path).captions(0) == ["a cat"]
    path.write_text(",".join(names) + "\n")
    with pytest.raises(InputError, match=r"column 29 and 99,970 more") as error:
        open_source(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000])
@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_deeply_nested_json_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}.*(nested too deeply|recursion|not JSON)"):
        open_source(tmp_path / name)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may only be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "device": lambda path: os.symlink("/dev/zero", path),
    "loop of links": lambda path: os.symlink(path.name, path),
}


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_in_place_of_waiting_for_it(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    NO_FILES[kind](path)
    with pytest.raises(InputError, match=rf"t{suffix}: (neither a file nor a folder|no such file)"):
        open_source(path)


@pytest.mark.parametrize("kind", NO_FILES)
def test_image_that_is_no_file_is_a_bad_sample(folder: Path, kind: str) -> None:
    NO_FILES[kind](folder / "c.png")
    (folder / "t.csv").write_text("image,caption\nc.png,a cat\na.png,a dog\n")
    source = open_source(folder / "t.csv", on_error="skip")
    with pytest.raises(BadSample, match=r"row 2: (not a file|no such image file)"):
        source.load(0, None)


def test_name_listed_in_a_file_or_found_on_disk_is_never_a_description_of_a_source(tmp_path: Path) -> None:
    name = '{"class_path": "os.abort"}.csv'  # as a shell's * would give it
    (tmp_path / name).write_text("image,caption\n")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(InputError, match="no rows"):
            open_source(name)
    finally:
        os.chdir(here)


IMAGES, CAPTIONS = pa.array(["a.png", "b.png"]), pa.array(["a cat", "a dog"])
COLUMNS = {  # captions in parquet -> the error, or none
    "large strings": (CAPTIONS.cast(pa.large_string()), ""),
    "dictionary": (CAPTIONS.dictionary_encode(), ""),
    "bytes": (CAPTIONS.cast(pa.binary()), ""),
    "nulls of no type": (pa.nulls(2), "holds null, neither texts nor lists"),
    "structs": (pa.array([{"raw": "a"}, {"raw": "b"}]), "neither texts nor lists of texts"),
    "lists of lists": (pa.array([[["a"]], [["b"]]]), "neither texts nor lists of texts"),
    "times": (pa.array([1, 2], pa.timestamp("us")), "neither texts nor lists of texts"),
    "fixed bytes": (pa.array([b"abc", b"def"], pa.binary(3)), "neither texts nor lists of texts"),
    "broken UTF-8": (pa.array([b"\xff", b"\xfe"]).view(pa.string()), "row 0: not UTF-8 text"),
    "only errors of Excel": (pa.array(["#N/A", "\u200b"]), "no row with an image and a caption"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_parquet_captions_of_odd_types_are_read_or_refused(folder: Path, kind: str) -> None:
    column, message = COLUMNS[kind]
    pq.write_table(pa.table({"image": IMAGES, "caption": column}), folder / "t.parquet")
    if not message:
        assert [opened(folder / "t.parquet").captions(row) for row in range(2)] == [["a cat"], ["a dog"]]
        return
    with pytest.raises(InputError, match=message):
        opened(folder / "t.parquet")


def test_parquet_columns_of_one_name_are_refused_where_they_are_read(folder: Path) -> None:
    pq.write_table(pa.table([IMAGES, CAPTIONS, CAPTIONS], ["image", "caption", "caption"]), folder / "t.parquet")
    with pytest.raises(InputError, match="two columns are called 'caption'; rename one"):
        open_source(folder / "t.parquet")
    pq.write_table(
        pa.table([IMAGES, CAPTIONS, CAPTIONS, CAPTIONS], ["image", "caption", "x", "x"]), folder / "t.parquet"
    )
    assert len(opened(folder / "t.parquet")) == 2


def test_damaged_cache_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(text_table, "IN_MEMORY", 10)
    monkeypatch.setattr(parquet, "IN_MEMORY", 0)
    monkeypatch.setattr(parquet, "LARGE", 1)
    rows = [{"image": "a.png", "caption": f"cat number {number}"} for number in range(50)] + [{"image": "a.png"}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    for name, cached in (("t.jsonl", 1), ("t.parquet", 2)):
        shutil.rmtree(folder / "cache", ignore_errors=True)

        def captions(name: str = name) -> list[list[str]]:
            source = open_source(folder / name)
            source.prepare()
            assert source.left_out.counts == {"no caption": 1}
            return [source.captions(row) for row in range(len(source))]

        expected = captions()
        files = list((folder / "cache/lit-clip/tables").iterdir())
        assert len(files) == cached
        for file in files:
            whole = file.read_bytes()
            middle = whole.index(b"cat number") if b"cat number" in whole else len(whole) - 8
            for content in (
                b"",
                whole[: len(whole) // 2],
                bytes(len(whole)),
                whole[:middle] + b"\xff" * 8 + whole[middle + 8 :],
            ):
                file.write_bytes(content)
                assert captions() == expected
                assert file.read_bytes() == whole
