"""What a checkpoint may name."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_clip.errors import InputError

# Modules whose classes a checkpoint may name: it must not be able to import anything else.
TRUSTED = ("lit_clip.", "torch.optim.", "timm.optim.")


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
