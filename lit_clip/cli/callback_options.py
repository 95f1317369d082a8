"""Options of one callback of several: ``--trainer.callbacks.EMA.decay 0.9``, or ``ModelCheckpoint.2`` of two.

``--trainer.callbacks-=EMA`` takes it out. The parser knows only the options of the callback that was typed last. Others
are set in the list that it has read.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import Any, NamedTuple

import yaml

from lit_clip.errors import InputError, require
from lit_clip.secrets import HIDDEN
from lit_clip.tools.messages import imported_class, parameters
from lit_clip.tools.parts import qualified_name
from lit_clip.tools.text_files import parse_yaml

PREFIX = "--trainer.callbacks"
MINUS = f"{PREFIX}-"
WITHOUT = "lit_clip.callbacks.Without"  # names the default callbacks that are taken out


class Typed(NamedTuple):
    """An option of a callback as typed."""

    option: str  # such as --trainer.callbacks.EMA.decay
    value: str


def take_options(words: Sequence[str]) -> tuple[list[str], list[Typed]]:
    """Take the options that name their callback, or follow no typed callback, from a command line's words."""
    rest: list[str] = []
    taken: list[Typed] = []
    added: list[str] = []
    callback = ""  # typed last
    for number, word in enumerate(words):
        if taken and number and words[number - 1] == taken[-1].option:
            continue  # its value
        option, equals, value = word.partition("=")
        following = words[number + 1] if number + 1 < len(words) else "--"
        inner = option.removeprefix(f"{PREFIX}.")
        if option in (PREFIX, f"{PREFIX}+"):
            callback = value if equals else following
            added.append(callback.rpartition(".")[2])
        if option != MINUS and (inner == option or option.endswith(".help") or (callback and not inner[:1].isupper())):
            _check_not_set(option, inner, callback, taken)
            rest.append(word)
        else:
            require(bool(equals) or not following.startswith("--"), f"{option}: has no value; type one after it")
            taken.append(Typed(option, value if equals else following))
    for option, value in taken:
        name = value.rpartition(".")[2]
        set_too = any(each.option.startswith(f"{PREFIX}.{name}.") for each in taken)
        require(
            option != MINUS or not (set_too or name in added),
            f"{MINUS}={value}: takes out what another option adds or sets; leave one of them out",
        )
    return rest, taken


def _check_not_set(option: str, inner: str, callback: str, taken: Sequence[Typed]) -> None:
    """Refuse an option of the callback typed last that an option with its name has set: that one is applied later."""
    classes = {path.rpartition(".")[2] for path in re.findall(r"[\w.]+", callback)}
    for other in taken:
        name, _, key = other.option.removeprefix(f"{PREFIX}.").partition(".")
        require(
            name not in classes or re.sub(r"^\d+\.", "", key) != inner,
            f"{option}: {other.option} was typed before and would win; leave one of them out, or name both callbacks",
        )


def plain_settings(parser: Any, settings: Any) -> Any:
    """Return parsed settings as plain values."""
    return yaml.safe_load(parser.dump(settings, skip_none=False))


def callbacks_of(parser: Any, settings: Any) -> Any:
    """Return the callbacks of parsed settings as plain values."""
    return plain_settings(parser, settings)["trainer"]["callbacks"]


def as_typed(values: Any, saved: Any) -> Any:
    """Return settings with the references of their saved form, and with the secrets that this hides."""
    if isinstance(values, Mapping):
        others = saved if isinstance(saved, Mapping) else {}
        return {key: as_typed(value, others.get(key)) for key, value in values.items()}
    if isinstance(values, list):
        others = saved if isinstance(saved, list) else [None] * len(values)
        return [as_typed(value, other) for value, other in zip(values, others, strict=True)]
    return saved if isinstance(saved, str) and "${" in saved and HIDDEN not in saved else values


def callbacks_option(callbacks: Any, options: Sequence[Typed], defaults: Callable[[], Sequence[Any]]) -> str:
    """Return the option that gives a configuration's callbacks the options that were taken.

    Of the ``defaults``, the callbacks that every run has, one is added if an option names it. Those that are taken out
    are not in the list, and defaults among them are named by a :data:`WITHOUT`.
    """
    found = callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
    listed: list[dict[str, Any]] = [
        deepcopy(dict(each)) if isinstance(each, Mapping) else {"class_path": str(each)} for each in found
    ]
    without = [each for each in listed if _name(each) == _name({"class_path": WITHOUT})]
    absent = [name for each in without for name in each["init_args"]["names"]]
    listed = [each for each in listed if each not in without]
    present = {_name(each) for each in listed}
    others = [{"class_path": qualified_name(type(one))} for one in defaults()]
    others = [each for each in others if _name(each) not in absent]
    every = [*listed, *(each for each in others if _name(each) not in present)]
    names = _numbered([_name(each) for each in every])
    taken_out = [every[_named(value, names)] for option, value in options if option == MINUS]
    for option, value in options:
        if option == MINUS:
            continue
        number, keys = _find(option, names, every, len(listed))
        if every[number] not in listed:
            listed.append(every[number])
        settings = every[number]
        for key in ("init_args", *keys[:-1]):
            settings[key] = {} if settings.get(key) is None else settings[key]
            settings = settings[key]
            require(isinstance(settings, dict), f"{option}: {key} is one value, without options; set {key} itself")
        settings[keys[-1]] = _value(value)
    listed = [each for each in listed if not any(each is one for one in taken_out)]
    absent += [_name(one) for one in taken_out if _name(one) in map(_name, others)]
    if absent:
        listed.append({"class_path": WITHOUT, "init_args": {"names": absent}})
    return f"{PREFIX}={json.dumps(listed)}"


def _named(name: str, names: Sequence[str]) -> int:
    """Return the number of the callback that is taken out by its short name or the path of its class."""
    short = name if name in names else name.rpartition(".")[2]
    near = get_close_matches(short, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    require(short in names, f"{MINUS}={name}: there is none; there are {', '.join(names)}{hint}")
    return names.index(short)


def _value(text: str) -> Any:
    """Return the plain values of a YAML text, or the text, such as ``{epoch}: {step}``, if it is none."""
    try:
        value = parse_yaml(text)
        json.dumps(value)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        return text
    return value


def _find(option: str, names: list[str], every: list[dict[str, Any]], own: int) -> tuple[int, list[str]]:
    """Return the number of the callback that an option names, and the keys below its arguments."""
    typed = option.removeprefix(f"{PREFIX}.")
    if not typed[:1].isupper() and own == 1:
        typed = f"{names[0]}.{typed}"
    number = next((i for i, name in enumerate(names) if typed.startswith(f"{name}.")), None)
    if number is None:
        last = typed.rpartition(".")[2]
        having = [name for name, each in zip(names, every, strict=True) if last in parameters(each["class_path"])]
        near = get_close_matches(typed.rpartition(".")[0], names, n=1) if typed[:1].isupper() else having[:3]
        right = " or ".join(f"{PREFIX}.{name}.{last}" for name in near or having[:3])
        hint = f"; did you mean {right}?" if right else ""
        if not hint:
            name = typed.partition(".")[0]
            hint = f"; add it before, {PREFIX}+=" + (
                f"callbacks.{name}" if imported_class(f"lit_clip.callbacks.{name}") else "CLASS"
            )
        raise InputError(f"{option}: names none of the callbacks, which are {', '.join(names)}{hint}")
    keys, known = typed.removeprefix(f"{names[number]}.").split("."), parameters(every[number]["class_path"])
    near = get_close_matches(keys[0], known, n=1)
    require(
        keys[0] in known or not known,
        f"{option}: {names[number]} has no such option; there are {', '.join(known)}"
        + (f"; did you mean {near[0]}?" if near else ""),
    )
    return number, keys


def _numbered(names: list[str]) -> list[str]:
    total = Counter(names)
    return [f"{name}.{names[: i + 1].count(name)}" if total[name] > 1 else name for i, name in enumerate(names)]


def _name(callback: Mapping[str, Any]) -> str:
    return callback["class_path"].rpartition(".")[2]


def give_rest(callbacks: Sequence[Any], rest: Sequence[str] | None) -> None:
    """Give ``--rest`` to the run's ``callbacks.Proof``."""
    proofs = [each for each in callbacks if type(each).__name__ == "Proof"]
    require(bool(proofs) or not rest, "--rest: needs callbacks.Proof, which a recipe adds for pairs; add it")
    for proof in proofs[:1]:
        proof.rest = [*proof.rest, *(rest or ())]
