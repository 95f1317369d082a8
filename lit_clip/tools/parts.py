"""Exchangeable parts: objects and callables in Python, a class path with arguments in YAML and in a checkpoint."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError

# Modules whose classes a checkpoint may name: it must not be able to import anything else.
TRUSTED = ("lit_clip.", "torch.optim.", "timm.optim.")

Description = dict[str, Any]
"""``class_path`` and ``init_args`` of a part, as plain values."""


def is_trusted(description: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint may name this class."""
    return str(description.get("class_path", "")).startswith(TRUSTED)


def script_name() -> str | None:
    """Return the name under which the program that runs, a file, could be imported; None in a notebook or a shell."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if file else None


def qualified_name(target: Any) -> str:
    """Return the import path of a class or function; of a lambda the module and ``<lambda>``.

    What a script defines is named by its file: another program knows no ``__main__.MyLoss``.
    """
    module = target.__module__
    return f"{script_name() or module if module == '__main__' else module}.{target.__qualname__}"


def unwrapped(factory: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the class or function that a ``functools.partial`` calls, and the keyword arguments it adds.

    jsonargparse wraps a class in two helpers of its own, the class being a positional argument of the first.
    """
    if not isinstance(factory, partial):
        return factory, {}
    target = next((each for each in (factory.func, *factory.args) if inspect.isclass(each)), factory.func)
    return target, dict(factory.keywords)


def describe(factory: Callable[..., Any], made: Any = None) -> Description:
    """Describe what a factory creates by its class and the arguments that are plain values.

    Args:
        factory: a class, a ``functools.partial`` of one, or any function.
        made: something that it created: its class, and those attributes (or for an optimiser ``defaults``) that are
            named like arguments of the class, complete the description.
    """
    target, arguments = unwrapped(factory)
    if made is not None:
        target = type(made)
        arguments = _remembered_arguments(made) | arguments
    return _description(target, arguments)


def describe_instance(instance: Any) -> Description:
    """Describe an object by its class and its attributes that are named like arguments; a function by its name."""
    if inspect.isroutine(instance):
        return _description(instance, {})
    return _description(type(instance), _remembered_arguments(instance))


def _remembered_arguments(made: Any) -> dict[str, Any]:
    values = {**vars(made), **getattr(made, "defaults", {})}
    return {name: values[name] for name in inspect.signature(type(made)).parameters.keys() & values.keys()}


def _description(target: Any, arguments: Mapping[str, Any]) -> Description:
    items = sorted(arguments.items())
    return {
        "class_path": qualified_name(target),
        "init_args": {name: plain(value) for name, value in items if value is not None and is_plain(value)},
    }


def is_plain(value: Any) -> bool:
    """Return whether a value consists of None, bools, numbers, texts, lists and mappings alone."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def plain(value: Any) -> Any:
    """Return plain values with lists for tuples and dictionaries for mappings."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def factory_of(part: Callable[..., Any] | Mapping[str, Any], option: str) -> Callable[..., Any]:
    """Return the factory of a part; a description, which comes from a checkpoint, must be of a trusted class.

    Args:
        part: a callable, or a :data:`Description`.
        option: for messages, such as ``model.optimizer``.

    Raises:
        InputError: the description names a class that a checkpoint may not name, or one that does not exist.
    """
    if not isinstance(part, Mapping):
        return part
    path = str(part.get("class_path"))
    if not is_trusted(part):
        name = option.rpartition(".")[2]
        raise InputError(
            f"{option}: the checkpoint was trained with {path}; name it with --{option} {path}, or pass {name}=... to "
            "LitCLIP (a checkpoint may not import it by itself)"
        )
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{option}: the checkpoint was trained with {path}, which is not installed") from error
    return partial(found, **part.get("init_args", {}))
