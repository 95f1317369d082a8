"""Readers of annotation files (lists, CSV tables, JSON, MATLAB), and imports of packages that only some sets need."""

import csv
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData


def find(root: Path, names: Sequence[str], description: str) -> Path:
    """Return the first of ``names`` that exists below ``root``; ``""`` is ``root`` itself.

    Raises:
        MissingData: none of them exists.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise MissingData(f"{root}: no {description} in it ({' or '.join(name or '.' for name in names)})")


def read_text(path: Path) -> str:
    """Read a text file.

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


def read_words(path: Path, columns: int) -> list[list[str]]:
    """Split each non-empty line at white space into ``columns`` words; the last may contain spaces.

    Raises:
        MissingData: no such file.
        InputError: a line has fewer words.
    """
    rows = []
    for line_number, line in enumerate(read_text(path).splitlines(), start=1):
        row = line.split(maxsplit=columns - 1)
        if not row:
            continue
        if len(row) < columns:
            found = f"{line.strip()!r} has {len(row)} words, not {columns}"
            raise InputError(f"{path} line {line_number}: {found}; fix the line")
        rows.append([word.strip() for word in row])
    return rows


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MissingData: no such file.
        InputError: not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); get the file again") from error


def read_table(path: Path, columns: Mapping[str, Sequence[str]], delimiter: str = ",") -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header.

    Args:
        path: the file.
        columns: our name of each column -> the names it may have in the header, in lower case.
        delimiter: between cells.

    Raises:
        MissingData: no such file.
        InputError: a column is missing, or a row is too short.
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
    """Return a cell as a number.

    Raises:
        InputError: it is not a number.
    """
    try:
        return float(row[column])
    except ValueError as error:
        raise InputError(f"{where}: {column} is {row[column]!r}, not a number; fix the row") from error


def read_mat(path: Path, *names: str, squeeze: bool = True) -> list[Any]:
    """Read variables of a MATLAB file as arrays of at least one dimension.

    Args:
        path: the file.
        names: of the variables.
        squeeze: drop dimensions of size 1, and unpack cells that hold one value.

    Raises:
        MissingData: no such file.
        InputError: not a MATLAB file, or a variable is missing; or SciPy is not installed.
    """
    import numpy as np

    loadmat = import_optional("scipy.io", "scipy", path).loadmat
    if not path.is_file():
        raise MissingData(f"{path}: no such file")
    try:
        content = loadmat(path, squeeze_me=squeeze)
    except Exception as error:  # SciPy raises almost anything for a broken file
        raise InputError(f"{path}: not a MATLAB file ({first_line(error)}); get it again") from error
    for name in names:
        if name not in content:
            raise InputError(f"{path}: no variable {name!r}; get the file again")
    return [np.atleast_1d(content[name]) for name in names]


def import_optional(module: str, package: str, needed_for: object) -> Any:
    """Import a module of a package that only some sets need.

    Raises:
        InputError: it is not installed; the message names the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{needed_for}: needs {package}, which is not installed; pip install {package}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
