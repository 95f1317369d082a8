"""Help texts without the markup of docstrings, and a short form for commands with many options."""

import re
import shutil
import sys
import textwrap
from argparse import Action
from collections.abc import Sequence
from functools import partial
from typing import Any

from jsonargparse import DefaultHelpFormatter

MARKED = re.compile(r"(?::\w+:`~?|``)([^`]+)``?")
SECTION = ".help"  # what follows an option whose complete help is asked for
NAMES = 34  # columns
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
    """Show names in docstrings without back quotes and roles; if ``asked``, only the options that begin with it."""

    def __init__(self, *args: Any, asked: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked = asked

    def add_usage(self, *args: Any, **options: Any) -> None:
        if not self.asked:
            super().add_usage(*args, **options)

    def add_argument(self, action: Action) -> None:
        action.help = action.help and MARKED.sub(r"\1", action.help)
        if not self.asked or any(f"{name}.".startswith(f"{self.asked}.") for name in action.option_strings):
            super().add_argument(action)

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and MARKED.sub(r"\1", heading))

    def add_text(self, text: str | None) -> None:
        super().add_text(None if self.asked else text and MARKED.sub(r"\1", text))


def short_help(command: str) -> str:
    """Return one line for each option that most people set."""
    width = shutil.get_terminal_size().columns
    lines = [f"usage: {command} [--config FILE] [options]", ""]
    for section, options in COMMON.items():
        lines += [f"{section}:", *(_line(name, text, width) for name, text in options.items()), ""]
    lines += ["All options, and the complete text of a section, option, class or callback:"]
    words = ("--help all", "--trainer.help", "--ckpt_path.help", "--data.help datamodules.Captions")
    words += ("--trainer.callbacks.help callbacks.EMA",)
    return "\n".join([*lines, *(f"  {command} {each}" for each in words)]) + "\n"


def _line(option: str, text: str, width: int) -> str:
    names = f"  {option}".ljust(NAMES)
    return f"{names}  {textwrap.shorten(text, max(20, width - len(names) - 2), placeholder=' ...')}".rstrip()


def print_section_help(parser: Any, words: Sequence[str]) -> None:
    """Print the complete help below the first ``--OPTION.help`` that is not itself an option, and exit.

    The parser would take ``.help`` for a part of the option's value.
    """
    for word in words:
        if word.endswith(SECTION):
            before = parser.command, parser.formatter_class
            parser.command, parser.formatter_class = "", partial(PlainHelp, asked=word.removesuffix(SECTION))
            text = parser.format_help()
            parser.command, parser.formatter_class = before
            if text.strip() and f"  {word} " not in text:
                sys.stdout.write(text)
                sys.exit(0)
