"""The names of all commands. All except LightningCLI's are functions; their signatures are their command lines.

Parameters without a default are positional; all others, and those after ``*``, are options, required if they have no
default. The docstring is the help. A ``list`` takes any number of words, in one option or more; a ``bool`` is a flag.
A dataclass groups options: each field is one, and its docstring is their help.
"""

import dataclasses
import importlib
import inspect
import io
import logging
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import docstring_parser

from lit_clip.cli.lazy_packages import uncollected
from lit_clip.cli.plain_help import PlainHelp
from lit_clip.tools.class_paths import short_names
from lit_clip.tools.guarded_output import log_level
from lit_clip.tools.messages import OptionParser

# "module:function", imported when the command is run, so that `lit-clip --help` stays fast. Other packages' commands
# are only named, like class paths in a YAML file.
COMMANDS: dict[str, str] = {
    "classify": "lit_clip.commands.classify:classify",
    "configs": "lit_clip.commands.configs:configs",
    "demo": "lit_clip.commands.demo:demo",
    "embed": "lit_clip.datamodules.commands.embed:embed",
    "evaluate": "lit_clip.commands.evaluate:evaluate",
    "export": "lit_clip.commands.export:export",
    "index": "lit_clip.commands.index:index",
    "inspect": "lit_clip.datamodules.commands.inspect:inspect",
    "locate": "lit_clip.commands.locate:locate",
    "mine": "lit_clip.datamodules.commands.mine:mine",
    "models": "lit_clip.commands.models:models",
    "overlap": "lit_clip.datamodules.commands.overlap:overlap",
    "score": "lit_clip.datamodules.commands.score:score",
    "search": "lit_clip.commands.search:search",
    "shard": "lit_clip.datamodules.commands.shard:shard",
    "wise-ft": "lit_clip.commands.wise_ft:wise_ft",
}
# Options of rooms that need not be there, in place of those of a command's parameter.
HEADS = {"learning": "lit_clip.commands.class_heads:Learning", "head": "lit_clip.commands.class_heads:HeadFile"}
# LightningCLI's commands, imported when one of them is run.
CONFIGURED = {
    "fit": "Train or fine-tune a model.",
    "validate": "Loss and retrieval on the validation data, and the configuration's evaluation callbacks.",
    "test": "The same metrics on the test data.",
    "predict": "Features of the data's images and captions, for Python callers.",
}
# Their docstrings' first lines, copied because importing the commands is slow.
FIRST = {
    "fit": CONFIGURED["fit"],
    "evaluate": "Evaluate a model on a suite of sets: zero-shot, linear probe, few-shot, retrieval, caption choice, "
    "segmentation.",
    "classify": "Classify images zero-shot, from class names, or with a head from examples.",
    "search": "Find the images of a folder that best match a query.",
    "export": "Write a model in another tool's format, and check that it computes the same there.",
    "demo": "Try a model in a browser: classify an image, see where it shows texts, search a folder.",
}
EXAMPLES = (
    "lit-clip fit --data.train captions.csv",
    "lit-clip evaluate --model last.ckpt --suite mine --output my_evaluation",
    "lit-clip classify photos --model last.ckpt --classes tiger pizza bicycle",
    'lit-clip search photos "a red kite over the beach" --model last.ckpt',
    "lit-clip export last.ckpt --format onnx --output exported",
)
HELP_WIDTH = 80


def command_parser(name: str, function: Callable[..., None]) -> OptionParser:
    """Return the parser of a function's command line.

    By itself jsonargparse would want lists as ``[a, b]`` and flags as ``--flag true``.
    """
    documentation = docstring_parser.parse(function.__doc__ or "")
    groups = _groups(function)
    sources: list[Any] = [function, *groups.values()]
    described = [*(each for kind in groups.values() for each in reversed(kind.__mro__)), function]  # the last one wins
    helps = {
        each.arg_name: each.description
        for source in described
        for each in docstring_parser.parse(source.__doc__ or "").params
    }
    parser = OptionParser(
        prog=f"lit-clip {name}",
        description=documentation.short_description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=PlainHelp,
    )
    parser.command = parser.prog
    hints = {key: hint for source in sources for key, hint in get_type_hints(source).items()}
    lists = {key: kind for key, hint in hints.items() for kind in (str, int) if hint in (list[kind], list[kind] | None)}
    flags = {key for key, hint in hints.items() if hint is bool}
    skip: set[str | int] = {*lists, *flags}
    parser.add_function_arguments(function, as_positional=True, as_group=False, skip={*skip, *groups})
    for kind in groups.values():
        parser.add_class_arguments(kind, as_group=False, skip=skip)
    parameters = [each for source in sources for each in inspect.signature(source).parameters.items()]
    parser.bare = {key for key, each in parameters if each.default is each.empty and each.kind is not each.KEYWORD_ONLY}
    for key, parameter in parameters:
        required = parameter.default is parameter.empty
        if key in flags:
            assert parameter.default is False, f"{key}: a flag can only switch something on"
            parser.add_argument(f"--{key}", action="store_true", help=helps.get(key))
        elif key in lists and required and parameter.kind is not parameter.KEYWORD_ONLY:
            parser.add_argument(key, type=str, nargs="*", default=[], help=helps.get(key))  # an empty list may be right
        elif key in lists:
            default = {"required": True} if required else {"default": parameter.default}
            action = "store" if default.get("default") else "extend"  # which would add to the default
            parser.add_argument(f"--{key}", type=lists[key], nargs="+", action=action, help=helps.get(key), **default)
    return parser


def _groups(function: Callable[..., None]) -> dict[str, Any]:
    """Return a function's ``flat`` dataclasses by parameter; their options are typed without the parameter's name."""
    flat = {name: hint for name, hint in get_type_hints(function).items() if getattr(hint, "flat", False)}
    return {name: _imported(HEADS[name]) if name in HEADS else hint for name, hint in flat.items()}


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _grouped(function: Callable[..., None], values: dict[str, Any]) -> dict[str, Any]:
    groups = _groups(function).items()
    made = {
        name: kind(**{each.name: values.pop(each.name) for each in dataclasses.fields(kind)}) for name, kind in groups
    }
    return {**values, **made}


@short_names()
def run_command(words: Sequence[str]) -> None:
    """Run ``COMMANDS[words[0]]`` with the other words."""
    name, *options = map(_underscores, words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names need not be Unicode
    with uncollected():
        command = _imported(COMMANDS[name])
    parser = command_parser(name, command)
    parsed = parser.parse_args(options)
    with log_level(logging.WARNING, "lightning.pytorch", "lightning.fabric"):  # which tell of devices and ranks
        command(**_grouped(command, vars(parser.instantiate(parsed))))


def _underscores(word: str) -> str:
    option, equals, value = word.partition("=")
    return option.replace("-", "_").replace("__", "--", 1) + equals + value if option.startswith("--") else word


def help_text() -> str:
    """Return the text of ``lit-clip --help``."""
    others = ", ".join(sorted({*CONFIGURED, *COMMANDS}.difference(FIRST)))
    lines = ["usage: lit-clip COMMAND ...", ""]
    for name, text in FIRST.items():
        lines += [textwrap.fill(f"  {name:10} {text}", HELP_WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False)]
    lines += ["", "Examples:", *(f"  {example}" for example in EXAMPLES), ""]
    lines += [textwrap.fill(f"More commands: {others}.", HELP_WIDTH, break_on_hyphens=False)]
    lines += ["", "lit-clip COMMAND --help lists a command's options; --version: the version."]
    lines += ["lit-clip --import MODULE COMMAND ... first imports a module, which holds the"]
    lines += ["encoders that a checkpoint names."]
    return "\n".join(lines)
