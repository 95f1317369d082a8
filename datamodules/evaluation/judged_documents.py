"""Queries, documents and graded relevance, in the file formats of BEIR and of mteb's data sets on the hub."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.data import Items, JudgedDocuments, MissingData
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.hub_client import is_relative
from lit_clip.tools.images import image_for_model
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import convert, entries, shortened
from ..pairs.column_names import is_encoded
from ..pairs.parquet import chunks_of, open_file
from .annotation_files import AGAIN, number, read_json_lines, read_table
from .own_classes import StoredImages

SUFFIXES = (".parquet", ".jsonl", ".tsv")
PLACES = ("{}/*", "{}.*", "{}-*")  # of a table's files
SPLIT = re.compile(r"(.+?)(-\d{5}-of-\d{5})?")  # in the name of a file
Id = str | int
ITEM = {"id": Id, "_id": Id, "title": str | None, "text": str | None, "image": Any}
JUDGEMENT = {"query-id": Id, "corpus-id": Id, "score": float}


class QueriesAndDocuments(StoredImages, JudgedDocuments):
    """A folder of queries, documents and judgements, in the layout of mteb's data sets or BEIR's.

    ``corpus``, ``queries`` (or ``query``) and ``qrels`` (or ``default``) are folders or beginnings of files' names, of
    ``.parquet``, ``.jsonl`` or, for judgements, ``.tsv``. Queries and documents have columns ``id`` or ``_id`` and some
    of ``title`` (put before the text), ``text`` and ``image`` (bytes, a struct of ``bytes`` and ``path``, or a path
    below the folder). Judgements have ``query-id``, ``corpus-id`` and ``score``; queries without one are left out.

    Args:
        root: the folder.
        split: of all three; where there is only one, its name does not matter.
    """

    def __init__(self, root: str, split: str = "test") -> None:
        self.root = Path(root)
        self._images: list[tuple[str, Path | tuple[Path, int, int]]] = []  # key, and file or place in a parquet file
        tables = (("qrels", "default"), ("queries", "query"), ("corpus",))
        qrels, queries, corpus = (_files(self.root, names, split) for names in tables)
        self.annotation_paths = [*qrels, *queries, *corpus]
        self.split = SPLIT.sub(r"\1", qrels[0].stem)  # of the judgements
        judged: dict[tuple[str, str], int] = {}  # if a pair has several grades the last counts, as in mteb
        for file, row in _rows(qrels, JUDGEMENT):
            pair, grade = (str(row["query-id"]), str(row["corpus-id"])), row["score"]
            whole = grade % 1 == 0 and abs(grade) < 2**31
            require(whole, f"{file}: the score {grade} of {shortened(pair)} must be a whole number; fix the row")
            judged[pair] = int(grade)
        require(bool(judged), f"{qrels[0]}: no rows; {AGAIN}")
        self.queries = self._items("query", queries, {query for query, _ in judged})
        self.documents = self._items("document", corpus)
        query_row, document_row = (
            {key: row for row, key in enumerate(items.keys)} for items in (self.queries, self.documents)
        )
        try:
            self.relevance = [(query_row[query], document_row[key], grade) for (query, key), grade in judged.items()]
        except KeyError as error:
            raise InputError(f"{qrels[0]}: {shortened(error.args[0])} is the id of no query or document") from error

    def _items(self, kind: str, files: Sequence[Path], wanted: Collection[str] | None = None) -> Items:
        """Read queries or documents, only the wanted ones if given, and record their images."""
        items, seen = Items([], [], []), set[str]()
        for file, row in _rows(files, ITEM):
            key, image = str(row.get("id", row.get("_id", ""))), row.get("image")
            if wanted is not None and key and key not in wanted:
                continue
            text = " ".join(filter(None, ((row.get(name) or "").strip() for name in ("title", "text"))))
            problem = "" if key else "is no id; its column must be called id or _id"
            if key in seen:
                problem = "is the id of two rows; keep one"
            elif image and not isinstance(image, tuple) and not is_relative(image):
                problem = f"has the image {shortened(image)}, which must be a path below the folder"
            elif not text and not image:
                problem = "has neither a text nor an image; remove the row"
            if problem:
                raise InputError(f"{file}: {shortened(key)} {problem}")
            seen.add(key)
            items.keys.append(key)
            items.texts.append(text)
            items.images.append(len(self._images) if image else -1)
            if image:
                self._images.append((f"{kind} {key}", self.root / image if isinstance(image, str) else image))
        return items

    def __len__(self) -> int:
        return len(self._images)

    def images(self, index: int) -> list[Image.Image]:
        key, place = self._images[index]
        where = f"{self.root}: {key}"
        return [image_for_model(place, where) if isinstance(place, Path) else self.stored(*place, "image", where)]

    def key(self, index: int) -> str:
        return self._images[index][0]

    def image_paths(self) -> list[Path]:
        return list(dict.fromkeys(place if isinstance(place, Path) else place[0] for _, place in self._images))

    def stamp(self) -> str:
        files = (path for path in self.image_paths() if os.path.isfile(path))
        return f"{hex_digest(key for key, _ in self._images)}-{stamp_of_files(files)}"


def _files(root: Path, names: Sequence[str], split: str) -> list[Path]:
    """Return a table's files for the split, or for its only split."""
    for name, place in product(names, PLACES):
        if files := sorted(path for path in root.glob(place.format(name)) if path.suffix in SUFFIXES):
            files = [path for path in files if path.suffix == files[0].suffix]
            splits = [match[1] for path in files if (match := SPLIT.fullmatch(path.stem))]
            chosen = [path for path, of in zip(files, splits, strict=True) if of == split or len(set(splits)) == 1]
            found = listed(list(dict.fromkeys(splits)))
            if not chosen:
                raise InputError(f"{files[0].parent}: no split {split!r} of {name}; set split to one of {found}")
            return chosen
    raise MissingData(f"{root}: no {names[0]} in it (a folder or file of {', '.join(SUFFIXES)})")


def _rows(files: Sequence[Path], columns: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield rows with the columns that exist; a stored image is ``(file, row group, row)``."""
    kind = entries(columns, total="score" in columns)
    for path in files:
        if path.suffix == ".jsonl":
            rows = read_json_lines(path, kind)
        elif path.suffix == ".tsv":
            table = read_table(path, {name: (name,) for name in columns}, "\t")
            rows = ({**row, "score": number(row, "score", str(path))} for row in table)
        else:
            rows = _parquet_rows(path, columns)
        for place, row in enumerate(rows):
            with naming(f"{path} row {place}"):
                convert(row, kind)
            yield path, row


def _parquet_rows(path: Path, columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    file = open_file(path)
    there = file.schema_arrow.names
    names = [name for name in columns if name in there and name != "image"]
    require(bool(names), f"{path}: no column {' or '.join(columns)}; its columns are {listed(there, 20)}")
    for group in range(file.num_row_groups):
        with reading(path, "parquet file"):
            rows = file.read_row_group(group, columns=names, use_threads=False).to_pylist()
            images = _images(file, group, len(rows)) if {"image"} <= columns.keys() & set(there) else [None] * len(rows)
        for place, (row, image) in enumerate(zip(rows, images, strict=True)):
            yield {**row, "image": (path, group, place) if isinstance(image, bytes) else image}


def _images(file: pq.ParquetFile, group: int, rows: int) -> list[Any]:
    """Return each row's image as a path or bytes; empty bytes, unread, if every row stores an image."""
    kind = file.schema_arrow.field("image").type
    leaf = chunks_of(file, group, ["image"]).get("image.bytes" if pa.types.is_struct(kind) else "image")
    counts = leaf and leaf.statistics
    if is_encoded(kind) and counts and counts.has_null_count and not counts.null_count:
        return [b""] * rows
    values = file.read_row_group(group, columns=["image"], use_threads=False)["image"].to_pylist()
    return [value.get("bytes") or value.get("path") if isinstance(value, dict) else value for value in values]
