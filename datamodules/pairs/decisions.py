"""Tables of decisions on the pairs of a source: keep or drop, as commands propose them and as people edit them.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_clip.errors import InputError, listed, require
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import reading
from ..near_duplicates import components
from .column_names import ColumnNames
from .source import DELIMITED, JSON_LINES, PairSource, compute
from .text_table import raw_rows, shown

KEEP, DROP = "keep", "drop"
FINDINGS, ALL_PAIRS = "findings in", "every pair of"  # a pair that is not listed is kept; is dropped
NEEDED, OPTIONAL = ("row", "pair", "decision", "data"), ("captions", "copy_of_row")
GROUP = 65_536  # lines that are read at once
WHOLE_ROW = "all"  # captions of the row that a line decides on
LABEL = re.compile(rf"({FINDINGS}|{ALL_PAIRS}) (\d{{1,15}}) rows(?:, version [0-9a-f]{{16}})?")
OF_CAPTIONS = re.compile(r"1 of (\d{1,9})")
NUMBER = re.compile(r"(-?\d{1,19})(?:\.0*)?")
PAIR = re.compile(r"p([0-9a-f]{16})")
EXACT = 2**53  # a larger number in floating point was rounded
MAKE_AGAIN = "write the table again"
LINE = np.dtype([("row", "i8"), ("pair", "i8"), ("known", "?"), ("drop", "?"), ("captions", "i8"), ("copy_of", "i8")])


def label_of(source: PairSource, kind: str) -> str:
    """Return the ``data`` of a table of ``FINDINGS`` or ``ALL_PAIRS``: its kind, and the source's size and version."""
    version = f", version {hex_digest(sorted(source.versions.items()))[:16]}" if source.versions else ""
    return f"{kind} {len(source)} rows{version}"


def pair_text(pair: int) -> str:
    """Return a hash as text that no spreadsheet takes for a number, which it would round."""
    return f"p{pair % 2**64:016x}"


class Copies(NamedTuple):
    """Rows with the same image as other rows, ascending, and for each the first of these: int64 ``[C]``."""

    rows: np.ndarray
    first: np.ndarray

    def first_of(self, rows: np.ndarray) -> np.ndarray:
        """Replace copies by the first row with the same image."""
        place = np.searchsorted(self.rows, rows).clip(max=max(0, len(self.rows) - 1))
        return np.where(self.rows[place] == rows, self.first[place], rows) if len(self.rows) else rows


@dataclass(frozen=True)
class Decisions:
    """Decisions on the pairs of a source: either all pairs that are kept, or all that are dropped.

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
        """Whether the listed pairs are the ones that are kept."""
        return self.label.startswith(ALL_PAIRS)

    @property
    def size(self) -> int:
        """Number of rows of the source."""
        found = LABEL.fullmatch(self.label)
        assert found
        return int(found[2])

    @cached_property
    def kept_rows(self) -> np.ndarray:
        """Rows of which a pair is kept, ascending."""
        if not self.keeps_listed:
            return np.delete(np.arange(self.size, dtype=self.rows.dtype), self.without)
        first = np.diff(self.rows, prepend=-1) != 0
        return self.rows if first.all() else self.rows[first]

    def of_row(self, row: int) -> np.ndarray:
        """Return the hashes of a row's listed pairs."""
        start, stop = np.searchsorted(self.rows, np.array([row, row + 1], dtype=self.rows.dtype))
        return self.pairs[start:stop]


def read_decisions(path: Path) -> Decisions:
    """Read a table: parquet, delimited text, JSON lines, or a folder of parquet files, as Spark and Ray write one.

    Without any lines of findings its label is empty.
    """
    label, parts, dropped = "", [], []
    for lines in _lines_of(path):
        if not len(lines.numbers):
            return _of_findings("", np.zeros(0, LINE))
        label = label or lines.label(0)
        found = lines.read(label)
        if label.startswith(ALL_PAIRS):  # few bytes a line, as there may be as many as pairs
            unscored = np.flatnonzero(~found["known"] & ~found["drop"])
            if len(unscored):
                lines.refuse(int(unscored[0]), "has no score, so it cannot be kept; score the data again")
            dropped.append(found[["row", "pair"]][found["drop"]])
            found = found[["row", "pair"]][~found["drop"]]
        parts.append(found)
    require(bool(parts), f"{path}: has no lines; {MAKE_AGAIN}")
    lines = np.concatenate(parts)
    if dropped:  # of two lines on one pair, one that drops it decides
        drops = np.concatenate(dropped)
        both = np.isin(lines["row"], drops["row"])  # by whole numbers, which is fast
        kept = lines[both]
        both[both] = np.isin(_numbers_of(kept["row"], kept["pair"]), _numbers_of(drops["row"], drops["pair"]))
        row = int(lines["row"][both].max(initial=-1)) if path.is_dir() else -1
        require(row < 0, f"{path}: keeps and drops a pair of row {row}; its files are of several tables")
        lines = lines[~both]
    order = np.argsort(lines["row"], kind="stable") if (np.diff(lines["row"]) < 0).any() else slice(None)
    decisions = _of_all_pairs(label, lines[order]) if label.startswith(ALL_PAIRS) else _of_findings(label, lines[order])
    kept = len(decisions.rows) if decisions.keeps_listed else decisions.size - len(decisions.without)
    require(kept > 0, f"{path}: keeps no pair; change some decisions to {KEEP}")
    return decisions


def joined(tables: Sequence[Decisions]) -> Decisions:
    """Join tables on one source: a pair is kept if each of them keeps it."""
    findings = [table for table in tables if not table.keeps_listed]
    scores = [table for table in tables if table.keeps_listed]
    found = _of_findings(tables[0].label, np.concatenate([np.zeros(0, LINE), *(table.lines for table in findings)]))
    if not scores:
        return found
    first = scores[0]
    numbers = _numbers_of(first.rows, first.pairs)
    kept = ~np.isin(first.rows, found.without) & ~np.isin(numbers, _numbers_of(found.rows, found.pairs))
    for other in scores[1:]:
        kept &= np.isin(numbers, _numbers_of(other.rows, other.pairs))
    return replace(first, rows=first.rows[kept], pairs=first.pairs[kept], lines=found.lines, copies=found.copies)


def _numbers_of(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return a number for each pair of a row, uint64 ``[P]``."""
    return pairs.astype(np.uint64) ^ rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _small(rows: np.ndarray, label: str) -> np.ndarray:
    found = LABEL.fullmatch(label)
    return rows.astype(np.int32 if found and int(found[2]) < 2**31 else np.int64)


def _of_all_pairs(label: str, lines: np.ndarray) -> Decisions:
    none = np.zeros(0, np.int64)
    rows, pairs = _small(lines["row"], label), np.ascontiguousarray(lines["pair"])
    return Decisions(label, rows, pairs, none, np.zeros(0, LINE), Copies(none, none))


def _of_findings(label: str, lines: np.ndarray) -> Decisions:
    """Decide by the lines: a pair is dropped if one of its lines drops it."""
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
    """Follow the links between rows: copies of copies are copies of the first."""
    links = np.stack([lines["row"], lines["copy_of"]])
    rows, numbers = np.unique(links, return_inverse=True)
    labels = components(numbers.reshape(links.shape), len(rows)) if len(rows) else np.zeros(0, np.int64)
    first = rows[np.unique(labels, return_index=True)[1][labels]] if len(rows) else rows
    return Copies(rows[rows != first], first[rows != first])


class _Lines(NamedTuple):
    """Some lines of a table; columns that it lacks are missing."""

    path: Path
    numbers: range | list[int]  # of the lines, for messages
    columns: dict[str, pa.Array]

    def refuse(self, place: int, problem: str) -> NoReturn:
        raise InputError(f"{self.path} row {self.numbers[place]}: {problem}")

    def label(self, place: int) -> str:
        label = str(self.columns["data"][place].as_py()).strip()
        if not LABEL.fullmatch(label):
            self.refuse(place, f"data is {shown(label)}, which no command writes; {MAKE_AGAIN}")
        return label

    def read(self, label: str) -> np.ndarray:
        """Return the lines as ``LINE``, without those on rows that were left out when the source was opened.

        Of a line on a whole row ``captions`` is 0; a ``copy_of`` that is blank is -1.
        """
        self._same("data", label)
        size = int(label.split(" rows")[0].rpartition(" ")[2])
        found = np.zeros(len(self.numbers), LINE)
        found["drop"] = self._decisions()
        found["row"], has_row = self._numbers("row", size)
        found["pair"], found["known"] = self._numbers("pair")
        found["captions"], found["copy_of"] = 1, -1
        if label.startswith(FINDINGS):
            found["captions"] = self._captions()
            copy_of, is_copy = self._numbers("copy_of_row", size) if "copy_of_row" in self.columns else (0, False)
            found["copy_of"] = np.where(is_copy, copy_of, -1)
            self._check(~has_row & found["known"], "row is empty; write its number again")
            left_out = "was left out when the data were opened, and cannot be kept; mend the data"
            self._check(~has_row & ~found["drop"], left_out)
            unnamed = "pair is empty; write it again, or decide on all captions"
            self._check(has_row & ~found["known"] & (found["captions"] > 0), unnamed)
            return found[has_row]
        self._check(~has_row, "row is empty; write its number again")
        return found

    def _check(self, wrong: np.ndarray, problem: str) -> None:
        if wrong.any():
            self.refuse(int(wrong.argmax()), problem)

    def _same(self, name: str, value: str) -> None:
        text = compute.utf8_trim_whitespace(self.columns[name].fill_null(""))
        wrong = ~compute.equal(text, value).to_numpy(zero_copy_only=False)
        self._check(wrong, f"{name} is not {value!r} as in the lines before; keep one table for each data set")

    def _decisions(self) -> np.ndarray:
        """Return whether each line drops, bool ``[N]``."""
        text = compute.utf8_lower(compute.utf8_trim_whitespace(self.columns["decision"].fill_null("")))
        drop, keep = (compute.equal(text, word).to_numpy(zero_copy_only=False) for word in (DROP, KEEP))
        if not (drop | keep).all():
            place = int((drop | keep).argmin())
            self.refuse(place, f"decision is {shown(text[place].as_py())}; write {KEEP} or {DROP}")
        return drop

    def _captions(self) -> np.ndarray:
        """Return the number of the row's captions, 0 for a line on the whole row: int64 ``[N]``."""
        require("captions" in self.columns, f"{self.path}: no column 'captions'; {MAKE_AGAIN}")
        text = compute.utf8_trim_whitespace(self.columns["captions"].fill_null("")).dictionary_encode()
        matches = [(word, OF_CAPTIONS.fullmatch(word)) for word in text.dictionary.to_pylist()]
        counts = [0 if word == WHOLE_ROW else (int(match[1]) if match else 0) or -1 for word, match in matches]
        found = np.array(counts, dtype=np.int64)[text.indices.to_numpy()]
        if (found < 0).any():
            place = int((found < 0).argmax())
            value = shown(self.columns["captions"][place].as_py())
            self.refuse(place, f"captions is {value}; write {WHOLE_ROW}, or such as 1 of 5")
        return found

    def _numbers(self, name: str, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return a column's numbers, 0 where it is blank, and whether it is not; rows are below ``size``."""
        column = self.columns[name]
        if column.type == pa.int64():
            numbers, filled = column.fill_null(0).to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)
        else:
            numbers, filled = np.zeros(len(column), np.int64), np.ones(len(column), bool)
            for place, value in enumerate(column.to_pylist()):
                try:
                    number = _number(value)
                except ValueError:
                    rounded = isinstance(value, float) or re.fullmatch(r"-?[\d.,]+e\+?\d+", str(value), re.IGNORECASE)
                    problem = "a number that a program has rounded" if rounded else "no whole number or hash"
                    self.refuse(place, f"{name} is {shown(value)}, {problem}; {MAKE_AGAIN}")
                filled[place], numbers[place] = number is not None, number or 0
        if size is not None:
            outside = filled & ((numbers < 0) | (numbers >= size))
            value = numbers[outside.argmax()] if len(outside) else 0
            self._check(outside, f"{name} is {value}, and the data have rows 0 to {size - 1}; {MAKE_AGAIN}")
        return numbers, filled


def _number(value: Any) -> int | None:
    """Return the whole number or hash in a cell, None if it is blank."""
    if value is None or value != value or not str(value).strip():
        return None
    if isinstance(value, float) and abs(value) > EXACT:
        raise ValueError
    text = str(value).strip()
    hexadecimal, decimal = PAIR.fullmatch(text), NUMBER.fullmatch(text)
    if hexadecimal:
        return (int(hexadecimal[1], 16) + 2**63) % 2**64 - 2**63
    if not decimal or not -(2**63) <= int(decimal[1]) < 2**63:
        raise ValueError
    return int(decimal[1])


def _columns_of(path: Path, found: list[str]) -> list[str]:
    for name in NEEDED:
        have = f"its columns are {listed([column[:60] for column in found], 30)}"
        hint = "give a table of lit-clip inspect, overlap or score"
        require(found.count(name) == 1, f"{path}: not one column {name!r}; {have}; {hint}")
    return [*NEEDED, *(name for name in OPTIONAL if name in found)]


def _lines_of(path: Path) -> Iterator[_Lines]:
    if path.is_dir():
        files = sorted(file for file in path.glob("*.parquet") if file.name[0] not in "._")  # which others hide
        require(
            bool(files), f"{path}: no .parquet file in this folder; give a table of lit-clip inspect, overlap or score"
        )
        return chain.from_iterable(map(_parquet_lines, files))
    return _parquet_lines(path) if path.suffix.lower() == ".parquet" else _text_lines(path)


def _text_lines(path: Path) -> Iterator[_Lines]:
    known = (*DELIMITED, *JSON_LINES)
    require(path.suffix.lower() in known, f"{path}: must be a .parquet, {' or '.join(known[:3])} file")
    names: list[str] = []

    def find(found: list[str]) -> ColumnNames:
        names[:] = _columns_of(path, found)
        return ColumnNames(names[0], names[1], more_captions=tuple(names[2:]))

    with reading(path, "table of decisions"):
        found, first = raw_rows(path, find), True
        while (rows := list(islice(found, GROUP))) or (first and "captions" in names):
            first = False
            cells = zip(*([row.image, *row.caption] for row in rows), strict=True) if rows else [[]] * len(names)
            texts = [
                pa.array([None if cell is None else str(cell) for cell in column], pa.string()) for column in cells
            ]
            yield _Lines(path, [row.number for row in rows], dict(zip(names, texts, strict=True)))


def _parquet_lines(path: Path) -> Iterator[_Lines]:
    with reading(path, "table of decisions"):
        file = pq.ParquetFile(path)
        found = file.schema_arrow.names
        names, first = _columns_of(path, found), 0
        for batch in file.iter_batches(GROUP, columns=[*names, *({"score"} & set(found))], use_threads=False):
            batch.validate(full=True)
            if "score" in found:
                check_scores(path, batch["score"], first)
            if len(batch):
                columns = {name: _plain(batch[name], name) for name in names}
                yield _Lines(path, range(first, first + len(batch)), columns)
            first += len(batch)


def check_scores(path: Path, scores: pa.Array, first: int) -> None:
    """Raise :class:`InputError` unless the scores of lines from ``first`` on are finite or null."""
    numbers = pa.types.is_floating(scores.type) or pa.types.is_integer(scores.type) or pa.types.is_null(scores.type)
    require(numbers, f"{path}: column 'score' holds {scores.type}, not numbers; write it with lit-clip score")
    wrong = np.flatnonzero(~np.isfinite(scores.fill_null(0).to_numpy()))
    if len(wrong):
        row, score = first + int(wrong[0]), scores[int(wrong[0])]
        raise InputError(f"{path}: the score of row {row} is {score}; write it with lit-clip score")


def _plain(column: pa.Array, name: str) -> pa.Array:
    """Return a column as int64 or float if it holds numbers, else as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if name in ("row", "pair", "copy_of_row") and pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    numbers = name in ("row", "pair", "copy_of_row") and pa.types.is_floating(column.type)
    return column if numbers else column.cast(pa.string())
