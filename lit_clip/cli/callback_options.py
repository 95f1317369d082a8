"""Options of a single callback: ``--trainer.callbacks.EMA.decay 0.9``, or ``ModelCheckpoint.2`` for the second one.

``--trainer.callbacks-=EMA`` takes it out. The parser knows only the options of the callback that was typed last. Others
are taken out of the command line before it, and set in the list that it has read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from jsonargparse import Namespace

from lit_clip.errors import InputError, require
from lit_clip.tools.messages import imported_class, nearest, parameters
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
    left = [*words]
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if not equals:
            value = left[0] if left else "--"
        inner = option.removeprefix(f"{PREFIX}.")
        if option in (PREFIX, f"{PREFIX}+"):
            added.append(value.rpartition(".")[2])
        named = inner != option and not option.endswith(".help") and (inner[:1].isupper() or not added)
        if option != MINUS and not named:
            rest.append(word)
            continue
        require(bool(equals) or not value.startswith("--"), f"{option}: has no value; type one after it")
        taken.append(Typed(option, value))
        if not equals:
            left.pop(0)
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
    usual = [Namespace(class_path=qualified_name(type(one))) for one in defaults]
    more = [each for each in usual if _name(each) not in {*absent, *map(_name, listed)}]
    every = dict(zip(_numbered([*map(_name, [*listed, *more])]), [*listed, *more], strict=True))
    kept = [*every][: len(listed)]
    for option, value in sorted(options, key=lambda each: each.option == MINUS):
        if option == MINUS:
            name = value if value in every else _name(value)
            if name not in every:
                there = f"there is none; there are {', '.join(every)}{nearest(name, every, 0.6)}"
                raise InputError(f"{MINUS}={value}: {there}")
            kept = [each for each in kept if each != name]
            absent += [each for each in map(_name, usual) if each == _name(every[name])]
        else:
            name = _set(option, value, every)
            kept += [name] if name not in kept else []
    without = Namespace(class_path=WITHOUT, init_args=Namespace(names=absent))
    return [*(every[name] for name in kept), *([without] if absent else [])]


def _set(option: str, text: str, every: Mapping[str, Namespace]) -> str:
    """Set an argument of a callback, or a part of one (``policy.after``), to a text that the parser reads as if typed.

    Return the callback's name.
    """
    typed = option.removeprefix(f"{PREFIX}.")
    name = next((each for each in every if typed.startswith(f"{each}.")), None)
    if name is None:
        raise InputError(f"{option}: names none of the callbacks, which are {', '.join(every)}; {_hint(typed, every)}")
    key = typed.removeprefix(f"{name}.")
    first = key.partition(".")[0]
    known = parameters(every[name]["class_path"])
    if known and first not in known:
        there = f"there are {', '.join(known)}{nearest(first, known, 0.6)}"
        raise InputError(f"{option}: {name} has no such option; {there}")
    arguments = every[name].get("init_args") or Namespace()
    one = key != first and not isinstance(arguments.get(first, Namespace()), Namespace | None)
    require(not one, f"{option}: {first} is one value, without options; set it itself")
    arguments[key] = text
    every[name]["init_args"] = arguments
    return name


def _hint(typed: str, every: Mapping[str, Namespace]) -> str:
    name, last = typed.partition(".")[0], typed.rpartition(".")[2]
    having = [each for each, callback in every.items() if last in parameters(callback["class_path"])]
    near = get_close_matches(typed.rpartition(".")[0], every, n=1) if typed[:1].isupper() else having[:3]
    if right := " or ".join(f"{PREFIX}.{each}.{last}" for each in near or having[:3]):
        return f"did you mean {right}?"
    ours = f"callbacks.{name}" if imported_class(f"lit_clip.callbacks.{name}") else "CLASS"
    return f"add it before, {PREFIX}+={ours}"


def _numbered(names: list[str]) -> list[str]:
    total = Counter(names)
    return [f"{name}.{names[: i + 1].count(name)}" if total[name] > 1 else name for i, name in enumerate(names)]


def _name(callback: Any) -> str:
    return str(callback["class_path"] if isinstance(callback, Namespace) else callback).rpartition(".")[2]


def give_rest(callbacks: Sequence[Any], rest: Sequence[str] | None) -> None:
    """Pass ``--rest`` to the run's ``callbacks.Proof``."""
    proofs = [each for each in callbacks if type(each).__name__ == "Proof"]
    require(bool(proofs) or not rest, "--rest: needs callbacks.Proof, which a recipe adds for pairs; add it")
    for proof in proofs[:1]:
        proof.rest = [*proof.rest, *(rest or ())]
