"""Pages of the site made from the code: commands, options, configs, the Python API."""

import argparse
import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from docstrings import ROLE
from jsonargparse import ArgumentParser

import datamodules
from lit_clip.cli import subcommands
from lit_clip.cli.lightning import DEFAULTS, run

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "lit_clip": "What `import lit_clip` offers.",
    "lit_clip.losses": "The losses, and the contract of one of your own ([guide](../losses.md)).",
    "callbacks": "What happens around a training step. `callbacks.NAME` in YAML, imported from `lit_clip.callbacks`.",
    "datamodules": "Data modules, sources of pairs and sets of labelled images. `datamodules.NAME` in YAML, imported "
    "from `lit_clip.datamodules`.",
}

FIT = """`validate`, `test` and `predict` have the same, but for what says "fit only". `--ckpt_path` names a checkpoint
([resuming](../resuming.md)). In a YAML file the dots are levels of the mapping. Defaults of data and trainer are those
of `configs/table.yaml`, which `fit` uses without `--config`.
"""


def pages() -> dict[str, str]:
    """Return the Markdown of each page by its path in the site."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)
    return {
        "reference/commands.md": _commands(),
        "reference/fit.md": _fit(),
        "reference/configs.md": _configs(),
        **{f"reference/{name.rpartition('.')[2]}.md": _api(name, text) for name, text in PACKAGES.items()},
    }


def _commands() -> str:
    lines = ["# Commands\n", "The text of `lit-clip COMMAND --help`, of all commands.\n"]
    lines += [f"```text\n{subcommands.help_text()}\n```\n"]
    for name, text in subcommands.CONFIGURED.items():
        lines += [f"## {name}\n", f"{text} Its options are [those of `fit`](fit.md).\n"]
    for name, place in sorted(subcommands.COMMANDS.items()):
        module, _, function = place.partition(":")
        parser = subcommands.command_parser(name, getattr(importlib.import_module(module), function))
        lines += [f"## {name}\n", f"{parser.description}\n", f"```text\n{_usage(parser)}\n```\n", *_options(parser)]
    return "\n".join(lines)


def _usage(parser: ArgumentParser) -> str:
    """Return what has to be typed: without the options that may be left out."""
    words = [f"{action.metavar or action.dest} ..." for action in parser._actions if not action.option_strings]
    required = [action for action in parser._actions if action.option_strings and action.required]
    words += [f"{action.option_strings[0]} {action.dest.upper()}" for action in required]
    return " ".join([parser.prog, *words, "[options]"])


def _fit() -> str:
    config = ["--config", str(ROOT / "configs/table.yaml"), "--data.train", "captions.csv"]
    parser: Any = run(args=config, execute=False).parser
    packaged = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["trainer"]
    parser.set_defaults({f"trainer.{name}": value for name, value in packaged.items()})
    data = ArgumentParser()
    data.add_class_arguments(datamodules.Captions, "data")
    lines = ["# Options of fit\n", FIT]
    for title, start, text in (
        ("The model", "model.", "[`LitCLIP`](lit_clip.md#lit_clip.LitCLIP) says more about each."),
        ("The data", "data.", "Those of `datamodules.Captions`, the default."),
        ("The trainer", "trainer.", "Lightning's, with its texts."),
        ("The rest", "", ""),
    ):
        options = list(_options(data if start == "data." else parser, start))
        lines += [f"## {title}\n", f"{text}\n", *options]
    return "\n".join(lines)


def _options(parser: Any, start: str | None = None) -> Iterator[str]:
    """Yield an entry for each option whose name begins so; for an empty start those without a dot."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        name = action.dest.replace("__", ".")
        fits = start is None or (name.startswith(start) if start else "." not in name)
        names = [option for option in action.option_strings if not option.endswith((".help", "+"))]
        is_group = name in ("model", "data", "trainer")
        if fits and not is_group and action.help is not argparse.SUPPRESS and (names or not action.option_strings):
            title = ", ".join(f"`{option}`" for option in names) or f"`{action.dest}`"
            yield f"{title}\n:   {_plain(formatter._expand_help(action))}\n"


def _plain(text: str) -> str:
    """Return a help text as one paragraph of Markdown."""
    parts = re.split(r"(`+[^`]+`+)", ROLE.sub(r"`\1`", " ".join(text.split())))
    return "".join(part if part.startswith("`") else re.sub(r"([*<_\[])", r"\\\1", part) for part in parts)


def _configs() -> str:
    lines = ["# Configs\n", "One experiment a file. Costs and results as measured; what was not run says so.\n"]
    for folder, title in (("configs", "Training"), ("configs/evaluation", "Suites of evaluation sets")):
        lines += [f"## {title}\n"]
        for path in sorted((ROOT / folder).glob("*.yaml")):
            lines += [f"### {path.name}\n", *_head(path), f"[The file](../../{folder}/{path.name})\n"]
    return "\n".join(lines)


def _head(path: Path) -> Iterator[str]:
    """Yield the comment at the head of a config, by paragraphs."""
    text = path.read_text(encoding="utf-8")
    yaml.safe_load(text)
    head = re.match(r"(?:#.*\n)+", text)
    parts = re.split(r"\n(?=# ?\w+:)", head[0] if head else "")
    for part in parts:
        words = re.sub(r"^#\s*", "", part, flags=re.MULTILINE)
        name, colon, rest = words.partition(": ")
        if name == "command":
            yield f"```bash\n{rest.strip()}\n```\n"
        else:
            yield _plain(f"{name.capitalize()}{colon}{rest}" if name in ("needs", "cost", "result") else words) + "\n"


def _api(name: str, text: str) -> str:
    module = importlib.import_module(name)
    names = sorted((one for one in module.__all__ if not one.startswith("_")), key=str.lower)
    lines = [f"# {name}\n", f"{text}\n"]
    for one in names:
        found = getattr(module, one)
        assert inspect.getdoc(found), f"{name}.{one} has no docstring"
        lines += [f"::: {name}.{one}\n"]
    return "\n".join(lines)
