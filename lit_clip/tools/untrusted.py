"""Rules for values from untrusted files: they are plain, and name nothing.

The files are checkpoints, folders of weights and published configurations. What the user types, and the user's own YAML
files, may name what they like; these files may not:

- **Values are plain**: None, bools, numbers, texts, lists and mappings, each of its field's type and range. msgspec
  checks them (:func:`convert`); a dataclass's fields are its schema (:func:`check_fields`).
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
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, TypedDict, TypeVar, cast, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from lit_clip.errors import InputError
from lit_clip.secrets import ends_without_secrets

INTERPOLATION = "${"  # OmegaConf's
LARGEST = 2**63 - 1  # of torch's integers
LOADERS = ("_instantiator", "_class_path")
# Most of what is built one by one, by a part of its name in other libraries' settings.
COUNTS = {"layer": 1000, "depth": 1000, "stage": 1000, "expert": 4096, "head": 65536}

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Finite = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]

Settings = TypeVar("Settings")
_WORDS = {  # msgspec's and ours
    r"^Expected \w+ >=?": "must be at least",
    r"^Expected \w+ <=?": "must be at most",
    "^Expected": "must be",
    ", got": ", not",
    "^Object missing required field": "lacks",
    "^Object contains unknown field": "has no setting",
    r"\bobject\b": "a mapping",
    r"\barray\b": "a list",
    r"\bint\b": "a whole number",
    r"\bfloat\b": "a number",
    r"\bstr\b": "a text",
    r" \| ": " or ",
}


def convert(values: Any, kind: Any, where: str = "") -> Any:
    """Return a file's values as a type by msgspec's rules: a list becomes a tuple, and a bool is not a number.

    ``where`` is the values' place, for messages, such as ``architecture.image``.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise wrong_value(error, values, where, kind) from error
    except (IndexError, RuntimeError) as error:  # msgspec indexes a tensor as if it were a mapping
        raise InputError(f"{where or 'a setting'}: holds a tensor where it must hold plain values") from error


def wrong_value(error: msgspec.ValidationError, values: Any, where: str = "", kind: Any = None) -> InputError:
    """Return a one-line error from msgspec's: the value's place, the value if known, and what it must be."""
    if isinstance(error.__cause__, InputError):  # of a dataclass's own check
        return error.__cause__
    said, _, path = str(error).replace("`", "").partition(" - at ")
    path = path.rpartition("$")[2]
    if said.startswith("Invalid enum value"):
        hint = getattr(kind, "__annotations__", {}).get(path.removeprefix("."), kind)
        known = ", ".join(re.findall("'[^']*'", str(hint)))
        said = f"must be one of {known}"
    for theirs, ours in _WORDS.items():
        said = re.sub(theirs, ours, said)
    place = f"{where}{path}" if where else path.removeprefix(".")
    shown = ""
    if said.startswith("must") and "..." not in path:  # a path does not say which entry of a mapping it was
        with suppress(KeyError, IndexError, ValueError, TypeError):
            for key in re.findall(r"[^.\[\]]+", path):
                values = values[int(key) if isinstance(values, list | tuple) else key]
            shown = "" if values is None else f"{shortened(values)} "
    return InputError(f"{place}: {shown}{said}" if place else f"{shown}{said}")


def from_plain(kind: type[Settings], values: Any, where: str) -> Settings:
    """Create a dataclass from a file's plain values by name; its ``__post_init__`` checks them. An instance stays."""
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {shortened(values)} must be a mapping of settings")
    fields = {each.name: each for each in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            raise InputError(f"{where}: has no setting {shortened(name)}; there are {', '.join(fields)}")
    for name, each in fields.items():
        if name not in values and each.default is each.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: lacks {name}")
    return kind(**values)


def entries(types: Mapping[str, Any], total: bool = False) -> Any:
    """Return the type of a mapping with entries of these types, all required if ``total``; others are free."""
    return cast(Any, TypedDict)("Entries", dict(types), total=total)


@lru_cache
def _fields(kind: type, unchecked: tuple[str, ...]) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    return entries({name: hint for name, hint in hints.items() if name not in unchecked}, total=True)


def check_fields(settings: Any, where: str, *unchecked: str) -> None:
    """Convert a dataclass's values to its fields' types, except for the ``unchecked`` names."""
    vars(settings).update(convert(vars(settings), _fields(type(settings), unchecked), where))


def like(sample: Any) -> Any:
    """Return the type of values like a sample: a flag, a number, a text, a mapping, or a list or tuple of these."""
    if isinstance(sample, bool | str):
        return type(sample)
    if isinstance(sample, int | float):
        return float
    if isinstance(sample, tuple):
        return tuple[tuple(map(like, sample))]
    if isinstance(sample, list):
        return list[like(sample[0])] if sample else list
    return dict if isinstance(sample, Mapping) else Any


def check_names_nothing(values: Any, where: str) -> None:  # noqa: C901  # one branch for each kind of value
    """Raise :class:`InputError` for a setting, at any depth, that is not plain, or that a parser would follow."""
    if isinstance(values, str):
        if INTERPOLATION in values:
            raise InputError(f"{where}: may not hold {INTERPOLATION}...}}, which is not resolved here")
        if ":" in values and _names_class(values):  # there is no mapping without one
            raise InputError(f"{where}: {shortened(values)} may not name a class")
    elif isinstance(values, Mapping):
        for name, value in values.items():
            if not isinstance(name, str):
                raise InputError(f"{where}: the name {shortened(name)} of a setting must be a text")
            check_names_nothing(name, where)
            # Lightning would import the class that creates the module; see its `_load_state`.
            if name in LOADERS:
                raise InputError(f"{where}: may not have {name}, which names a loader")
            check_names_nothing(value, f"{where}.{name}")
    elif isinstance(values, list | tuple):
        for value in values:
            check_names_nothing(value, where)
    elif values is not None and type(values) not in (bool, int, float):
        raise InputError(f"{where}: a {type(values).__name__} is no plain value")


def _names_class(text: str) -> bool:
    """Return whether a text is YAML with the key ``class_path``, at any depth, also in texts within it.

    Where any value may be, the command line's parser reads a text as YAML, and creates what it describes.
    """
    try:
        scalars = [token.value for token in yaml.scan(text, yaml.SafeLoader) if isinstance(token, yaml.ScalarToken)]
    except yaml.YAMLError:  # then it stays a text
        return False
    return "class_path" in scalars or any(":" in each and _names_class(each) for each in scalars if each != text)


def check_options(options: Any, where: str) -> None:
    """Check settings that only another library knows: they name nothing, and no count would fill the memory."""
    check_names_nothing(options, where)
    for name, value in options.items() if isinstance(options, Mapping) else ():
        if name == "class_path":
            raise InputError(f"{where}: may not name a class ({shortened(value)})")
        most = next((most for part, most in COUNTS.items() if part in name), math.inf)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not number <= most:
                raise InputError(f"{where}.{name} {shortened(number)} must be at most {most:g}")
            check_options(number, f"{where}.{name}")


def class_paths_within(value: Any) -> Iterator[str]:
    """Yield the values of ``class_path``, at any depth, that could be a class's path."""
    if isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str) and "." in path:
            yield path
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from class_paths_within(item)


def shortened(value: Any) -> str:
    """Return a value for a message, in one short line."""
    huge = isinstance(value, int) and abs(value) > LARGEST
    text = f"of {value.bit_length()} bits" if huge else ends_without_secrets(repr(value))
    return text if len(text) <= 80 else f"{text[:80]} ..."
