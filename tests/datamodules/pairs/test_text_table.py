"""Captions in text tables: every format reads the same, and errors name file and row."""

import codecs
import csv
import io
import json
import logging
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning_utilities.core.rank_zero as rank_zero
import pytest
import torch
from PIL import Image

from datamodules import Captions
from datamodules.pairs import text_table
from datamodules.pairs.source import Columns, SourceOptions
from lit_clip.batch import CaptionBatch
from lit_clip.errors import BadSample
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.models.tokenizer import decode, tokenize
from tests.helpers.coloured_sets import message_of

TINY = Preprocessing(image_size=5)
PAIRS = [
    ("plain.png", "a dog"),
    ("in a folder/with spaces.png", "a dog, a cat, and a bird"),
    ("accents-é.png", "un café à côté de l'hôtel"),
    ("quotes.png", 'a sign that says "stop"'),
    ("quoted.png", '"all of it is quoted"'),
    ("semicolon.png", "first; then second"),
    ("tab.png", "left\tright"),
    ("bar.png", "this | that"),
    ("script.png", "東京の夜, 猫"),
    ("emoji.png", "a party 🎉"),
    ("apostrophe.png", "the dog's bowl, nan bread and none of the rest"),
    ("lines.png", "two\nlines"),
]
VALID = "image,caption\na.png,a cat\nb.png,a dog\n"


def delimited(delimiter: str, rows: list[tuple[str, str]], header: tuple[str, str] = ("image", "caption")) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return file.getvalue()


def json_lines(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows)


def paint(folder: Path, *names: str) -> None:
    """Save images of one colour each, by number."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (9 + 20 * i, 255 - 20 * i, i)).save(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images of PAIRS and VALID."""
    paint(tmp_path, *(name for name, _ in PAIRS), "a.png", "b.png")
    return tmp_path


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Messages that the user would see, as they are logged."""
    read: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: read.append(record.getMessage())
    rank_zero.log.addHandler(handler)
    yield read
    rank_zero.log.removeHandler(handler)


def module_of(**options: Any) -> Captions:
    module = Captions(**{"num_workers": 0, **options})
    module.preprocessing = TINY
    module.setup("validate")
    return module


def validation(table: Path, **options: Any) -> list[CaptionBatch]:
    return list(module_of(val=str(table), batch_size=5, **options).val_dataloader())


def captions(table: Path, **options: Any) -> list[str]:
    return [decode(row) for batch in validation(table, **options) for row in batch.tokens.tolist()]


FORMATS = {
    "comma.csv": delimited(",", PAIRS).encode(),
    "semicolon.csv": delimited(";", PAIRS).encode(),
    "bar.txt": delimited("|", PAIRS).encode(),
    "tabs_in.csv": delimited("\t", PAIRS).encode(),
    "with_bom.tsv": delimited("\t", PAIRS).encode("utf-8-sig"),
    "comma_with_bom.csv": delimited(",", PAIRS).encode("utf-8-sig"),
    "unix.csv": delimited(",", PAIRS).replace("\r\n", "\n").encode(),
    "no_end_of_line.csv": delimited(",", PAIRS).rstrip().encode(),
    "lines.jsonl": json_lines(PAIRS).encode(),
    "lines_with_bom.jsonl": json_lines(PAIRS).encode("utf-8-sig"),
    "lines.json": json_lines(PAIRS).encode(),
    "array.json": json.dumps([{"image": i, "caption": c} for i, c in PAIRS], indent=1).encode(),
    "utf16.csv": delimited(",", PAIRS).encode("utf-16"),
    "utf16_big.tsv": codecs.BOM_UTF16_BE + delimited("\t", PAIRS).encode("utf-16-be"),
    "utf16.jsonl": json_lines(PAIRS).encode("utf-16"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_batches(folder: Path, name: str) -> None:
    (folder / name).write_bytes(FORMATS[name])
    batches = validation(folder / name)
    assert [len(batch.keys) for batch in batches] == [5, 5, 2]
    assert [key for batch in batches for key in batch.keys] == [image for image, _ in PAIRS]
    rows = iter(PAIRS)
    for batch in batches:
        for image, tokens in zip(batch.images, batch.tokens, strict=True):
            file, caption = next(rows)
            assert torch.equal(image, pixels(TINY)(Image.open(folder / file)))
            assert tokens[: tokens.argmax() + 1].tolist() == [t for t in tokenize(caption)[0].tolist() if t]


@pytest.mark.parametrize(
    "header",
    ["Image,Caption", "FILEPATH,TITLE", "filename,text", " image , caption ", "Caption,image", "x,y", "x,y,image,text"],
)
def test_columns_are_found_by_usual_names_in_any_case_or_by_option(folder: Path, header: str) -> None:
    rows = ["a.png,a cat", "b.png,a dog"]
    if header.startswith("Caption"):
        rows = ["a cat,a.png", "a dog,b.png"]
    if header == "x,y,image,text":  # what is named takes precedence
        rows = [f"{row},b.png,a dog" for row in rows]
    (folder / "t.csv").write_text("\n".join([header, *rows]))
    named = {"columns": Columns("x", "y")} if header.startswith("x,y") else {}
    assert captions(folder / "t.csv", **named) == ["a cat", "a dog"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("option", ["image", "caption"])
def test_unknown_column_is_an_error_that_lists_the_columns_found(folder: Path, suffix: str, option: str) -> None:
    table = folder / f"t.{suffix}"
    columns = ["image", "caption", "Licence"]
    text = ",".join(columns) + "\na.png,a cat,MIT" if suffix == "csv" else json.dumps(dict.fromkeys(columns, "a"))
    table.write_text(text)
    message = message_of(lambda: validation(table, columns=Columns(**{option: "kaption"})))
    assert "t." + suffix in message
    assert "'kaption'" in message
    assert "image, caption, Licence" in message
    assert f"set --data.columns.{option}" in message


@pytest.mark.parametrize(
    ("header", "option"),
    [
        ("photo,caption", "for example, set --data.columns.image photo"),
        ("label,image", "for example, set --data.columns.caption label"),
        ("image", "beside the images in 'image' it has no column"),
        ("photos/1.jpg,a cat", "its first line looks like an image's: put a line with the columns' names above it"),
        ("image,my words", "for example, set --data.columns.caption 'my words'"),
    ],
)
def test_unusual_column_names_are_listed_with_the_option_to_set(folder: Path, header: str, option: str) -> None:
    (folder / "t.csv").write_text(header + "\na.png,a cat")
    message = message_of(lambda: validation(folder / "t.csv"))
    assert "t.csv" in message
    assert header.replace(",", ", ") in message
    assert option in message


def test_relative_paths_start_at_the_folder_of_the_table_or_at_root_and_absolute_ones_at_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(tmp_path / "beside", "a.png")
    paint(tmp_path / "elsewhere", "other.png", "a.png")
    (tmp_path / "beside/t.csv").write_text("image,caption\na.png,a cat")
    monkeypatch.chdir(tmp_path / "elsewhere")  # the working directory does not matter
    (beside,) = validation(tmp_path / "beside/t.csv")
    (elsewhere,) = validation(tmp_path / "beside/t.csv", columns=Columns(root=str(tmp_path / "elsewhere")))
    assert beside.images[0, :, 0, 0].tolist() == [9, 255, 0]
    assert elsewhere.images[0, :, 0, 0].tolist() == [29, 235, 1]
    assert beside.keys == elsewhere.keys == ["a.png"]
    (tmp_path / "t.csv").write_text(f"image,caption\n{tmp_path / 'beside/a.png'},a cat")
    (absolute,) = validation(tmp_path / "t.csv", columns=Columns(root="nowhere"))
    assert absolute.images[0, :, 0, 0].tolist() == [9, 255, 0]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_without_a_caption_are_left_out_and_counted(folder: Path, messages: list[str], suffix: str) -> None:
    blank: list[str | float | None] = ["", "  ", "nan", "NaN", "None", "null", "NULL"]
    if suffix == "jsonl":
        blank += [None, float("nan")]
    values = ["a cat", *blank, "nan bread"]
    table = folder / f"t.{suffix}"
    lines = [json.dumps({"image": "a.png", "caption": value}) for value in values]
    table.write_text(
        "\n".join(lines) if suffix == "jsonl" else delimited(",", [("a.png", str(value)) for value in values])
    )
    assert captions(table) == ["a cat", "nan bread"]
    (message,) = [message for message in messages if "t." + suffix in message]
    assert "2 pairs" in message
    assert f"{len(blank)} rows without a caption left out; the first: {table} " in message
    assert rank_zero.log.isEnabledFor(logging.INFO)  # so it is shown


BROKEN: dict[str, tuple[str, bytes | None, list[str]]] = {
    "missing table": ("t.csv", None, ["no such file or folder"]),
    "empty file": ("t.csv", b"", ["is empty"]),
    "empty JSON lines": ("t.jsonl", b"\n", ["is empty"]),
    "header only": ("t.csv", b"image,caption\n", ["only a header"]),
    "all blank": ("t.csv", b"image,caption\na.png,\na.png,nan\nb.png, \n", ["no row", "3"]),
    "missing image file": ("t.csv", b"image,caption\na.png,a cat\nnone.png,a dog\n", ["row 3", "none.png", "no such"]),
    "missing image in JSON": ("t.jsonl", b'{"image": "no.png", "caption": "a"}\n', ["row 1", "no.png", "no such"]),
    "after lines in a caption": ("t.csv", b'image,caption\na.png,"two\nlines"\n\nno.png,a dog\n', ["row 4", "no.png"]),
    "after blank captions": ("t.csv", b"image,caption\na.png,\nb.png,nan\nno.png,a dog\n", ["row 4", "no.png"]),
    "text named .jpg": ("t.csv", b"image,caption\ntext.jpg,a cat\n", ["row 2", "text.jpg", "not an image"]),
    "folder as image": ("t.csv", b"image,caption\na.png,a cat\nin a folder,a cat\n", ["row 3", "in a folder"]),
    "too many fields": ("t.csv", b"image,caption\na.png,a cat\nb.png,a dog, a bone\n", ["row 3", "3 fields", "quote"]),
    "too few fields": ("t.csv", b"image,caption,year\na.png,a cat,1999\nb.png,a dog\n", ["row 3", "2 fields", "3"]),
    "row without image": ("t.csv", b"image,caption\na.png,a cat\n ,a dog\n", ["row 3", "no image", "'image'"]),
    "JSON without image": ("t.jsonl", b'{"image":"a.png","caption":"a"}\n{"caption":"b"}\n', ["row 2", "no image"]),
    "image is a number": ("t.jsonl", b'{"image": 7, "caption": "a"}\n', ["row 1", "no image"]),
    "caption is a number": ("t.jsonl", b'{"image": "a.png", "caption": 7}\n', ["row 1", "not text", "7"]),
    "caption is an object": (
        "t.jsonl",
        b'{"image": "a.png", "caption": {"a": 1}}\n',
        ["row 1", "not text", "{'a': 1}"],
    ),
    "number among captions": ("t.jsonl", b'{"image":"a.png","caption":["a",7]}\n', ["row 1", "not text", "['a', 7]"]),
    "half a character": ("t.jsonl", b'{"image": "a.png", "caption": "\\ud83c"}\n', ["row 1", "UTF-8"]),
    "broken JSON": ("t.jsonl", b'{"image": "a.png", "caption": "a"}\n{"image": "a.png",\n', ["row 2", "not JSON"]),
    "JSON list": ("t.jsonl", b'["a.png", "a cat"]\n', ["row 1", "not a JSON object"]),
    "not UTF-8": ("t.csv", "image,caption\na.png,un caf\xe9\n".encode("latin-1"), ["UTF-8", "row 2"]),
    "UTF-16 without its mark": ("t.csv", VALID.encode("utf-16-le"), ["row 1", "UTF-8", "byte 1"]),
    "half of UTF-16": ("t.csv", VALID.encode("utf-16")[:-1], ["UTF-16"]),
    "unclosed quote": ("t.csv", b'image,caption\na.png,a cat\nb.png,"a dog\na.png,a cat\n', ["row 3"]),
    "text after a quote": ("t.csv", b'image,caption\na.png,a cat\nb.png,"a" dog\na.png,a cat\n', ["row 3"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_table_is_an_error_that_names_file_and_row(folder: Path, case: str) -> None:
    name, content, expected = BROKEN[case]
    (folder / "text.jpg").write_text("not an image")
    if content is not None:
        (folder / name).write_bytes(content)
    message = message_of(lambda: module_of(val=str(folder / name)))
    for part in [name, *expected]:
        assert part in message


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_invalid_utf8_in_a_long_file_is_located(folder: Path, name: str) -> None:
    """Beyond the first buffer that Python reads, its row is right."""
    first, row = ("image,caption\n", "a.png,{}\n") if name == "t.csv" else ("", '{{"image":"a.png","caption":"{}"}}\n')
    content = (first + row.format("a cat") * 3000 + row.format("un café")).encode("latin-1")
    (folder / name).write_bytes(content)
    message = message_of(lambda: module_of(val=str(folder / name)))
    assert name in message
    assert "UTF-8" in message
    assert f"row {len(content.splitlines())}" in message


def test_truncated_image_is_an_error_that_names_its_row_when_read(folder: Path) -> None:
    noise = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "t.csv").write_text("image,caption\na.png,a cat\ncut.jpg,a dog\n")
    module = module_of(val=str(folder / "t.csv"))  # its header is intact
    message = message_of(lambda: list(module.val_dataloader()))
    for part in ("t.csv", "row 3", "cut.jpg", "truncated"):
        assert part in message


def open_table(path: Path, **options: Any) -> Any:
    return text_table.open_table(path, SourceOptions(**options))


def test_list_of_captions_is_one_pair_whose_caption_is_drawn_by_the_samples_seed(folder: Path) -> None:
    rows = [{"image": "a.png", "caption": ["one", None, "two", " ", "three"]}, {"image": "b.png", "caption": "alone"}]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"image": "b.png", "caption": []}]))
    source = open_table(folder / "t.jsonl")
    assert len(source) == 2
    assert source.left_out.counts == {"no caption": 1}
    assert source.captions(0) == ["one", "two", "three"]
    assert source.load(0, None).caption == "one"
    drawn = [source.load(0, random.Random(seed)).caption for seed in range(40)]
    assert drawn == [random.Random(seed).choice(["one", "two", "three"]) for seed in range(40)]
    assert {source.load(1, random.Random(seed)).caption for seed in range(9)} == {"alone"}


BAD_ROWS = {  # a bad row, and the reason that it is counted under
    "t.csv": [
        ("b.png,a dog, a bone", "wrong number of fields"),
        (" ,a dog", "missing image"),
        ("b.png,", "no caption"),
        ("b.png,un caf\udce9", "not UTF-8"),
    ],
    "t.jsonl": [
        ('{"image": "b.png",', "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"image": 3, "caption": "a"}', "missing image"),
        ('{"image": "b.png", "caption": 3}', "caption is not text"),
        ('{"image": "b.png", "caption": "\\udc00"}', "not UTF-8"),
    ],
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_left_out_and_counted_by_reason_with_on_error_skip(folder: Path, name: str) -> None:
    good = {"t.csv": ["image,caption", "a.png,a cat"], "t.jsonl": ['{"image": "a.png", "caption": "a cat"}']}[name]
    bad = BAD_ROWS[name]
    lines = [*good, *(line for line, _ in bad), good[-1]]
    (folder / name).write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    source = open_table(folder / name, on_error="skip")
    assert [source.captions(i) for i in range(len(source))] == [["a cat"], ["a cat"]]
    first = len(good) + 1
    expected = [(f"{folder / name} row {first + i}", reason) for i, (_, reason) in enumerate(bad)]
    assert source.left_out.listed == expected
    assert source.left_out.counts == {reason: 1 for _, reason in bad}
    assert source.cells(1).where == f"{folder / name} row {first + len(bad)}"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_large_table_is_converted_once_and_then_mapped(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit above which a table is large is lowered here."""
    text = delimited(",", [*PAIRS, ("a.png", "nan")]) if name == "t.csv" else json_lines([*PAIRS, ("a.png", "nan")])
    (folder / name).write_text(text, newline="")
    small = open_table(folder / name)
    monkeypatch.setattr(text_table, "IN_MEMORY", 10)
    monkeypatch.setattr(text_table, "BATCH_ROWS", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    mapped = open_table(folder / name)
    (file,) = (folder / "cache/lit-clip/tables").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(text_table, "_delimited_rows", None)
        patch.setattr(text_table, "_json_lines", None)  # nothing is read again
        again = open_table(folder / name)
    sent = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 2000
    for source in (mapped, again, sent):
        assert len(source) == len(small) == len(PAIRS)
        assert [source.cells(i) for i in range(len(PAIRS))] == [small.cells(i) for i in range(len(PAIRS))]
        assert source.left_out.counts == small.left_out.counts == {"no caption": 1}
        assert source.left_out.listed == small.left_out.listed
    with (folder / name).open("a", newline="") as stream:
        stream.write("a.png,one more\r\n" if name == "t.csv" else '{"image": "a.png", "caption": "one more"}\n')
    assert len(open_table(folder / name)) == len(PAIRS) + 1
    assert file.is_file()


def test_broken_large_table_leaves_nothing_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_table, "IN_MEMORY", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "t.csv").write_text("image,caption\na.png,a cat\nb.png,a dog, a bone\n")
    assert "row 3" in message_of(lambda: open_table(folder / "t.csv"))
    assert not list((folder / "cache/lit-clip/tables").iterdir())


def test_unwritable_cache_is_an_error_that_names_the_variable_to_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_table, "IN_MEMORY", 10)
    (folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    (folder / "t.csv").write_text(VALID)
    assert "XDG_CACHE_HOME" in message_of(lambda: open_table(folder / "t.csv"))


def test_read_returns_the_image_file_unchanged(folder: Path) -> None:
    (folder / "t.csv").write_text(VALID + "none.png,a bird\n")
    source = open_table(folder / "t.csv")
    pair = source.read(1)
    where = f"{folder / 't.csv'} row 3"
    assert pair[:5] == ((folder / "b.png").read_bytes(), ["a dog"], "b.png", "", where)
    with pytest.raises(BadSample) as error:
        source.read(2)
    assert (error.value.where, error.value.reason) == (f"{folder / 't.csv'} row 4", "missing image")
