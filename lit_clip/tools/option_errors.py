"""Errors about options in one line: the option as typed, what is wrong with it, and the nearest name.

jsonargparse (4.53) has one exception for all errors, whose text lists what each type of an option says. A parser within
another one, of a class's arguments, uses this class too, so that each has to read one level of such a text.
"""

import dataclasses
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from lit_clip.errors import InputError
from lit_clip.tools.class_paths import find_object

UNKNOWN = "no such option"
TYPES = {"int", "float", "str", "bool", "list", "dict", "null"}  # no values
# Other libraries' names of Lightning's precisions, which are too far from them to be suggested by spelling.
ALIASES = {"fp16": "16-mixed", "float16": "16-mixed", "fp32": "32-true", "float32": "32-true", "bfloat16": "bf16-mixed"}


class OptionParser(ArgumentParser):
    """A parser with one-line errors; a ``command``'s parser tells users what to type."""

    command = ""

    def options(self) -> list[str]:
        """Return the options that can be typed, for suggestions."""
        return [f"--{name.replace('.init_args.', '.')}" for name in self.get_defaults(skip_validation=True).keys()]  # noqa: SIM118

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.command:
            raise ArgumentError(None, in_one_line(message)) from ex
        text = in_one_line(message).removeprefix(".")
        ours: BaseException | None = ex
        while ours is not None and not isinstance(ours, InputError):
            ours = ours.__cause__ or ours.__context__
        if ours is not None and str(ours) not in text:  # one of several problems
            text = f"{text.partition(': ')[0]}: {ours}"
        raise InputError(f"{text}{self._advice(text)}") from ex

    def _advice(self, text: str) -> str:
        see = f"; see {self.command} --help"
        if unknown := re.match(r"unrecognized arguments: .*?(--[^\s=]+)|([\w.]+): no such option$", text):
            return nearest(unknown[1] or f"--{unknown[2]}", self.options()) or see
        if without := re.match(r"argument (--\S+): expected one argument", text):
            bare = (word for word, after in pairwise([*self.args, "--"]) if after.startswith("--") and "=" not in word)
            return next((f"; type a value after {word}" for word in bare if word.startswith(without[1])), "")
        if missing := re.match(r"(?!data:)([\w.]+): must be given", text):
            return f"; type --{missing[1]}{see}" if f"--{missing[1]}" in self.options() else see
        return ""


def in_one_line(message: str) -> str:
    """Return a parser's message in one line; it begins with "." and a name for an option within another."""
    message = re.sub(r"\s*- Expected a path but .*\n", "", message)  # every class path could name a file with settings
    found = re.match(r'\s*Parser key "([^"]+)"[^:\n]*:[\s-]*(.*)', message, re.DOTALL)
    if found is None:
        return _problem(message)
    option, problem = found[1], _problem(found[2])
    if option == "trainer.callbacks" and (named := re.search(r"class_path '[\w.]*?(\w+)':\s+\.", found[2])):
        option += f".{named[1]}"  # as it is typed
    return f".{option}{problem}" if problem.startswith(".") else f".{option}: {problem}"


def _problem(text: str) -> str:
    """Return what is wrong with a value; if an option has several types, by the type that was meant."""
    if unknown := re.match(r"[\"']?(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", text):
        return f".{'.'.join(filter(None, unknown.groups()))}: {UNKNOWN}"
    if missing := re.match(r"the following arguments are required: ([\w.]+)", text):
        return f".{missing[1]}: must be given"
    if ours := re.search(r"Not of type Custom\w+: (?!names no class_path)(.*)", text):
        return ours[1]
    if classes := re.findall(r"Problem with given class_path '([^']+)':\s+([^\n]*)", text):
        given = text.rpartition("Given value: ")[2]
        return _of_class(*max(classes, key=lambda one: _settings_in(given, parameters(one[0]))))
    if factory := re.search(r"expects a function or a callable class: (.*?)(?:\. Got value: .*)?$", text, re.MULTILINE):
        named = re.search(r"class_path='([\w.]+)'", text)
        return _of_class(named[1] if named else "", factory[1])
    if union := re.search(r"Subtypes: [\[(](.*?),?[\])]\s+Errors:.*\s+Given value: (.*)", text, re.DOTALL):
        return _wanted(union[1], union[2])
    if one := re.search(r"Expected a (.+)\. Got value: (.*)", text):
        return _wanted(one[1], one[2])
    if one := re.match(r"Not a valid subclass of (\w+)\. Got value: (.*)", text):
        return _wanted(f"<class '{one[1]}'>", one[2])
    if unread := re.match(r"Unable to load config [^\n]*", text):
        return unread[0]
    return " ".join(text.split())


def _settings_in(given: str, names: list[str]) -> int:
    return sum(f"{name}=" in given or f"'{name}': " in given for name in names)


def _of_class(path: str, problem: str) -> str:
    name = problem.removesuffix(f": {UNKNOWN}")
    if name == problem:
        return problem
    known = nested_parameters(path)
    hint = nearest(name[1:], known) or f"; there are {', '.join(parameters(path)) or 'none'}"
    return f"{name}: {path.rpartition('.')[2]} has {UNKNOWN}{hint}"


def nearest(option: str, known: Iterable[str], at_least: float = 0.75) -> str:
    """Return a hint at the nearest known option: by whole name, by last part, or by two parts exchanged."""
    forms: dict[str, str] = {}
    for each in known:
        *above, last = each.lstrip("-").split(".")
        turned = f"{last}_{above[-1].removesuffix('s')}" if above else last  # image_column was meant as columns.image
        forms = {last: each, turned: each, each.lstrip("-"): each} | forms
    typed = option.lstrip("-")
    names = [typed, typed.rpartition(".")[2]]
    near = [forms[name] for name in names if name in forms]
    near += [forms[name] for name in get_close_matches(names[0], forms, n=1, cutoff=at_least)]
    near += [forms[name] for name in get_close_matches(names[1], forms, n=1, cutoff=at_least)]
    return f"; did you mean {near[0]}?" if near else ""


def _wanted(types: str, value: str) -> str:
    value = re.sub(r"NestedArg\(.*val='(.*)'\)", r"\1", value.strip())
    *kinds, last = _kinds(types)
    near = [ALIASES[value]] if ALIASES.get(value) in kinds else get_close_matches(value, {*kinds, last} - TYPES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    shown = (value or "an empty text") if len(value) <= 200 else f"{value[:200]} ..."
    return f"wants {', '.join(kinds)}{' or ' if kinds else ''}{last}, not {shown}{hint}"


def _kinds(types: str) -> list[str]:
    """Return readable types, each once: ``<class 'int'>, typing.Literal['a', 'b']`` -> ``int``, ``a``, ``b``."""
    types = re.sub(r"list\[collections\.abc\.Callable\[.*?\]\]", "a list of class paths", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), types)
    types = re.sub(r"<class '(.*?)'>", lambda found: _kind(found[1]), types.replace("<class 'NoneType'>", "null"))
    return list(dict.fromkeys(types.split(", ")))


def _kind(class_path: str) -> str:
    """Return a class's name; for a dataclass, an example of the mapping to type."""
    found = imported_class(class_path)
    if not dataclasses.is_dataclass(found):
        return class_path.rpartition(".")[2]
    first, hint = dataclasses.fields(found)[0], next(iter(get_type_hints(found).values()))
    literals = [get_args(kind)[0] for kind in get_args(hint) if get_origin(kind) is Literal]
    example = literals[0] if literals else "..." if first.default in (None, dataclasses.MISSING) else first.default
    return f'"{{{first.name}: {example}}}"'


def imported_class(class_path: str) -> Any:
    """Import a class; return None if it does not exist."""
    try:
        return find_object(class_path)
    except (ImportError, AttributeError, ValueError):
        return None


def parameters(class_path: str) -> list[str]:
    """Return the names of a class's constructor arguments."""
    found = imported_class(class_path)
    if found is None:
        return []
    known = inspect.signature(found).parameters.values()
    return [each.name for each in known if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def nested_parameters(class_path: str) -> list[str]:
    """Return a class's arguments, and the settings within them (``columns``, ``columns.root``)."""
    hints: dict[str, Any] = {}
    with suppress(Exception):  # a name that only type checkers import
        hints = get_type_hints(getattr(imported_class(class_path), "__init__", None))
    kinds = [(name, kind) for name, hint in hints.items() for kind in (hint, *get_args(hint))]
    nested = [(name, dataclasses.fields(kind)) for name, kind in kinds if dataclasses.is_dataclass(kind)]
    return [*parameters(class_path), *(f"{name}.{field.name}" for name, fields in nested for field in fields)]
