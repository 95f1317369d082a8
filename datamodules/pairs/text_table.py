"""Captions in a text table: CSV, TSV, or JSON objects."""

import codecs
import csv
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.own_files import cache_file, made_once
from ..loading.bad_samples import is_blank, is_unicode
from .column_names import ColumnNames, find_columns
from .columns import TablePairs, checked_title, checked_weight, group_name, map_valid_table
from .source import COLUMNS, IMAGES_OF, JSON_LINES, NO_CAPTION, PairSource, SkippedRows, SourceOptions

IN_MEMORY = 64 << 20  # bytes; a larger file is converted once to an Arrow file, which is memory-mapped
LONGEST_FIELD = 16 << 20  # characters; a double quote that is not closed makes one field of the rest of the file
SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # first line with which Excel is told the delimiter
MARKS = {  # encodings by byte order mark; UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NOT_UTF8 = "not UTF-8", "not UTF-8 text; save it as UTF-8"  # reason and detail
BATCH_ROWS, BATCH_CHARACTERS = 16_384, 8 << 20
MOST_IMAGES = 1000  # of a row: each is a row with a copy of its captions
LAYOUT = 8  # of that Arrow file; a new number makes old ones be written again
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "caption": pa.list_(pa.string()),
        "group": pa.string(),
        "negative": pa.list_(pa.string()),
        "weight": pa.float32(),
        "title": pa.string(),
        "number": pa.int64(),
    }
)


class RawRow(NamedTuple):
    """A row as written: its number in the file (a header is row 1) and its cells.

    It becomes a row of an Arrow table, that a ``Row`` of :mod:`datamodules.pairs.source` when it is read, that a
    ``Pair`` with one caption, and pairs a :class:`lit_clip.CaptionBatch`.
    """

    number: int
    image: Any
    caption: Any
    group: Any = None
    negative: Any = None
    weight: Any = None
    title: Any = None


OPTIONAL = RawRow._fields[3:]  # names of the cells that a table need not have
Record = tuple[int, Mapping[str, Any]]
FindColumns = Callable[[list[str]], ColumnNames]  # the names of a table's columns -> the ones to read


class Problems:
    """Raise an error for an unreadable row, or with ``skip`` leave the row out and count it."""

    def __init__(self, path: Path, skip: bool, label: str = "row") -> None:
        self.path = path
        self.skip = skip
        self.label = label
        self.left_out = SkippedRows()
        self.columns = ColumnNames(["image"], ["caption"])  # the reader sets the file's before it yields a row

    def add(self, number: int, reason: str, detail: str) -> None:
        """Raise or count a problem of a row."""
        if not self.skip:
            raise BadSample(self.where(number), reason, detail)
        self.left_out.add(self.where(number), reason)

    def where(self, number: int) -> str:
        return f"{self.path} {self.label} {number}"


def _encoding(path: Path) -> str:
    """Return UTF-16 or UTF-32 if the byte order mark says so, otherwise UTF-8."""
    with path.open("rb") as file:
        start = file.read(4096)
    marked = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)
    if marked is not None:
        return marked
    if b"\0" in start:
        raise InputError(f"{path} row 1: not UTF-8 text (zero at byte {start.index(0)}); save it as UTF-8")
    return "utf-8-sig"


def _open_text(path: Path) -> TextIO:
    encoding = _encoding(path)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"  # so that the bad row can be named
    return path.open(encoding=encoding, errors=errors, newline="")


def _delimiter(path: Path, file: TextIO) -> tuple[str, int]:
    """Return the delimiter and the number of lines before the header; the header is read next."""
    before = 0
    while (header := file.readline()) and not header.strip():
        before += 1
    separator = SEPARATOR.fullmatch(header)
    if separator is None:
        file.seek(0)
        for _ in range(before):
            file.readline()
    before += separator is not None
    tabs = path.suffix.lower() == ".tsv" and "\t" in header
    return separator[1] if separator else "\t" if tabs else max(",;\t|", key=header.count), before


def _delimited_rows(path: Path, find: FindColumns, problems: Problems) -> Iterator[RawRow]:
    with _open_text(path) as file:
        delimiter, number = _delimiter(path, file)
        csv.field_size_limit(LONGEST_FIELD)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            if not names:
                return
            number += 1
            require(is_unicode("".join(names)), f"{path} row {number}: {NOT_UTF8[1]}")
            columns = find(names)
            problems.columns = columns
            wanted = columns.names()
            places = {name: place for place, name in enumerate(names) if name in wanted}
            for values in reader:
                number += 1
                if not values:
                    continue
                if not is_unicode("".join(values)):
                    problems.add(number, *NOT_UTF8)
                elif len(values) == len(names):
                    yield raw_row(number, {name: values[place] for name, place in places.items()}, columns)
                else:
                    fields = f"{len(values)} fields, the header has {len(names)}"
                    hint = f"put captions that contain {delimiter!r} in double quotes"
                    problems.add(number, "wrong number of fields", f"{fields}; {hint}")
        except csv.Error as error:  # the end of the row is unknown, so it cannot be left out
            too_long = f"a field has more than {LONGEST_FIELD:,} characters; shorten it, or close its double quote"
            problem = too_long if "field limit" in str(error) else f"{error}; check its double quotes"
            raise InputError(f"{path} row {number + 1}: {problem}") from error


def raw_row(number: int, cells: Mapping[str, Any], columns: ColumnNames) -> RawRow:
    """Return a row from its cells by column name."""
    images, captions = ([cells.get(name) for name in names] for names in (columns.images, columns.captions))
    optional = (None if (name := getattr(columns, kind)) is None else cells.get(name) for kind in OPTIONAL)
    return RawRow(
        number, images[0] if len(images) == 1 else images, captions[0] if len(captions) == 1 else captions, *optional
    )


def _json_lines(path: Path, problems: Problems) -> Iterator[Record]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if not is_unicode(line):
                problems.add(number, *NOT_UTF8)
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.add(number, "not JSON", f"not JSON ({error}); write one object per line")
                continue
            yield number, values


def _record_rows(records: Iterable[Record], find: FindColumns, problems: Problems) -> Iterator[RawRow]:
    columns = None
    for number, values in records:
        if not isinstance(values, dict):
            detail = "not a JSON object with an image and a caption; write one per line"
            problems.add(number, "not a JSON object", detail)
            continue
        if columns is None:
            columns = find(list(values))
            problems.columns = columns
        yield raw_row(number, values, columns)


def usable_rows(rows: Iterable[RawRow], problems: Problems) -> Iterator[RawRow]:
    """Yield the rows with an image and a caption; other rows are errors, or are left out and counted.

    A row that lists several images is yielded once for each of them.
    """
    for row in rows:
        images = _paths(row.image)
        if not 0 < len(images) <= MOST_IMAGES:
            none = f"no image in column {problems.columns.images[0]!r}; add a path or remove the row"
            many = f"{len(images):,} images; list at most {MOST_IMAGES:,} in a row"
            problems.add(row.number, *(("too many images", many) if images else ("missing image", none)))
            continue
        captions, negatives = _not_blank(row.caption), _not_blank(row.negative)
        is_name = row.group is None or isinstance(row.group, str | int | float)
        if not captions:
            problems.left_out.add(problems.where(row.number), NO_CAPTION)
        elif not all(isinstance(caption, str) for caption in captions):
            problems.add(row.number, "caption is not text", f"the caption is not text: {shown(row.caption)}")
        elif not all(isinstance(negative, str) for negative in negatives):
            detail = f"the hard negative is not text: {shown(row.negative)}"
            problems.add(row.number, "hard negative is not text", detail)
        elif not is_name:
            problems.add(row.number, "group is not text", f"the group is not text: {shown(row.group)}")
        elif not is_unicode("".join([*images, *captions, *negatives, group_name(row.group)])):
            problems.add(row.number, *NOT_UTF8)
        else:
            columns, where = problems.columns, problems.where(row.number)
            try:
                weight = None if columns.weight is None else checked_weight(row.weight, columns.weight, where)
                title = None if columns.title is None else checked_title(row.title, columns.title, where)
            except BadSample as error:
                problems.add(row.number, error.reason, error.detail)
                continue
            of_row = f"{IMAGES_OF}{images[0]}" if isinstance(row.image, list) else ""
            texts = captions, group_name(row.group) or of_row, negatives or None, weight, title
            yield from (RawRow(row.number, image, *texts) for image in images)


def _paths(cell: Any) -> list[str]:
    """Return the image paths in a cell, which may be a list; empty if one value is not a path."""
    images = _not_blank(cell) if isinstance(cell, list) else [cell]
    usable = all(isinstance(image, str) and image.strip() for image in images)
    return [image.strip() for image in images] if usable else []


def shown(value: Any) -> str:
    """Return the beginning of a cell of any type, for a message."""
    return reprlib.repr(value)[:60]


def _not_blank(cell: Any) -> list[Any]:
    return [text for text in (cell if isinstance(cell, list) else (cell,)) if not is_blank(text)]


def record_batches(rows: Iterable[RawRow]) -> Iterator[pa.RecordBatch]:
    """Collect rows into record batches with limits on rows and characters."""
    waiting: list[RawRow] = []
    characters = 0
    for row in rows:
        waiting.append(row)
        characters += sum(map(len, row.caption)) + sum(map(len, row.negative or ())) + len(row.title or "")
        if len(waiting) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield _batch(waiting)
            waiting, characters = [], 0
    if waiting:
        yield _batch(waiting)


def _batch(rows: Sequence[RawRow]) -> pa.RecordBatch:
    return pa.record_batch(dict(zip(RawRow._fields, zip(*rows, strict=True), strict=True)), SCHEMA)


def raw_rows(path: Path, find: FindColumns, problems: Problems | None = None) -> Iterator[RawRow]:
    """Yield the rows of a text table as written, with unchecked cells; ``caption`` may be any column."""
    problems = problems or Problems(path, skip=False)
    try:
        if path.suffix.lower() in (*JSON_LINES, ".json"):
            yield from _record_rows(_json_lines(path, problems), find, problems)
        else:
            yield from _delimited_rows(path, find, problems)
    except UnicodeError as error:
        problem = f"not {_encoding(path).upper()} text, though its byte order mark says so"
        raise InputError(f"{path}: {problem}; save it as UTF-8") from error


def open_table(path: Path, options: SourceOptions) -> PairSource:
    """Open a text table; rows without a caption are left out and counted.

    It is UTF-8, or UTF-16 or UTF-32 with a byte order mark: ``.jsonl``, ``.ndjson`` or ``.json`` with an object per
    line, or else a delimited file with a header, whose delimiter is detected automatically.
    """
    options.refuse_split(path)
    find = partial(find_columns, path, options=options)
    return open_rows(path, options, lambda problems: raw_rows(path, find, problems))


def open_records(path: Path, values: list[Any], options: SourceOptions) -> PairSource:
    """Open a JSON file that consists of an array of objects."""
    options.refuse_split(path)
    records, find = enumerate(values, start=1), partial(find_columns, path, options=options)
    return open_rows(path, options, lambda problems: _record_rows(records, find, problems))


def open_rows(
    path: Path,
    options: SourceOptions,
    read: Callable[[Problems], Iterator[RawRow]],
    label: str = "row",
    find_root: Callable[[Path, str], Path] | None = None,
) -> PairSource:
    """Open the rows of a file that ``read`` yields; messages call their numbers ``label``.

    ``find_root`` finds the folder of an image where the user names none; None: the file's folder.
    """
    problems, mapped = Problems(path, options.on_error == "skip", label), None
    batches = record_batches(usable_rows(read(problems), problems))
    if path.stat().st_size > IN_MEMORY:
        split = (options.split, options.default_split)
        settings = (LAYOUT, *(getattr(options.columns, name) for name in COLUMNS), options.on_error, split)
        mapped = cache_file("tables", path, settings, ".arrow")

        def load(file: Path) -> tuple[pa.Table, SkippedRows]:
            return map_valid_table(file, SCHEMA), _read_left_out(file)

        def make(file: Path) -> None:
            rank_zero_info(f"{path}: converting it once to {mapped}")
            _write(file, batches, problems)

        table, left_out = made_once(mapped, load, make)
    else:
        table, left_out = pa.Table.from_batches(batches, SCHEMA), problems.left_out
    if not table.num_rows:
        require(left_out.counts.total() > 0, f"{path}: no rows; the file is empty or has only a header")
        raise InputError(f"{path}: no row with an image and a caption ({left_out})")
    folder = path.parent
    if find_root is not None and options.columns.root is None:
        folder = find_root(path, table["image"][0].as_py())
    return TablePairs(table, path, options.image_root(folder), label, mapped, left_out)


def _write(file: Path, batches: Iterator[pa.RecordBatch], problems: Problems) -> None:
    """Write the rows, then an empty batch; its metadata list the rows that were left out."""
    with pa.ipc.new_file(str(file), SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
        left_out = json.dumps([problems.left_out.counts, problems.left_out.listed])
        writer.write_batch(pa.RecordBatch.from_pylist([], SCHEMA), custom_metadata={"left_out": left_out})


def _read_left_out(mapped: Path) -> SkippedRows:
    with pa.memory_map(str(mapped)) as file:
        reader = pa.ipc.open_file(file)
        metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1).custom_metadata
    left_out = SkippedRows()
    counts, listed = json.loads(metadata[b"left_out"])
    left_out.counts.update(counts)
    left_out.listed = [(where, reason) for where, reason in listed]
    return left_out
