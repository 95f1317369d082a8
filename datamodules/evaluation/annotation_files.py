"""Read annotation files (lists, CSV tables, JSON, MATLAB), and import packages that only some sets need."""

import csv
import importlib
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.data import MissingData
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import convert

AGAIN = "get it again"
LONGEST_NUMBER = 18  # digits
LONGEST_FIELD = 1 << 20  # characters of a cell
MAT_PROGRAM = Path(__file__).with_name("mat_program.py")


def find(root: Path, names: Sequence[str], description: str) -> Path:
    """Return the first of ``names`` that exists below ``root``; ``""`` is ``root`` itself."""
    for name in names:
        if os.path.exists(root / name):  # unlike the method, false for a name that is too long
            return root / name
    raise MissingData(f"{root}: no {description} in it ({' or '.join(name or '.' for name in names)})")


def read_text(path: Path) -> str:
    """Read a text file."""
    refuse_missing(path)
    with reading(path, "text file", hint=AGAIN):
        return path.read_text(encoding="utf-8-sig")


def refuse_missing(*paths: Path) -> None:
    """Raise :class:`MissingData` for the first path that does not exist."""
    missing = next((path for path in paths if not os.path.exists(path)), None)
    if missing is not None:
        raise MissingData(f"{missing}: no such file")


def read_lines(path: Path) -> list[str]:
    """Read the non-empty lines of a text file, without leading and trailing white space."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_words(path: Path, columns: int) -> list[list[str]]:
    """Split each non-empty line at white space into ``columns`` words; the last may contain spaces."""
    rows = []
    for line_number, line in enumerate(read_text(path).splitlines(), start=1):
        row = line.split(maxsplit=columns - 1)
        if len(row) not in (0, columns):
            found = f"{line.strip()!r} has {len(row)} words, not {columns}"
            raise InputError(f"{path} line {line_number}: {found}; fix the line")
        rows += [[word.strip() for word in row]] if row else []
    return rows


def read_json(path: Path, kind: Any = Any) -> Any:
    """Read a JSON file and convert its values to a type with msgspec."""
    text = read_text(path)
    with reading(path, "JSON file", hint=AGAIN):
        values = json.loads(text)
    try:
        return convert(values, kind)
    except InputError as error:
        raise InputError(f"{path}: {error}; {AGAIN}") from error


def read_json_lines(path: Path, kind: Any) -> list[Any]:
    """Read a JSON Lines file and convert each line to a type with msgspec."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with reading(path, f"JSON text in line {number}", hint=AGAIN):
                value = json.loads(line)
            with naming(f"{path} line {number}"):
                rows.append(convert(value, kind))
    return rows


def read_table(path: Path, columns: Mapping[str, Sequence[str]], delimiter: str = ",") -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header.

    ``columns`` maps our name of each column to the names that it may have in the header, in lower case.
    """
    file = io.StringIO(read_text(path), newline="")
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
    with reading(path, "table", hint=AGAIN):
        lines = [(reader.line_num, cells) for cells in reader]
    header = [name.strip() for name in lines[0][1]] if lines else []
    lowered = [name.lower() for name in header]
    places = {}
    for column, names in columns.items():
        found = [lowered.index(name) for name in names if name in lowered]
        if not found:
            raise InputError(f"{path}: no column {' or '.join(names)}; its columns are {listed(header, 20) or 'none'}")
        places[column] = found[0]
    rows = []
    for line, cells in lines[1:]:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) <= max(places.values()):
            raise InputError(f"{path} line {line}: {len(cells)} cells for {len(header)} columns; fix the row")
        rows.append({column: cells[place].strip() for column, place in places.items()})
    require(bool(rows), f"{path}: no rows")
    return rows


def number(row: Mapping[str, str], column: str, where: str) -> float:
    """Return a cell as a number."""
    text = row[column]
    try:
        value = math.nan if "_" in text else float(text)  # Python's own literals may have underscores
    except ValueError:
        value = math.nan
    require(math.isfinite(value), f"{where}: {column} is {text!r}, not a number; fix the row")
    return value


def whole_number(text: str) -> int | None:
    """Return the non-negative whole number that a text holds in plain digits; None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER else None


def read_mat(path: Path, *names: str) -> list[Any]:
    """Read variables of a MATLAB file as arrays of at least one dimension.

    Dimensions of size 1 are dropped, and cells that hold one value are unpacked. A process of its own reads the file,
    because SciPy's reader crashes for some damaged ones.
    """
    import numpy as np

    import_optional("scipy", "scipy", path)
    refuse_missing(path)
    with reading(path, "MATLAB file", hint=AGAIN):
        content = _read_mat_apart(path, names)
    for name in names:
        if name not in content:
            raise InputError(f"{path}: no variable {name!r}; get the file again")
    return [np.atleast_1d(content[name]) for name in names]


def _read_mat_apart(path: Path, names: Sequence[str]) -> dict[str, Any]:
    asked = {"path": str(path.absolute()), "names": names, "searched": sys.path, "parent": os.getpid()}
    command = [sys.executable, "-I", str(MAT_PROGRAM), json.dumps(asked)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode < 0:
        raise ValueError(f"SciPy's reader was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        story = done.stderr.decode("utf-8", "replace").splitlines()
        raise ValueError(story[-1] if story else f"SciPy's reader ended with exit code {done.returncode}")
    return ArrayUnpickler(io.BytesIO(done.stdout)).load()


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle lists, strings and arrays, and refuse all other types, because they could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode") or (
            module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def own_dataset(file: Any, path: Path, name: str) -> Any:
    """Return a data set of an open HDF5 file; refuse links and external storage."""
    h5py = import_optional("h5py", "h5py", path)
    parts = name.split("/")
    with reading(path, f"HDF5 file with {name!r}", hint=AGAIN):
        links = [file.get("/".join(parts[: length + 1]), getlink=True) for length in range(len(parts))]
        own = all(link is None or isinstance(link, h5py.HardLink) for link in links)
        dataset: Any = file[name] if own else None
        own = isinstance(dataset, h5py.Dataset) and not dataset.is_virtual and not dataset.external
    require(bool(own), f"{path}: {name} is no data set of its own; {AGAIN}")
    return dataset


def import_optional(module: str, package: str, needed_for: object) -> Any:
    """Import a module from a package that only some sets need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{needed_for}: needs {package}, which is not installed; pip install {package}") from error
