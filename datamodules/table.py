"""Captions in a table: CSV, TSV or JSON lines."""

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.augmentation import Augmentation
from datamodules.captions import CaptionDataModule, Pair, PairSource
from datamodules.images import check_images, open_image
from lit_clip.config import Preprocessing
from lit_clip.errors import InputError
from lit_clip.tokenizer import TextTokenizer

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "file", "img")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "sentence")
BLANK = frozenset({"", "nan", "none", "null", "n/a", "<na>"})  # what spreadsheets and pandas write for "no caption"
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Row:
    """One usable row: its number in the file (a header is row 1), the image as written, the caption, its group."""

    number: int
    image: str
    caption: str
    group: str = ""


def _delimited(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        if not header.strip():
            return
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        number = 1
        try:
            columns = [column.strip() for column in next(reader)]
            if twice := [column for i, column in enumerate(columns) if column in columns[:i]]:
                raise InputError(f"{path} row 1: two columns are called {twice[0]!r}; rename one")
            for number, values in enumerate(reader, start=2):
                if not values:
                    continue
                if len(values) != len(columns):
                    raise InputError(
                        f"{path} row {number}: {len(values)} fields, the header has {len(columns)}; "
                        f"put captions that contain {delimiter!r} in double quotes"
                    )
                yield number, dict(zip(columns, values, strict=True))
        except csv.Error as error:
            raise InputError(f"{path} row {number + 1}: {error}; look at its double quotes") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path} row {number}: not JSON ({error}); one object a line is wanted") from error
            if not isinstance(values, dict):
                raise InputError(
                    f"{path} row {number}: not a JSON object with an image and a caption; one a line is wanted"
                )
            yield number, values


def _not_utf8(path: Path) -> InputError:
    """Where a file stops being UTF-8; the reader's own error counts from its last buffer."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        return InputError(f"{path} row {row}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")
    return InputError(f"{path}: changed while it was read")


def _column(path: Path, found: list[str], wanted: str | None, usual: tuple[str, ...], argument: str) -> str:
    if wanted is not None:
        if wanted in found:
            return wanted
        raise InputError(f"{path}: no column {wanted!r}; its columns are {', '.join(found)}; set {argument}")
    lowered = {column.lower(): column for column in reversed(found)}
    for name in usual:
        if name in lowered:
            return lowered[name]
    raise InputError(
        f"{path}: none of its columns ({', '.join(found)}) is called {' or '.join(usual[:3])}; set {argument}"
    )


def _columns(
    path: Path, found: list[str], image_column: str | None, caption_column: str | None, group_column: str | None
) -> tuple[str, str]:
    """Those of the image and of the caption; that of the group, if one is wanted, is there."""
    image = _column(path, found, image_column, IMAGE_COLUMNS, "image_column")
    caption = _column(path, found, caption_column, CAPTION_COLUMNS, "caption_column")
    if image == caption:
        raise InputError(f"{path}: column {image!r} cannot be both the image and the caption")
    if group_column is not None:
        _column(path, found, group_column, (), "group_column")
    return image, caption


def _group(values: Mapping[str, Any], column: str | None) -> str:
    """What a row's group is called; numbers of a JSON file are names too."""
    name = "" if column is None or values.get(column) is None else str(values[column]).strip()
    return "" if name.lower() in BLANK else name


def read_table(
    path: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
) -> tuple[list[Row], int]:
    """The rows of a table that have a caption, and how many have none.

    Args:
        path: ``.jsonl``, ``.tsv``, or anything else for a delimited file with a header (the delimiter is detected).
        image_column: None: the first of ``IMAGE_COLUMNS`` that the table has.
        caption_column: None: the first of ``CAPTION_COLUMNS``.
        group_column: None: there are no groups.

    Raises:
        InputError: no such file, no such column, an empty table, a row that does not fit, or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such table")
    records = _json_lines(path) if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else _delimited(path)
    rows, blank, columns = [], 0, None
    try:
        for number, values in records:
            if columns is None:
                columns = _columns(path, list(values), image_column, caption_column, group_column)
            image, caption = (values.get(column) for column in columns)
            if not isinstance(image, str) or not image.strip():
                raise InputError(f"{path} row {number}: no image in column {columns[0]!r}")
            if caption is None or str(caption).strip().lower() in BLANK:
                blank += 1
                continue
            if not isinstance(caption, str):
                raise InputError(f"{path} row {number}: the caption in column {columns[1]!r} is not text: {caption!r}")
            rows.append(Row(number, image.strip(), caption, _group(values, group_column)))
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    if not rows:
        raise InputError(f"{path}: no row with an image and a caption ({blank} without a caption)")
    return rows, blank


class TablePairs(PairSource):
    """The pairs of a table's rows.

    Args:
        path: the table, named in errors.
        rows: what to read of it.
        root: where relative image paths start.
    """

    def __init__(self, path: Path, rows: list[Row], root: Path) -> None:
        self.path, self.rows, self.root = path, rows, root
        check_images([(root / row.image, f"{path} row {row.number}") for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, rng: random.Random | None) -> Pair:
        row = self.rows[index]
        image = open_image(self.root / row.image, f"{self.path} row {row.number}")
        return Pair(image, row.caption, row.image, row.group)


class CaptionTable(CaptionDataModule):
    """Pairs from a table with a column of image paths and a column of captions.

    Rows without a caption (empty, ``nan``, ``none``, ``null``) are dropped and counted.

    Args:
        train: a ``.csv``, ``.tsv`` or ``.jsonl`` file; needed by ``fit`` only.
        val: likewise; None: a tenth of the images of ``train``, chosen by ``seed``.
        root: where relative image paths start; None: the folder of the table.
        image_column: None: detected.
        caption_column: None: detected.
        group_column: names the group of pairs that say the same (a product, say), for ``model.duplicates``.
        batch_size: pairs a step on each rank.
        global_batch_size: pairs a training step on all ranks together, however many they are; ``batch_size`` is then
            that of validation alone. None: ``batch_size`` on each rank.
        num_workers: processes that read and augment.
        seed: of the order, the augmentation and the division.
        augmentation: in training.
        preprocessing: how the model wants its pictures; the command line takes it from the model.
        tokenize: texts -> int64 ``[N, L]``; the command line takes it from the model.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        root: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing | None = None,
        tokenize: TextTokenizer | None = None,
        global_batch_size: int | None = None,
        group_column: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augmentation, preprocessing, tokenize, global_batch_size)
        if train is None and val is None:
            raise InputError("data: give train, val or both; each is a table of images and captions")
        self.train, self.val, self.root = train, val, root
        self.image_column, self.caption_column, self.group_column = image_column, caption_column, group_column

    def _rows(self, table: str) -> list[Row]:
        rows, blank = read_table(Path(table), self.image_column, self.caption_column, self.group_column)
        if blank:
            rank_zero_info(f"{table}: {len(rows)} pairs, {blank} rows without a caption left out")
        return rows

    def _pairs(self, table: str, rows: list[Row]) -> TablePairs:
        return TablePairs(Path(table), rows, Path(self.root) if self.root else Path(table).parent)

    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        if self.train is None and fit:
            raise InputError("data.init_args.train: fit needs a table to train on")
        if self.val is not None:
            train = self._pairs(self.train, self._rows(self.train)) if fit and self.train else None
            return train, self._pairs(self.val, self._rows(self.val))
        assert self.train is not None
        rows = self._rows(self.train)
        images = sorted({row.image for row in rows})
        if len(images) < 2:
            raise InputError(f"{self.train}: one image cannot be divided; give data.init_args.val")
        chosen = set(random.Random(self.seed).sample(images, max(1, int(VALIDATION_SHARE * len(images)))))
        train = [row for row in rows if row.image not in chosen]
        val = [row for row in rows if row.image in chosen]
        return self._pairs(self.train, train) if fit else None, self._pairs(self.train, val)
