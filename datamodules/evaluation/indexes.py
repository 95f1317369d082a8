"""The small files that say what is in a set: tables, lists and JSON."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData


def find(root: Path, names: Sequence[str], what: str) -> Path:
    """The first of ``names`` that is below ``root``; ``""`` is ``root`` itself.

    Raises:
        MissingData: none of them.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise MissingData(f"{root}: no {what} in it ({' or '.join(name or '.' for name in names)})")


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        MissingData: no such file.
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MissingData(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_words(path: Path, words: int) -> list[list[str]]:
    """The lines of a file that are not empty, cut at white space into that many words; the last may have spaces.

    Raises:
        MissingData: no such file.
        InputError: a line has fewer.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        row = line.split(maxsplit=words - 1)
        if not row:
            continue
        if len(row) < words:
            raise InputError(f"{path} line {number}: {line.strip()!r} has {len(row)} words, not {words}; fix the line")
        rows.append([word.strip() for word in row])
    return rows


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        MissingData: no such file.
        InputError: not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); get the file again") from error


def read_table(path: Path, columns: Mapping[str, Sequence[str]], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Args:
        path: the file.
        columns: what we call a column -> what the header may call it, in any case.
        delimiter: between cells.

    Raises:
        MissingData: no such file.
        InputError: no such column, or a row is too short.
    """
    lines = read_text(path).splitlines()
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    lowered = [name.lower() for name in header]
    places = {}
    for column, names in columns.items():
        found = [lowered.index(name) for name in names if name in lowered]
        if not found:
            raise InputError(f"{path}: no column {' or '.join(names)}; its columns are {', '.join(header) or 'none'}")
        places[column] = found[0]
    rows = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) <= max(places.values()):
            raise InputError(
                f"{path} line {reader.line_num}: {len(cells)} cells for {len(header)} columns; fix the row"
            )
        rows.append({column: cells[place].strip() for column, place in places.items()})
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def number(row: Mapping[str, str], column: str, where: str) -> float:
    """A cell as a number.

    Raises:
        InputError: it is none.
    """
    try:
        return float(row[column])
    except ValueError as error:
        raise InputError(f"{where}: {column} is {row[column]!r}, not a number; fix the row") from error
