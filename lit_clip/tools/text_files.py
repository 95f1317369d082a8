"""Read text, YAML and JSON files, with one error that names the file; and cells of CSV files."""

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lit_clip.tools.reading import reading

Content = TypeVar("Content")
MOST_REPEATED = 10_000  # values, or each 100 characters of one, that the aliases of a YAML document may stand for
DEEPEST = 100  # lists and mappings within each other
HARMLESS = 200  # characters; a shorter document is neither deep nor large


def read_text(path: str | Path, option: str = "") -> str:
    """Return the content of a UTF-8 text file; the error opens with ``option``, which gave the path."""
    return _read(path, option, "UTF-8 text", str)


def read_yaml(path: str | Path, option: str = "") -> Any:
    """Return the content of a YAML file; a key that occurs twice in a mapping is an error."""
    return _read(path, option, "YAML", parse_yaml)


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML document; :class:`yaml.YAMLError` if it is too deep or large, or has a key twice."""
    return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 # a SafeLoader


def check_yaml(text: str) -> None:
    """Refuse YAML that :func:`parse_yaml` would, for parsers of other packages, with :class:`yaml.YAMLError`."""
    if len(text) > HARMLESS:
        yaml.compose(text, _BoundedLoader)


def no_formula(cell: Any) -> Any:
    """Return a cell for a CSV file: an apostrophe stands before what a spreadsheet would compute, as OWASP advises."""
    return (
        f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")) else cell
    )


def from_cell(cell: str) -> str:
    """Return what :func:`no_formula` made a cell of."""
    return cell[1:] if cell[:1] == "'" and no_formula(cell[1:]) == cell else cell


def read_json(path: str | Path, option: str = "") -> Any:
    """Return the content of a JSON file."""
    return _read(path, option, "JSON", json.loads)


def _read(path: str | Path, option: str, kind: str, parse: Callable[[str], Content]) -> Content:
    with reading(path, f"{kind} file", option):
        return parse(Path(path).read_text(encoding="utf-8-sig"))


class _BoundedLoader(yaml.SafeLoader):
    """Refuses documents that are nested too deeply, or whose aliases, each written in full, would make them too large.

    Seven lists of nine aliases to the list before are 300 characters, and 5 million values for whoever copies them.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth, self._repeated = 0, 0
        self._sizes: dict[int, int] = {}  # of nodes, by their identity

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, repeats = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        if self._depth > DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, f"nested more than {DEEPEST} deep", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not repeats:
            self._sizes[id(node)] = self._size(node)
        else:
            self._repeated += self._sizes.get(id(node), 1)
            if self._repeated > MOST_REPEATED:
                problem = f"its aliases repeat more than {MOST_REPEATED:,} values"
                raise yaml.constructor.ConstructorError(None, None, problem, mark)
        return node

    def _size(self, node: Any) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value) // 100
        pairs = isinstance(node, yaml.MappingNode)
        children = (child for item in node.value for child in (item if pairs else (item,)))
        return 1 + sum(self._sizes.get(id(child), 1) for child in children)


class _UniqueKeyLoader(_BoundedLoader):
    """Refuses equal keys, of which PyYAML keeps the last without a word, and values that hold themselves."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.deep_construct = True  # builds what a value holds before the value, and so refuses one that holds itself

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
