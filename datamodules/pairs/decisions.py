"""Tables of decisions on the pairs of a source: keep or drop, as commands propose and people edit them.

These columns decide; all others say why, and the order of the lines makes no difference:

- ``row``: of the source, from 0;
- ``pair``: :func:`pair_hash` of key and caption, as a whole number or as :func:`pair_text`; of a line on a whole row,
  of the key and no caption, or blank;
- ``decision``: ``keep`` or ``drop``;
- ``data``: :func:`label_of` the source, the same in all lines;
- ``captions``, only in findings: ``all`` of a line on a whole row, or such as ``1 of 5``;
- ``copy_of_row``, only in findings: the row with the same image, or blank.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_clip.errors import InputError, listed, require
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import reading
from ..near_duplicates import components
from .column_names import ColumnNames
from .source import DELIMITED, JSON_LINES, MAKE_AGAIN, PairSource, compute
from .text_table import raw_rows, shown

KEEP, DROP = "keep", "drop"
FINDINGS, ALL_PAIRS = "findings in", "every pair of"  # a pair that is not listed is kept; is dropped
TEXTS = ("decision", "data", "captions")
NEEDED, OPTIONAL = ("row", "pair", "decision", "data"), ("captions", "copy_of_row")
BLANK, WRONG = -(2**63), 1 - 2**63  # in place of a number
WHOLE_ROW = "all"  # captions of the row that a line decides on
LABEL = re.compile(rf"({FINDINGS}|{ALL_PAIRS}) (\d{{1,15}}) rows(?:, version [0-9a-f]{{16}})?")
OF_CAPTIONS = re.compile(r"1 of (\d{1,9})")
NUMBER = re.compile(r"(-?\d{1,19})(?:\.0*)?")
PAIR = re.compile(r"p([0-9a-f]{16})")
NO_NUMBER = f"{{}} is {{{{}}}}, no whole number or hash; {MAKE_AGAIN}"
TABLE_OF = "give a table of lit-clip inspect, overlap or score"
LINE = np.dtype([("row", "i8"), ("pair", "i8"), ("known", "?"), ("drop", "?"), ("captions", "i8"), ("copy_of", "i8")])
SCORED_LINE = np.dtype([("row", "i8"), ("pair", "i8"), ("drop", "?")])  # of a table of all pairs


def label_of(source: PairSource, kind: str) -> str:
    """Return the label of a table of ``FINDINGS`` or ``ALL_PAIRS``: its kind, and the source's size and version."""
    version = f", version {hex_digest(sorted(source.versions.items()))[:16]}" if source.versions else ""
    return f"{kind} {len(source)} rows{version}"


def pair_text(pair: int) -> str:
    """Return a hash as text that no spreadsheet rounds as a number."""
    return f"p{pair % 2**64:016x}"


class Copies(NamedTuple):
    """Rows that repeat another row's image, ascending, and the first row with that image for each: int64 ``[C]``."""

    rows: np.ndarray
    first: np.ndarray

    def first_of(self, rows: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.rows, rows).clip(max=max(0, len(self.rows) - 1))
        return np.where(self.rows[place] == rows, self.first[place], rows) if len(self.rows) else rows


@dataclass(frozen=True)
class Decisions:
    """Decisions on the pairs of a source: a list of all kept pairs, or of all dropped pairs.

    ``rows`` ascend, int ``[P]``; ``pairs`` are the hashes, int64 ``[P]``. Findings list only the rows of which some
    captions are dropped; the rows that are dropped whole are ``without``, int64, ascending.
    """

    label: str
    rows: np.ndarray
    pairs: np.ndarray
    without: np.ndarray
    lines: np.ndarray  # of findings, by row: LINE
    copies: Copies

    @property
    def keeps_listed(self) -> bool:
        return self.label.startswith(ALL_PAIRS)

    @property
    def size(self) -> int:
        return _size_of(self.label)

    @cached_property
    def kept_rows(self) -> np.ndarray:
        if not self.keeps_listed:
            return np.delete(np.arange(self.size, dtype=self.rows.dtype), self.without)
        first = np.diff(self.rows, prepend=-1) != 0
        return self.rows if first.all() else self.rows[first]

    def of_row(self, row: int) -> np.ndarray:
        start, stop = np.searchsorted(self.rows, np.array([row, row + 1], dtype=self.rows.dtype))
        return self.pairs[start:stop]


def read_decisions(path: Path) -> Decisions:
    """Read a table: parquet, delimited text, JSON lines, or a folder of parquet files, as Spark and Ray write one.

    Without any lines of findings its label is empty.
    """
    tables = _tables_of(path)
    filled = [table for table in tables if len(table.numbers)]
    if not filled:
        require(any("captions" in table.columns for table in tables), f"{path}: has no lines; {MAKE_AGAIN}")
        return _of_findings("", np.zeros(0, LINE))
    label = filled[0].label()
    lines = np.concatenate([table.read(label) for table in filled])
    if (np.diff(lines["row"]) < 0).any():
        lines = lines[np.argsort(lines["row"], kind="stable")]
    decisions = _of_all_pairs(path, label, lines) if label.startswith(ALL_PAIRS) else _of_findings(label, lines)
    kept = len(decisions.rows) if decisions.keeps_listed else decisions.size - len(decisions.without)
    require(kept > 0, f"{path}: keeps no pair; change some decisions to {KEEP}")
    return decisions


def joined(tables: Sequence[Decisions]) -> Decisions:
    """Join tables on one source: a pair is kept if every table keeps it."""
    findings = [table for table in tables if not table.keeps_listed]
    scores = [table for table in tables if table.keeps_listed]
    found = _of_findings(tables[0].label, np.concatenate([np.zeros(0, LINE), *(table.lines for table in findings)]))
    if not scores:
        return found
    first = scores[0]
    numbers = _numbers_of(first)
    kept = ~np.isin(first.rows, found.without) & ~_among(numbers, _numbers_of(found))
    for other in scores[1:]:
        kept &= _among(numbers, _numbers_of(other))
    return replace(first, rows=first.rows[kept], pairs=first.pairs[kept], lines=found.lines, copies=found.copies)


def _size_of(label: str) -> int:
    found = LABEL.fullmatch(label)
    return int(found[2]) if found else 0


def _numbers_of(found: Any) -> np.ndarray:
    """Return a number for each (row, pair) of decisions or lines, uint64 ``[P]``."""
    rows, pairs = (found.rows, found.pairs) if isinstance(found, Decisions) else (found["row"], found["pair"])
    return pairs.astype(np.uint64) ^ rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _among(numbers: np.ndarray, others: np.ndarray) -> np.ndarray:
    return compute.is_in(pa.array(numbers), value_set=pa.array(others)).to_numpy(zero_copy_only=False)


def _small(rows: np.ndarray, label: str) -> np.ndarray:
    return rows.astype(np.int32 if _size_of(label) < 2**31 else np.int64)


def _of_all_pairs(path: Path, label: str, lines: np.ndarray) -> Decisions:
    """Return the decisions of the lines; if two lines disagree about a pair, it is dropped."""
    drops, lines = lines[lines["drop"]], lines[~lines["drop"]]
    both = _among(_numbers_of(lines), _numbers_of(drops))
    if both.any() and path.is_dir():
        row = int(lines["row"][both].max())
        raise InputError(f"{path}: keeps and drops a pair of row {row}; its files are of several tables")
    lines, none = lines[~both], np.zeros(0, np.int64)
    rows, pairs = _small(lines["row"], label), np.ascontiguousarray(lines["pair"])
    return Decisions(label, rows, pairs, none, np.zeros(0, LINE), Copies(none, none))


def _of_findings(label: str, lines: np.ndarray) -> Decisions:
    """Return the decisions of the lines; a pair is dropped if one of its lines drops it."""
    drops = lines[lines["drop"]]
    whole, some = drops[drops["captions"] == 0], drops[drops["captions"] > 0]
    some = some[np.unique(some[["row", "pair"]], return_index=True)[1]]
    rows, first, counts = np.unique(some["row"], return_index=True, return_counts=True)
    most = np.maximum.reduceat(some["captions"], first) if len(some) else counts
    without = np.union1d(whole["row"], rows[counts >= most])
    some = some[~np.isin(some["row"], without)]
    copies = _copies(lines[(lines["copy_of"] >= 0) & ~np.isin(lines["row"], without)])
    return Decisions(label, _small(some["row"], label), some["pair"], without, lines, copies)


def _copies(lines: np.ndarray) -> Copies:
    """Follow the links between rows: a copy of a copy is a copy of the first."""
    links = np.stack([lines["row"], lines["copy_of"]])
    rows, numbers = np.unique(links, return_inverse=True)
    labels = components(numbers.reshape(links.shape), len(rows)) if len(rows) else np.zeros(0, np.int64)
    first = rows[np.unique(labels, return_index=True)[1][labels]] if len(rows) else rows
    return Copies(rows[rows != first], first[rows != first])


class _Lines(NamedTuple):
    """The lines of a file; a column that the file lacks is missing."""

    path: Path
    numbers: Sequence[int]  # of the lines, for messages
    columns: dict[str, pa.Array]

    def _check(self, wrong: np.ndarray, problem: str, values: pa.Array | np.ndarray | None = None) -> None:
        """Raise :class:`InputError` for the first wrong line; its value replaces the braces in ``problem``."""
        if wrong.any():
            place = int(wrong.argmax())
            value = values[place] if values is not None else None
            told = "" if value is None else shown(value.as_py() if isinstance(value, pa.Scalar) else value.item())
            raise InputError(f"{self.path} row {self.numbers[place]}: {problem.replace('{}', told)}")

    def label(self) -> str:
        label = str(self.columns["data"][0].as_py()).strip()
        wrong = np.array([LABEL.fullmatch(label) is None])
        self._check(wrong, f"data is {{}}, which no command writes; {MAKE_AGAIN}", np.array([label]))
        return label

    def read(self, label: str) -> np.ndarray:
        """Return the lines as ``LINE`` or ``SCORED_LINE``, except for rows left out when the source was opened.

        Of a line on a whole row ``captions`` is 0; a ``copy_of`` that is blank is -1.
        """
        other = f"data is not {label!r} as in the lines before; keep one table for each data set"
        self._meant("data", lambda word: 0 if word == label else WRONG, other)
        wanted, decided = {KEEP: 0, DROP: 1}, f"decision is {{}}; write {KEEP} or {DROP}"
        drop = self._meant("decision", lambda word: wanted.get(word.lower(), WRONG), decided)
        row, pair = self._rows("row", label), self._meant("pair", _number, NO_NUMBER.format("pair"))
        has_row, known = row != BLANK, pair != BLANK
        found = np.zeros(len(drop), LINE if label.startswith(FINDINGS) else SCORED_LINE)
        found["row"], found["pair"], found["drop"] = row, np.where(known, pair, 0), drop
        if label.startswith(ALL_PAIRS):
            self._check(~has_row, "row is empty; write its number again")
            self._check(~known & ~found["drop"], "has no score, so it cannot be kept; score the data again")
            return found
        require("captions" in self.columns, f"{self.path}: no column 'captions'; {MAKE_AGAIN}")
        of_all = f"captions is {{}}; write {WHOLE_ROW}, or such as 1 of 5"
        found["known"], found["captions"], found["copy_of"] = known, self._meant("captions", _captions, of_all), -1
        if "copy_of_row" in self.columns:
            found["copy_of"] = np.maximum(self._rows("copy_of_row", label), -1)
        self._check(~has_row & known, "row is empty; write its number again")
        left_out = "was left out when the data were opened, and cannot be kept; mend the data"
        self._check(~has_row & ~found["drop"], left_out)
        unnamed = "pair is empty; write it again, or decide on all captions"
        self._check(has_row & ~known & (found["captions"] > 0), unnamed)
        return found[has_row]

    def _meant(self, name: str, meaning: Callable[[str], int], problem: str) -> np.ndarray:
        """Return the meaning of each cell of a column, int64 ``[N]``; raise for a cell that means ``WRONG``."""
        column = self.columns[name]
        if meaning is _number and column.type == pa.int64():
            return column.fill_null(BLANK).to_numpy()
        texts = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        words = [meaning(str(word).strip()) for word in texts.dictionary.to_pylist()]
        found = np.array([*words, meaning("")], np.int64)[texts.indices.fill_null(len(words)).to_numpy()]
        self._check(found == WRONG, problem, column)
        return found

    def _rows(self, name: str, label: str) -> np.ndarray:
        found, size = self._meant(name, _number, NO_NUMBER.format(name)), _size_of(label)
        outside = f"{name} is {{}}, and the data have rows 0 to {size - 1}; {MAKE_AGAIN}"
        self._check((found != BLANK) & ((found < 0) | (found >= size)), outside, found)
        return found


def _captions(word: str) -> int:
    """Return the row's number of captions; 0 for a line on the whole row."""
    match = OF_CAPTIONS.fullmatch(word)
    return 0 if word.lower() == WHOLE_ROW else (int(match[1]) or WRONG) if match else WRONG


def _number(word: str) -> int:
    """Return a whole number or hash."""
    if hexadecimal := PAIR.fullmatch(word):
        return (int(hexadecimal[1], 16) + 2**63) % 2**64 - 2**63
    decimal = NUMBER.fullmatch(word)
    if decimal and -(2**63) <= int(decimal[1]) < 2**63:
        return int(decimal[1])
    return BLANK if word in ("", "nan") else WRONG


def _columns_of(path: Path, found: list[str]) -> list[str]:
    for name in NEEDED:
        have = f"its columns are {listed([column[:60] for column in found], 30)}"
        require(found.count(name) == 1, f"{path}: not one column {name!r}; {have}; {TABLE_OF}")
    return [*NEEDED, *(name for name in OPTIONAL if name in found)]


def _tables_of(path: Path) -> list[_Lines]:
    if path.is_dir():
        files = sorted(file for file in path.glob("*.parquet") if file.name[0] not in "._")  # which others hide
        require(bool(files), f"{path}: no .parquet file in this folder; {TABLE_OF}")
        return [_parquet_lines(file) for file in files]
    return [_parquet_lines(path) if path.suffix.lower() == ".parquet" else _text_lines(path)]


def _text_lines(path: Path) -> _Lines:
    known = (*DELIMITED, *JSON_LINES)
    require(path.suffix.lower() in known, f"{path}: must be a .parquet, {' or '.join(known[:3])} file")
    names: list[str] = []

    def find(found: list[str]) -> ColumnNames:
        names[:] = _columns_of(path, found)
        return ColumnNames(names[:1], names[1:])

    with reading(path, "table of decisions"):
        rows = list(raw_rows(path, find))
        cells = zip(*((row.image, *row.caption) for row in rows), strict=True) if rows else [()] * len(names)
        texts = [pa.array([None if cell is None else str(cell) for cell in column], pa.string()) for column in cells]
        return _Lines(path, [row.number for row in rows], dict(zip(names, texts, strict=True)))


def _parquet_lines(path: Path) -> _Lines:
    with reading(path, "table of decisions"):
        found = pq.read_schema(path).names
        names = _columns_of(path, found)
        scores = {"score"} & set(found)
        table = pq.ParquetFile(path, read_dictionary=[name for name in TEXTS if name in names]).read(
            [*names, *scores], use_threads=False
        )
        table.validate(full=True)
        if scores:
            check_scores(path, table["score"].combine_chunks(), 0)
        return _Lines(path, range(len(table)), {name: _plain(table[name].combine_chunks()) for name in names})


def check_scores(path: Path, scores: pa.Array, first: int) -> None:
    """Raise :class:`InputError` unless all scores are finite or null; ``first`` is the row of the first score."""
    numbers = pa.types.is_floating(scores.type) or pa.types.is_integer(scores.type) or pa.types.is_null(scores.type)
    require(numbers, f"{path}: column 'score' holds {scores.type}, not numbers; write it with lit-clip score")
    wrong = np.flatnonzero(~np.isfinite(scores.fill_null(0).to_numpy()))
    if len(wrong):
        row, score = first + int(wrong[0]), scores[int(wrong[0])]
        raise InputError(f"{path}: the score of row {row} is {score}; write it with lit-clip score")


def _plain(column: pa.Array) -> pa.Array:
    """Return a column of whole numbers as int64, and any other as text."""
    kind = column.type
    if pa.types.is_dictionary(kind) and not pa.types.is_string(kind.value_type):
        return _plain(column.dictionary_decode())
    return (
        column
        if pa.types.is_dictionary(kind)
        else column.cast(pa.int64() if pa.types.is_integer(kind) else pa.string())
    )
