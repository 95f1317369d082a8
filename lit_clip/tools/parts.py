"""Exchangeable parts: objects and callables in Python, a class path with arguments in YAML.

A checkpoint, a plan and a logger get their description, which is data: nothing is ever built from it.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from lit_clip.errors import InputError
from lit_clip.tools.class_paths import short_names
from lit_clip.tools.messages import OptionParser, one_line, user_error

Part = TypeVar("Part")
Description = dict[str, Any]
"""``class_path`` and ``init_args`` of a part, as plain values."""


def script_name() -> str | None:
    """Return the name under which the running program could be imported; None in a notebook or a shell."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if file else None


def qualified_name(target: Any) -> str:
    """Return the import path of a class or function; for a lambda, the module and ``<lambda>``.

    What a script defines is named by its file: another program knows no ``__main__.MyLoss``.
    """
    module = target.__module__
    return f"{script_name() or module if module == '__main__' else module}.{target.__qualname__}"


def unwrapped(factory: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the class or function that a ``functools.partial`` calls, and the keyword arguments that it adds."""
    if not isinstance(factory, partial):
        return factory, {}
    # jsonargparse wraps a class in two helpers of its own, the class being a positional argument of the first.
    target = next((each for each in (factory.func, *factory.args) if inspect.isclass(each)), factory.func)
    return target, dict(factory.keywords)


@short_names()
def instantiate(kind: type[Part], spec: Mapping[str, Any]) -> Part:
    """Build the object that ``class_path`` and ``init_args`` describe; it must be of the given kind."""
    parser = OptionParser(exit_on_error=False)
    parser.add_argument("--part", type=kind, required=True)
    try:
        return parser.instantiate(parser.parse_object({"part": dict(spec)}))["part"]
    except Exception as error:  # jsonargparse wraps any error of a constructor
        ours = user_error(error)
        if ours is None:
            raise
        if isinstance(ours, InputError):
            raise ours from error
        raise InputError(f"{spec['class_path']}: {one_line(ours)}") from error


def describe(factory: Callable[..., Any], made: Any) -> Description:
    """Describe the object a factory created; a ``functools.partial``'s arguments override remembered ones."""
    return describe_instance(made, unwrapped(factory)[1])


def describe_instance(instance: Any, arguments: Mapping[str, Any] = MappingProxyType({})) -> Description:
    """Describe an object by its class and plain arguments; a function by its name.

    Remembered arguments are the attributes (or an optimiser's ``defaults``) that are named like them.
    """
    target, values = instance, {}
    if not inspect.isroutine(instance):
        target = type(instance)
        values = {**vars(instance), **vars(instance).get("_modules", {}), **getattr(instance, "defaults", {})}
        values = {name: values[name] for name in inspect.signature(target).parameters.keys() & values.keys()}
    described = {name: _described(value) for name, value in sorted({**values, **arguments}.items())}
    return {
        "class_path": qualified_name(target),
        "init_args": {name: value for name, value in described.items() if value is not None},
    }


def _described(value: Any) -> Any:
    """Return an argument as plain values, with parts as their descriptions; None for anything else."""
    if is_plain(value):
        return plain(value)
    if hasattr(value, "describe"):
        return value.describe()
    if isinstance(value, tuple) or hasattr(value, "append"):  # a list, or torch's ModuleList
        return [each for item in value if (each := _described(item)) is not None]
    return None


def class_paths(description: Mapping[str, Any]) -> list[str]:
    """Return the class path of a described part, then the class paths of the parts within it."""
    found = [str(description["class_path"])]
    for value in description["init_args"].values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping) and {"class_path", "init_args"} <= each.keys():
                found += class_paths(each)
    return found


def setting_changes(ours: Description, saved: Description) -> list[str]:
    """Return a part's settings that differ from a checkpoint's, such as ``lr 0.001 (checkpoint: 0.0005)``."""
    here, there = ours["init_args"], saved["init_args"]
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    return [f"{name} {_shown_value(here.get(name))} (checkpoint: {_shown_value(there.get(name))})" for name in names]


def is_plain(value: Any) -> bool:
    """Return whether a value consists only of None, bools, numbers, texts, lists and mappings."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def plain(value: Any) -> Any:
    """Return plain values, with tuples as lists and mappings as dictionaries."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def shown(description: Description) -> str:
    """Return a part's class and settings as text, without settings that are off; inner parts by their class."""
    settings = [
        f"{name} {_shown_value(value)}"
        for name, value in description["init_args"].items()
        if value is not None and value is not False
    ]
    name = _class_name(description)
    return f"{name}: {', '.join(settings)}" if settings else name


def _shown_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown_value, value))
    if isinstance(value, Mapping) and "class_path" in value:
        return _class_name(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _class_name(description: Mapping[str, Any]) -> str:
    return str(description["class_path"]).rpartition(".")[2]
