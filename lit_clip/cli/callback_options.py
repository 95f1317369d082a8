"""Options of a single callback: ``--trainer.callbacks.EMA.decay 0.9``, or ``ModelCheckpoint.2`` for the second one.

``--trainer.callbacks-=EMA`` takes it out. The parser knows only the options of the callback that was typed last. Others
are taken out of the command line before it, and set in the list that it has read.
"""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from jsonargparse import Namespace

from lit_clip.errors import InputError, require
from lit_clip.tools.option_errors import imported_class, nearest, parameters
from lit_clip.tools.parts import qualified_name

PREFIX = "--trainer.callbacks"
MINUS = f"{PREFIX}-"
WITHOUT = "lit_clip.callbacks.Without"  # names the default callbacks that are taken out


class Typed(NamedTuple):
    """An option of a callback as the user typed it."""

    option: str  # such as --trainer.callbacks.EMA.decay
    value: str


def take_options(words: Sequence[str]) -> tuple[list[str], list[Typed]]:
    """Take callback options from a command line: they name a callback, or follow no typed callback."""
    rest: list[str] = []
    taken: list[Typed] = []
    added: list[str] = []
    following = iter([*words[1:], "--"])
    left = iter(words)
    for word in left:
        option, equals, value = word.partition("=")
        after = next(following)
        value = value if equals else after
        inner = option.removeprefix(f"{PREFIX}.")
        if option in (PREFIX, f"{PREFIX}+"):
            added.append(value.rpartition(".")[2])
        named = inner != option and not option.endswith(".help") and (inner[:1].isupper() or not added)
        if option != MINUS and not named:
            rest.append(word)
            continue
        require(bool(equals) or not after.startswith("--"), f"{option}: has no value; type one after it")
        taken.append(Typed(option, value))
        if not equals:
            next(left)
            next(following)
    for option, value in taken:
        name = value.rpartition(".")[2]
        set_too = any(each.option.startswith(f"{PREFIX}.{name}.") for each in taken)
        require(
            option != MINUS or not (set_too or name in added),
            f"{MINUS}={value}: takes out what another option adds or sets; leave one of them out",
        )
    return rest, taken


def with_options(callbacks: Any, options: Sequence[Typed], defaults: Sequence[Any]) -> list[Namespace]:
    """Return the settings of callbacks, with the typed options applied.

    Of the ``defaults``, the callbacks that every run has, one is added if an option names it. Those that are taken out
    are not in the list, and defaults among them are named by a :data:`WITHOUT`.
    """
    found = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    listed = [each.clone() for each in found if _name(each) != _name(WITHOUT)]
    absent = [name for each in found if _name(each) == _name(WITHOUT) for name in each.init_args.names]
    others = [Namespace(class_path=qualified_name(type(one))) for one in defaults]
    others = [each for each in others if _name(each) not in {*absent, *map(_name, listed)}]
    every = [*listed, *others]
    names = _numbered([_name(each) for each in every])
    taken_out = [every[_named(value, names)] for option, value in options if option == MINUS]
    for option, value in options:
        if option != MINUS:
            callback, key = _find(option, names, every, len(listed))
            _set(callback, key, value, option)
            listed += [callback] if not any(callback is each for each in listed) else []
    listed = [each for each in listed if not any(each is one for one in taken_out)]
    absent += [_name(one) for one in taken_out if _name(one) in (type(each).__name__ for each in defaults)]
    return listed + ([Namespace(class_path=WITHOUT, init_args=Namespace(names=absent))] if absent else [])


def _set(callback: Namespace, key: str, text: str, option: str) -> None:
    """Set an argument, or a part of one (``policy.after``), to a text; the parser reads it as if typed."""
    arguments = callback.get("init_args") or Namespace()
    above = arguments.get(key.partition(".")[0])
    one = "." in key and above is not None and not isinstance(above, Namespace)
    require(not one, f"{option}: {key.partition('.')[0]} is one value, without options; set it itself")
    arguments[key] = text
    callback["init_args"] = arguments


def _named(name: str, names: Sequence[str]) -> int:
    """Return the number of the callback to take out, by its short name or the path of its class."""
    short = name if name in names else name.rpartition(".")[2]
    if short not in names:
        raise InputError(f"{MINUS}={name}: there is none; there are {', '.join(names)}{nearest(short, names, 0.6)}")
    return names.index(short)


def _find(option: str, names: list[str], every: list[Namespace], own: int) -> tuple[Namespace, str]:
    """Return the callback and the name of the argument that an option sets."""
    typed = option.removeprefix(f"{PREFIX}.")
    if not typed[:1].isupper() and own == 1:
        typed = f"{names[0]}.{typed}"
    number = next((i for i, name in enumerate(names) if typed.startswith(f"{name}.")), None)
    if number is None:
        last = typed.rpartition(".")[2]
        having = [name for name, each in zip(names, every, strict=True) if last in parameters(each["class_path"])]
        near = get_close_matches(typed.rpartition(".")[0], names, n=1) if typed[:1].isupper() else having[:3]
        right = " or ".join(f"{PREFIX}.{name}.{last}" for name in near or having[:3])
        name = typed.partition(".")[0]
        ours = f"callbacks.{name}" if imported_class(f"lit_clip.callbacks.{name}") else "CLASS"
        hint = f"did you mean {right}?" if right else f"add it before, {PREFIX}+={ours}"
        raise InputError(f"{option}: names none of the callbacks, which are {', '.join(names)}; {hint}")
    key = typed.removeprefix(f"{names[number]}.")
    known = parameters(every[number]["class_path"])
    if known and key.partition(".")[0] not in known:
        there = f"there are {', '.join(known)}{nearest(key.partition('.')[0], known, 0.6)}"
        raise InputError(f"{option}: {names[number]} has no such option; {there}")
    return every[number], key


def _numbered(names: list[str]) -> list[str]:
    total = Counter(names)
    return [f"{name}.{names[: i + 1].count(name)}" if total[name] > 1 else name for i, name in enumerate(names)]


def _name(callback: Any) -> str:
    """Return the name of a callback's class, from its settings or its path."""
    return str(callback["class_path"] if isinstance(callback, Namespace) else callback).rpartition(".")[2]


def give_rest(callbacks: Sequence[Any], rest: Sequence[str] | None) -> None:
    """Pass ``--rest`` to the run's ``callbacks.Proof``."""
    proofs = [each for each in callbacks if type(each).__name__ == "Proof"]
    require(bool(proofs) or not rest, "--rest: needs callbacks.Proof, which a recipe adds for pairs; add it")
    for proof in proofs[:1]:
        proof.rest = [*proof.rest, *(rest or ())]
