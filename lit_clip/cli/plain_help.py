"""Help texts without the marks that docstrings have for the documentation, and a short form for many options."""

import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from copy import copy
from types import SimpleNamespace
from typing import Any

from jsonargparse import DefaultHelpFormatter

MARKED = re.compile(r"(?::\w+:`~?|``)([^`]+)``?")
SECTION = ".help"  # what follows an option whose complete help is asked for
NAMES = 34  # columns


class PlainHelp(DefaultHelpFormatter):
    """Show the names in docstrings without back quotes and roles."""

    def _expand_help(self, action: Action) -> str:
        return MARKED.sub(r"\1", super()._expand_help(action))

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and MARKED.sub(r"\1", heading))

    def add_text(self, text: str | None) -> None:
        super().add_text(text and MARKED.sub(r"\1", text))


def short_help(parser: Any, command: str) -> str:
    """Return a line for each option of a command, with the first sentence of its help."""
    width = shutil.get_terminal_size().columns
    lines = [f"usage: {command} [--config FILE] [options]", ""]
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if _names(action) and action.help is not SUPPRESS]
        if shown:
            lines += [f"{_section(_names(shown[0])[-1])}:", *(_line(action, width) for action in shown), ""]
    lines += ["The complete text for a section, an option or a class:"]
    lines += [
        f"  {command} {words}" for words in ("--trainer.help", "--ckpt_path.help", "--data.help datamodules.Captions")
    ]
    return "\n".join(lines) + "\n"


def _section(name: str) -> str:
    name = name.removeprefix("--")
    return name if name in ("trainer", "model", "data") else "run" if name == "ckpt_path" else "options"


def _names(action: Action) -> list[str]:
    """Return an option's names; none for an option that only shows help."""
    return [name for name in action.option_strings if not name.endswith((SECTION, "+"))]


def _line(action: Action, width: int) -> str:
    text = MARKED.sub(r"\1", " ".join((action.help or "").split()))
    first = re.split(r"(?<=\w[.;]) | Could also | \(Default| Default: ", text)[0].rstrip(".;:").replace("%%", "%")
    names = f"  {', '.join(_names(action))}".ljust(NAMES)
    return f"{names}  {textwrap.shorten(first, max(20, width - len(names) - 2), placeholder=' ...')}".rstrip()


def print_section_help(parser: Any, words: Sequence[str]) -> None:
    """Print the complete help of the options below the first ``--OPTION.help`` that is no option itself, and exit."""
    known = {name for action in parser._actions for name in action.option_strings}
    for asked in (word.removesuffix(SECTION) for word in words if word.endswith(SECTION) and word not in known):
        actions = [
            each for each in parser._actions if any(f"{name}.".startswith(f"{asked}.") for name in each.option_strings)
        ]
        if actions:
            section = copy(parser)
            section.command, section.usage, section.description = None, SUPPRESS, None
            section._action_groups = [
                SimpleNamespace(title=asked.removeprefix("--"), description=None, _group_actions=actions)
            ]
            sys.stdout.write(section.format_help())
            sys.exit(0)
