"""Exchangeable parts: objects and callables in Python, a class path with arguments in YAML and in a checkpoint."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_clip.errors import InputError

# Modules whose classes a checkpoint may name: it must not be able to import anything else.
TRUSTED = ("lit_clip.", "torch.optim.", "timm.optim.")

Description = dict[str, Any]
"""``class_path`` and ``init_args`` of a part, as plain values."""


def trusted_class(description: Any, kind: type) -> type | None:
    """Return the class of a description from a checkpoint; None if a checkpoint may not name it, or it does not exist.

    Args:
        description: a :data:`Description`, or whatever else the checkpoint holds.
        kind: of which the class must be: a trusted module also has functions, its own and imported ones.
    """
    path = description.get("class_path") if isinstance(description, Mapping) else None
    if not isinstance(path, str) or not path.startswith(TRUSTED):
        return None
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if inspect.isclass(found) and issubclass(found, kind) else None


def is_trusted(description: Any, kind: type) -> bool:
    """Return whether a checkpoint may name this class with these arguments, see :func:`trusted_class`."""
    found = trusted_class(description, kind)
    return (
        found is not None
        and description.keys() <= {"class_path", "init_args"}
        and names_nothing(description.get("init_args", {}), found, kind)
    )


def names_nothing(arguments: Any, target: Callable[..., Any], kind: type | None = None) -> bool:
    """Return whether arguments from a checkpoint name nothing that a parser of their types would import or read.

    A parser imports the class or function that a string or a ``class_path`` names where a class or a callable is
    wanted, and reads the file of settings that a string names there. So strings are for arguments that are text.

    Args:
        arguments: by name.
        target: the class or function that has them.
        kind: of parts within the arguments, which must be trusted too; None: there may be none.
    """
    hints = hints_of(target)
    return isinstance(arguments, Mapping) and all(
        isinstance(name, str) and value_names_nothing(value, hints.get(name), kind) for name, value in arguments.items()
    )


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of arguments; ``Any`` for one without a type, and a text where a type cannot be found."""
    parameters = inspect.signature(target).parameters.values()
    hints = {each.name: Any if each.annotation is each.empty else each.annotation for each in parameters}
    try:
        return hints | get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # imported for type checkers alone
        return hints


def value_names_nothing(value: Any, hint: Any, kind: type | None = None) -> bool:
    """Return whether a value names nothing that a parser of a type would import or read, see :func:`names_nothing`."""
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, str):
        free = Any in types and not ("." in value and all(part.isidentifier() for part in value.split(".")))
        return free or str in types or any(value in get_args(each) for each in types if get_origin(each) is Literal)
    if isinstance(value, list | tuple):
        inner = [item for each in types for item in (get_args(each) or ([Any] if each in (Any, list, tuple) else []))]
        return all(any(value_names_nothing(item, each, kind) for each in inner) for item in value)
    if not isinstance(value, Mapping):
        return value is None or type(value) in (bool, int, float)
    if "class_path" in value:
        return kind is not None and is_trusted(value, kind)
    kinds: list[Any] = [each for each in types if dataclasses.is_dataclass(each)]
    fields = [each for each in kinds if value.keys() <= hints_of(each).keys()]
    if fields:
        return any(names_nothing(value, each, kind) for each in fields)
    inner = [(get_args(each) or (Any, Any))[1] for each in types if each in (Any, dict) or get_origin(each) is dict]
    return any(all(value_names_nothing(item, each, kind) for item in value.values()) for each in inner)


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


def factory_of(part: Callable[..., Any] | Mapping[str, Any], option: str, kind: type) -> Callable[..., Any]:
    """Return the factory of a part; a description, which comes from a checkpoint, must be of a trusted class.

    Args:
        part: a callable, or a :data:`Description`.
        option: for messages, such as ``model.optimizer``.
        kind: the class that a described part must be of.

    Raises:
        InputError: the description names a class that a checkpoint may not name, or one that does not exist.
    """
    if not isinstance(part, Mapping):
        return part
    if is_trusted(part, kind):
        return partial(trusted_class(part, kind), **part.get("init_args", {}))  # pyright: ignore[reportCallIssue, reportArgumentType]
    path, name = str(part.get("class_path")), option.rpartition(".")[2]
    if path.startswith(TRUSTED) and trusted_class(part, kind) is None:
        raise InputError(f"{option}: the checkpoint was trained with {path}, which is no installed {kind.__name__}")
    raise InputError(
        f"{option}: the checkpoint was trained with {path}; name it with --{option} {path}, or pass {name}=... to "
        "LitCLIP (a checkpoint may not import it by itself)"
    )


def shown(description: Description) -> str:
    """Return a part's class and settings, without those that are off; parts within it by their class."""
    settings = [
        f"{name} {_shown_value(value)}"
        for name, value in description["init_args"].items()
        if value is not None and value is not False
    ]
    return f"{_class_name(description)}{': ' * bool(settings)}{', '.join(settings)}"


def _shown_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown_value, value))
    if isinstance(value, Mapping) and "class_path" in value:
        return _class_name(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _class_name(description: Mapping[str, Any]) -> str:
    return str(description["class_path"]).rpartition(".")[2]
