"""The rule for what comes from somebody's file: values are plain, and name nothing.

The files are checkpoints, folders of weights and published configurations. What the user types, and the user's own YAML
files, may name what they like; these files may not:

- **Values are plain**: None, bools, finite numbers, texts, lists and mappings, each of its field's type and range.
- **No module**: a text is never looked up as a module, a class or a function, but for the ``class_path`` of an encoder
  whose module is imported already. Parts are built from what the user types, writes in YAML or passes in Python.
- **No resolver**: ``${...}``, which the command line's parser would replace, is refused.
- **No loader and no file**: settings that make timm or transformers open a file, a repository or a kernel are refused
  (:mod:`lit_clip.models.external_settings`). The files of a folder lie in that folder.
- **No program**: files that can hold one are read by readers that admit tensors and plain values alone.

One thing may be fetched: the weights that a LoRA's checkpoint names, which must have the fingerprint in it. What a
trainer restores beside the model is in :mod:`lit_clip.training.lightning.resume_checks`.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from lit_clip.errors import InputError, require
from lit_clip.secrets import ends_without_secrets
from lit_clip.tools.parts import is_plain

INTERPOLATION = "${"  # OmegaConf's
LARGEST = 2**63  # torch's integers
LOADERS = ("_instantiator", "_class_path")
# Most of what is built one by one, by a part of its name in other libraries' settings.
COUNTS = {"layer": 1000, "depth": 1000, "stage": 1000, "expert": 4096, "head": 65536}

Settings = TypeVar("Settings")
_hints = lru_cache(get_type_hints)


def from_plain(kind: type[Settings], values: Any, where: str) -> Settings:
    """Create a dataclass from a file's plain values by name; its ``__post_init__`` checks them.

    ``where`` is the settings' place, for messages, such as ``architecture.image``.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {shortened(values)} must be a mapping of settings")
    fields: list[Any] = list(dataclasses.fields(kind))  # pyright: ignore[reportArgumentType]
    known = [each.name for each in fields]
    for name in (name for name in values if name not in known):
        raise InputError(f"{where}: has no setting {shortened(name)}; there are {', '.join(known)}")
    for each in fields:
        needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        require(not needed or each.name in values, f"{where}: lacks {each.name}")
    return kind(**values)


def coerced(kind: type[Settings], value: Any, where: str) -> Settings | None:
    """Return settings as their dataclass: they are one, plain values from a checkpoint, or None."""
    return value if value is None or isinstance(value, kind) else from_plain(kind, value, where)


def check_fields(settings: Any, where: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check a dataclass against its fields' types, and numbers, in lists too, against the least and most by name."""
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        check_type(value, hint, f"{where}: {name}")
        least, most = ranges.get(name, (-math.inf, math.inf))
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, bool) and isinstance(number, int | float):
                require(number >= least, f"{where}: {name} {value} must be at least {least:g}")
                require(number <= most, f"{where}: {name} {value} must be at most {most:g}")


def check_type(value: Any, hint: Any, where: str) -> None:
    """Raise :class:`InputError` unless a value is of a type, see :func:`matches_type`."""
    if not matches_type(value, hint):  # the message is costly
        raise InputError(f"{where} {shortened(value)} must be {shown_type(hint)}")


def matches_type(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type; a bool is no number, an infinite number is none, and a list is a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return hint is object or is_plain(value)
    if origin in (Union, UnionType):
        return any(matches_type(value, each) for each in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        many = isinstance(value, list | tuple) and len(value) == len(inner)
        return many and all(map(matches_type, value, inner))
    if origin is list:
        return isinstance(value, list) and all(matches_type(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            matches_type(k, inner[0]) and matches_type(v, inner[1]) for k, v in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and abs(value) < LARGEST  # not of NaN either
    if hint is int:
        return type(value) is int and abs(value) < LARGEST
    return isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)


def check_entries(values: Any, types: Mapping[str, Any], where: str = "", complete: bool = False) -> None:
    """Raise :class:`InputError` if an entry of a file's mapping is of another type than its name's, or a count below 0.

    There may be other entries, and unless ``complete`` entries may be absent.
    """
    if not isinstance(values, Mapping):  # and no message otherwise, which would write out all tensors
        raise InputError(f"{where}: {shortened(values)} must be a mapping")
    for name, hint in types.items():
        require(name in values or not complete, f"{where}: lacks {name}")
        if name in values:
            value, place = values[name], f"{where}.{name}" if where else name
            check_type(value, hint, f"{place}:")
            if type(value) is int and value < 0:
                raise InputError(f"{place}: {value} must be at least 0")


def is_like(value: Any, sample: Any) -> bool:
    """Return whether a file's value is of another's kind: a flag, a number, a text, a mapping, or a list of them."""
    if isinstance(sample, bool):
        return isinstance(value, bool)
    if isinstance(sample, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(sample, list | tuple):
        return isinstance(value, list | tuple) and all(is_like(item, each) for each in sample[:1] for item in value)
    if isinstance(sample, str | Mapping):
        return isinstance(value, str if isinstance(sample, str) else Mapping)
    return True


def check_names_nothing(values: Any, where: str) -> None:
    """Raise :class:`InputError` for a setting, at any depth, that a parser would resolve or a loader would follow."""
    if isinstance(values, str):
        require(INTERPOLATION not in values, f"{where}: may not hold {INTERPOLATION}...}}, which is not resolved here")
        if _names_class(values):
            raise InputError(f"{where}: {shortened(values)} may not name a class")
    elif isinstance(values, Mapping):
        for name, value in values.items():
            if not isinstance(name, str):
                raise InputError(f"{where}: the name {shortened(name)} of a setting must be a text")
            check_names_nothing(name, where)
            # Lightning would import the class that creates the module; see its `_load_state`.
            require(name not in LOADERS, f"{where}: may not have {name}, which names a loader")
            check_names_nothing(value, f"{where}.{name}")
    elif isinstance(values, list | tuple):
        for value in values:
            check_names_nothing(value, where)


def _names_class(text: str) -> bool:
    """Return whether a text is YAML with the key ``class_path``, at any depth, in texts within it too.

    Where any value may be, the command line's parser reads a text as YAML, and creates what it describes.
    """
    if ":" not in text:  # there is no mapping without one
        return False
    try:
        scalars = [token.value for token in yaml.scan(text, yaml.SafeLoader) if isinstance(token, yaml.ScalarToken)]
    except yaml.YAMLError:  # then it stays a text
        return False
    return "class_path" in scalars or any(_names_class(each) for each in scalars if each != text)


def check_options(options: Any, where: str) -> None:
    """Check settings whose names only another library knows: nothing is named, and no count would fill the memory."""
    check_names_nothing(options, where)
    for name, value in options.items() if isinstance(options, Mapping) else ():
        require(name != "class_path", f"{where}: may not name a class ({shortened(value)})")
        most = next((most for part, most in COUNTS.items() if part in name), math.inf)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float):
                require(number <= most, f"{where}.{name} {shortened(number)} must be at most {most:g}")
            check_options(number, f"{where}.{name}")


def class_paths_within(value: Any) -> Iterator[str]:
    """Yield the values of ``class_path``, at any depth, that could be the path of a class."""
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str) and "." in path:
            yield path
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from class_paths_within(item)


def shortened(value: Any) -> str:
    """Return a value for a message, in one short line."""
    huge = isinstance(value, int) and abs(value) >= LARGEST
    text = f"of {value.bit_length()} bits" if huge else ends_without_secrets(repr(value))
    return text if len(text) <= 80 else f"{text[:80]} ..."


def shown_type(hint: Any) -> str:
    """Return a type for a message, as ``int or list of int``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(shown_type(each) for each in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (list, tuple):
        return f"a list of {len(inner) if origin is tuple else ''}{' ' * (origin is tuple)}{shown_type(inner[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def hints_of(target: Any) -> dict[str, Any]:
    """Return the types of the arguments of a class or a function: ``Any`` without one, a text if it is not found."""
    parameters = inspect.signature(target).parameters.values()
    hints = {each.name: Any if each.annotation is each.empty else each.annotation for each in parameters}
    try:
        return hints | get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # imported for type checkers alone
        return hints


def matches_plain_type(value: Any, hint: Any) -> bool:
    """Return whether a file's value fits an argument, and the command line's parser would look nothing up for it.

    The parser imports what a text names where a class or a callable is wanted, and reads it as a file for a mapping.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(matches_plain_type(value, each) for each in inner)
    if dataclasses.is_dataclass(hint) or origin is dict:
        if not isinstance(value, Mapping):
            return False
        kinds = dict.fromkeys(value, inner[1]) if origin is dict else hints_of(hint)
        return value.keys() <= kinds.keys() and all(matches_plain_type(value[name], kinds[name]) for name in value)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(
            any(matches_plain_type(item, each) for each in inner) for item in value
        )
    if hint is Any:
        return value is None or type(value) in (bool, int, float)
    return (hint in (bool, int, float, str, type(None)) or origin is Literal) and matches_type(value, hint)
