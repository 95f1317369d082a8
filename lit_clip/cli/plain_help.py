"""Help texts without the marks that docstrings have for the documentation, and a short form for many options."""

import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from copy import copy
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from jsonargparse import DefaultHelpFormatter

from lit_clip.tools.messages import imported_class

MARKED = re.compile(r"(?::\w+:`~?|``)([^`]+)``?")
SECTION = ".help"  # what follows an option whose complete help is asked for
NAMES = 34  # columns
UNNAMED = {"model.loss": "lit_clip.losses.Contrastive"}  # the class where none is named
GIVEN = ("params", "optimizer")  # arguments that the run passes
# What most people set, in so few words that 80 columns hold them.
COMMON = {
    "start": {
        "--config": "YAML file, or a name (lit-clip configs)",
        "--recipe": "chooses settings by your data; null: none",
        "--print_plan": "show what the run would do, and stop",
        "--ckpt_path": "checkpoint to resume; last: the newest one",
    },
    "data": {
        "--data.train": "table, folder, tar shards or hub data set",
        "--data.val": "pairs to validate; else a tenth of train",
        "--data.batch_size": "pairs per step on each device",
        "--data.keep": "tables of inspect or score: leave pairs out",
        "--data.num_workers": "processes that read images",
    },
    "model": {
        "--model.architecture": "name (lit-clip models lists them) or sizes",
        "--model.pretrained": "weights to start from: file or name",
        "--model.freeze": "what is not trained, such as {image: all}",
        "--model.lora": "train an adapter alone, such as {r: 8}",
        "--model.loss": "class of the loss, or your own: file.Class",
        "--model.optimizer.lr": "learning rate",
        "--model.lr_scheduler.warmup_steps": "steps of warm-up",
        "--model.micro_batch_size": "pairs encoded at once, if memory is short",
    },
    "trainer": {
        "--trainer.max_epochs": "passes over the training pairs",
        "--trainer.max_time": "end after DD:HH:MM:SS",
        "--trainer.devices": "number of GPUs, or of processes on a CPU",
        "--trainer.strategy": "ddp, ...; FSDP: --config fsdp",
        "--trainer.precision": "bf16-mixed, 32-true, ...",
    },
}


class PlainHelp(DefaultHelpFormatter):
    """Show the names in docstrings without back quotes and roles."""

    def _expand_help(self, action: Action) -> str:
        return MARKED.sub(r"\1", super()._expand_help(action))

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and MARKED.sub(r"\1", heading))

    def add_text(self, text: str | None) -> None:
        super().add_text(text and MARKED.sub(r"\1", text))


def short_help(parser: Any, command: str, every: bool = False) -> str:
    """Return a line for each option that most people set, or for every one, with the first sentence of its help."""
    width = shutil.get_terminal_size().columns
    lines = [f"usage: {command} [--config FILE] [options]", ""]
    for section, options in COMMON.items() if not every else ():
        lines += [f"{section}:", *(_told(name, text, width) for name, text in options.items()), ""]
    for group in parser._action_groups if every else ():
        shown = [action for action in group._group_actions if _names(action) and action.help is not SUPPRESS]
        if shown:
            lines += [f"{_section(_names(shown[0])[-1])}:", *(_line(action, width) for action in shown), ""]
    lines += [*_class_sections(parser, width), *_callbacks(width)] if every else []
    lines += ["All options, and the complete text of a section, option, class or callback:"]
    words = ("--help all", "--trainer.help", "--ckpt_path.help", "--data.help datamodules.Captions")
    words += ("--trainer.callbacks.help callbacks.EMA",)
    return "\n".join([*lines, *(f"  {command} {each}" for each in words)]) + "\n"


def _class_sections(parser: Any, width: int) -> list[str]:
    """Return the options of the classes that the data and the parts of the model have, unless others are named."""
    lines = []
    for option in ("data", "model.loss", "model.optimizer", "model.lr_scheduler"):
        named = next(action.default for action in parser._actions if action.dest == option)
        named = named.get("class_path") if hasattr(named, "get") else named
        found = imported_class(named or UNNAMED.get(option, ""))
        if found is None:
            continue
        own = type(parser)()
        own.add_class_arguments(found, option)
        given = {option, *(f"{option}.{name}" for name in GIVEN)}
        shown = [action for action in own._actions if _names(action)[1:2] != ["--help"] and action.dest not in given]
        typed = "" if named else f", once --{option} {found.__name__} is typed"
        lines += [
            f"{option} ({found.__name__}){typed}:",
            *(_line(action, width) for action in shown if _names(action)),
            "",
        ]
    return lines


def _callbacks(width: int) -> list[str]:
    """Return the callbacks of the package, one of which ``--trainer.callbacks+=`` adds to the others."""
    package = import_module("lit_clip.callbacks")
    found = {name: getattr(package, name) for name in package.__all__}
    from lightning.pytorch import Callback  # takes seconds, and --help of all else needs none of it

    kinds = {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Callback)}
    told = (_told(f"callbacks.{name}", _first(kind.__doc__ or ""), width) for name, kind in kinds.items())
    added = "callbacks: --trainer.callbacks+=callbacks.EMA adds one, -=EMA takes it out:"
    return [added, *told, ""]


def _section(name: str) -> str:
    name = name.removeprefix("--")
    return name if name in ("trainer", "model", "data") else "run" if name == "ckpt_path" else "options"


def _names(action: Action) -> list[str]:
    """Return an option's names; none for an option that only shows help."""
    return [name for name in action.option_strings if not name.endswith((SECTION, "+"))]


def _line(action: Action, width: int) -> str:
    return _told(", ".join(_names(action)), _first(action.help or ""), width)


def _first(text: str) -> str:
    """Return the first sentence of a help text, without the default, which may be that of a base class."""
    text = MARKED.sub(r"\1", " ".join(text.split()))
    return re.split(r"(?<=\w[.;]) | Could also | \([Dd]efault| Default: ", text)[0].rstrip(".;:").replace("%%", "%")


def _told(option: str, first: str, width: int) -> str:
    names = f"  {option}".ljust(NAMES)
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
