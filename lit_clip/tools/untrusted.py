"""The rule for what comes from somebody's file: values are plain, and name nothing.

The files are checkpoints, folders of weights and published configurations. What the user types, and the user's own YAML
files, may name what they like; these files may not:

- **Values are plain**: None, bools, finite numbers, texts, lists and mappings. Each is checked against the type of the
  field that it fills (:func:`filled`), and numbers against the ranges of the dataclass.
- **No module**: a text is never looked up as a module, a class or a function, but for the ``class_path`` of an encoder
  whose module is imported already. Parts (loss, optimiser, schedule, rule of weight decay) are only ever built from
  what the user types, writes in YAML or passes in Python; a checkpoint has their names, to compare.
- **No resolver**: ``${...}``, which the command line's parser would replace (by an environment variable, by another
  setting), is refused, not resolved.
- **No loader and no file**: settings that make timm or transformers open a file, a repository or a kernel are refused
  (:mod:`lit_clip.models.external_settings`). The files of a folder lie in that folder.
- **No program**: files that can hold one are read by readers that admit tensors and plain values alone.

One thing may be fetched, by a published name or by a path: the weights that a LoRA's checkpoint is an addition to,
which must have the fingerprint that the checkpoint names. They are data under the same rule. What a trainer restores
beside the model is in :mod:`lit_clip.training.lightning.resume_checks`.
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

Settings = TypeVar("Settings")


def filled(kind: type[Settings], values: Any, where: str) -> Settings:
    """Create a dataclass from a file's plain values; its ``__post_init__`` checks them with :func:`check_fields`.

    Args:
        kind: the dataclass.
        values: by name of the field.
        where: the settings' place, for messages, such as ``architecture.image``.
    """
    require(isinstance(values, Mapping), f"{where}: {shortened(values)} must be a mapping of settings")
    fields: list[Any] = list(dataclasses.fields(kind))  # pyright: ignore[reportArgumentType]
    known = [each.name for each in fields]
    for name in values:
        require(name in known, f"{where}: has no setting {shortened(name)}; there are {', '.join(known)}")
    for each in fields:
        needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        require(not needed or each.name in values, f"{where}: lacks {each.name}")
    return kind(**values)


def given(kind: type[Settings], value: Any, where: str) -> Settings | None:
    """Return settings as their dataclass: they are one, plain values from a checkpoint, or None."""
    return value if value is None or isinstance(value, kind) else filled(kind, value, where)


def check_fields(settings: Any, where: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check the values of a dataclass against its fields' types, and numbers against ranges.

    Args:
        settings: the dataclass.
        where: its place, for messages.
        ranges: least and most of numbers, by name of the field; for those within a list or a tuple too.
    """
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        if not fits(value, hint):
            raise InputError(f"{where}: {name} {shortened(value)} must be {shown_type(hint)}")
        least, most = ranges.get(name, (-math.inf, math.inf))
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, bool) and isinstance(number, int | float):
                require(number >= least, f"{where}: {name} {value} must be at least {least:g}")
                require(number <= most, f"{where}: {name} {value} must be at most {most:g}")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type; a bool is no number, an infinite number is none, and a list is a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return is_plain(value)
    if hint is object:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(inner)
            and all(fits(item, each) for item, each in zip(value, inner, strict=True))
        )
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is float:
        return type(value) in (int, float) and abs(value) < LARGEST  # not of NaN either
    if hint is int:
        return type(value) is int and abs(value) < LARGEST
    return isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)


LARGEST = 2**63  # torch's integers


def check_entries(values: Any, types: Mapping[str, Any], where: str = "") -> None:
    """Raise :class:`InputError` if an entry that is there is of another type, or a count is below 0.

    Args:
        values: a mapping from a file.
        types: by name of the entry; there may be other entries.
        where: their place, for messages.
    """
    if not isinstance(values, Mapping):  # and no message otherwise, which would write out all tensors
        raise InputError(f"{where}: {shortened(values)} must be a mapping")
    for name, hint in types.items():
        if name in values:
            value, place = values[name], f"{where}.{name}" if where else name
            if not fits(value, hint):
                raise InputError(f"{place}: {shortened(value)} must be {shown_type(hint)}")
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
        require(not _names_class(values), f"{where}: {shortened(values)} may not name a class")
    elif isinstance(values, Mapping):
        for name, value in values.items():
            require(isinstance(name, str), f"{where}: the name {shortened(name)} of a setting must be a text")
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


LOADERS = ("_instantiator", "_class_path")


def check_options(options: Any, where: str) -> None:
    """Check settings whose names only another library knows: nothing is named, and no count would fill the memory.

    Args:
        options: plain values, at any depth.
        where: their place, for messages.
    """
    check_names_nothing(options, where)
    for name, value in options.items() if isinstance(options, Mapping) else ():
        require(name != "class_path", f"{where}: may not name a class ({shortened(value)})")
        most = next((most for part, most in COUNTS.items() if part in name), math.inf)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float):
                require(number <= most, f"{where}.{name} {shortened(number)} must be at most {most:g}")
            check_options(number, f"{where}.{name}")


# Most of what is built one by one, by a part of its name in other libraries' settings.
COUNTS = {"layer": 1000, "depth": 1000, "stage": 1000, "expert": 4096, "head": 65536}


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
    text = (
        f"of {value.bit_length()} bits"
        if isinstance(value, int) and abs(value) >= LARGEST
        else ends_without_secrets(repr(value))
    )
    return text if len(text) <= 80 else f"{text[:80]} ..."


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


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
    """Return the types of the arguments of a class or a function.

    ``Any`` for one without a type, and a text where a type cannot be found.
    """
    parameters = inspect.signature(target).parameters.values()
    hints = {each.name: Any if each.annotation is each.empty else each.annotation for each in parameters}
    try:
        return hints | get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # imported for type checkers alone
        return hints


def matches_plain_type(value: Any, hint: Any) -> bool:
    """Return whether a file's value fits an argument, and the command line's parser would look nothing up for it.

    Where a class or a callable is wanted the parser imports the one that a text names, and reads the file of settings
    that a text names where a mapping is wanted.
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
    return (hint in (bool, int, float, str, type(None)) or origin is Literal) and fits(value, hint)
