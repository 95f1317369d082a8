"""Read text, YAML and JSON files, with one error that names the file; and write and read cells of CSV files."""

import csv
import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lit_clip.tools.atomic import replacing
from lit_clip.tools.reading import reading

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
