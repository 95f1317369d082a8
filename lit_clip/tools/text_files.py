"""Read text, YAML and JSON files, with one error that names the file."""

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lit_clip.tools.reading import reading

Content = TypeVar("Content")


def read_text(path: str | Path, option: str = "") -> str:
    """Return the content of a UTF-8 text file; see :func:`read_yaml` for the arguments and errors."""
    return _read(path, option, "UTF-8 text", str)


def read_yaml(path: str | Path, option: str = "") -> Any:
    """Return the content of a YAML file; a key that occurs twice in a mapping is an error.

    Args:
        path: UTF-8 encoded file.
        option: name of the option that gave the path, which the error opens with.

    Raises:
        InputError: the file does not exist, or cannot be read or parsed.
    """
    return _read(path, option, "YAML", lambda text: yaml.load(text, _UniqueKeyLoader))  # noqa: S506 # a SafeLoader


def read_json(path: str | Path, option: str = "") -> Any:
    """Return the content of a JSON file; see :func:`read_yaml` for the arguments and errors."""
    return _read(path, option, "JSON", json.loads)


def _read(path: str | Path, option: str, kind: str, parse: Callable[[str], Content]) -> Content:
    with reading(path, f"{kind} file", option):
        return parse(Path(path).read_text(encoding="utf-8-sig"))


class _UniqueKeyLoader(yaml.SafeLoader):
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
