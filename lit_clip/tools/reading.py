"""The one way to read a user's text, YAML, JSON or other file: an error becomes one line that names the file.

And cells of CSV files that no spreadsheet takes for a formula.
"""

import csv
import json
import os
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from lit_clip.errors import InputError, no_such_file
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import replacing

LONGEST_REASON = 200  # characters; parsers quote the file in their messages


def reading(
    path: str | os.PathLike[str], kind: str, option: str = "", hint: str = ""
) -> AbstractContextManager[None, None]:
    """Turn any error that a parser raises for a user's file into one line that names the file.

    Parsers raise anything for a damaged or hostile file: ``struct.error``, ``RecursionError``, ``KeyError``,
    ``MemoryError``. Put the parser alone inside, and no code of ours: its bugs would look like a damaged file. An
    :class:`InputError` passes unchanged. The path may be an address of a store; the line opens with ``option``, names
    the expected ``kind`` of content, and ends with ``hint``, what to do.
    """
    return _reading(path, kind, option, f"; {hint}" if hint else "")  # pyright: ignore[reportReturnType]  # it raises what it catches


@contextmanager
def _reading(path: str | os.PathLike[str], kind: str, option: str, ending: str) -> Iterator[None]:
    with naming(option):
        try:
            check_is_file(path)
            yield
        except InputError:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and error.filename in (None, str(path)):
                raise InputError(f"{no_such_file(path)}{ending}") from error
            hint = "" if isinstance(error, PermissionError) else ending  # which is about the content
            raise InputError(f"{path}: not a readable {kind} ({reason(error)}){hint}") from error


@contextmanager
def naming(where: str | os.PathLike[str]) -> Iterator[None]:
    """Prefix an :class:`InputError` with a file's, set's or option's name, unless it begins with it."""
    try:
        yield
    except InputError as error:
        if not where or str(error).startswith(f"{where}:"):
            raise
        raise InputError(f"{where}: {error}") from error.__cause__ or error


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` for an existing path that is neither file nor folder: a pipe would block."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):  # absent, unreadable or no possible name: opening it says so
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: neither a file nor a folder")


def read_at(file: BinaryIO, size: int, offset: int) -> bytes:
    """Read bytes at a position of an open file, without moving the position that threads share."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    with open(file.name, "rb") as again:  # Windows
        again.seek(offset)
        return again.read(size)


def first_line(error: BaseException) -> str:
    """Return why a library of the hub failed: the hub's own words if there are any, without advice."""
    words = getattr(error, "server_message", None) or str(error)
    return without_secrets(words.strip().partition("\n")[0])[:LONGEST_REASON] or type(error).__name__


def reason(error: Exception) -> str:
    """Return why a parser failed, in one short line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding.upper()} text: {error.reason} at byte {error.start}"
    if isinstance(error, EOFError) and not str(error):
        return "it ends too early"
    words = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError) and error.args:  # of a mapping, or with a sentence of Arrow's
        words = error.args[0] if " " in str(error.args[0]) else f"{words} is missing"
    words = words.partition(". This is an internal miniz error")[0]  # of torch; a guess at the cause follows
    words = without_secrets(words)  # half of a password would not be recognised
    return words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]} ..."


Content = TypeVar("Content")


def read_text(path: str | Path, option: str = "") -> str:
    """Return the content of a UTF-8 text file; an error begins with ``option``, which gave the path."""
    return _read(path, option, "UTF-8 text", str)


def read_yaml(path: str | Path, option: str = "") -> Any:
    """Return the content of a YAML file; a repeated key in a mapping is an error."""
    return _read(path, option, "YAML", parse_yaml)


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML document; :class:`yaml.YAMLError` if it is invalid or repeats a key."""
    return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 # a SafeLoader


def no_formula(cell: Any) -> Any:
    """Return a cell for a CSV file, with an apostrophe before anything a spreadsheet would compute (OWASP)."""
    return (
        f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")) else cell
    )


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as CSV, each cell through :func:`no_formula`."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows(map(no_formula, row) for row in rows)


def from_cell(cell: str) -> str:
    """Return the original text of a cell from :func:`no_formula`."""
    return cell[1:] if cell[:1] == "'" and no_formula(cell[1:]) == cell else cell


def read_json(path: str | Path, option: str = "") -> Any:
    """Return the content of a JSON file."""
    return _read(path, option, "JSON", json.loads)


def _read(path: str | Path, option: str, kind: str, parse: Callable[[str], Content]) -> Content:
    with reading(path, f"{kind} file", option):
        return parse(Path(path).read_text(encoding="utf-8-sig"))


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuse repeated keys; PyYAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
