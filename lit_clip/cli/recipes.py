"""Options that a recipe chooses; they act as if the user had typed them."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.table import Column, Table

from lit_clip.cli.save_config import flat
from lit_clip.recipes import Choice, Recipe, Run
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import Console
from lit_clip.tools.guarded_output import log_level
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.parts import plain, shown
from lit_clip.tools.reading import reading

STARTED = time.monotonic()
RANK_ZERO = "lightning.pytorch.utilities.rank_zero"


def add_option(parser: Any) -> None:
    """Add ``--recipe``."""
    what = "fit only: chooses settings that are not given."
    parser.add_subclass_arguments(Recipe, "recipe", default=None, required=False, help=what)


def given_settings(given: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings from the command line and YAML files, by their typed names.

    Arguments of classes have no ``init_args`` in them; those of callbacks are ``trainer.callbacks.EMA.decay``. The
    class of a default part is not given: the parser adds it where one of its arguments is typed.
    """
    named = {f"model.{name}.class_path": part["class_path"] for name, part in parts.items()}
    callbacks = given.get("trainer", {}).get("callbacks")
    found = [(name, value) for name, value in flat(given) if not name.startswith("trainer.callbacks")]
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(each, Mapping):
            found += flat(each.get("init_args") or {}, f"trainer.callbacks.{each['class_path'].rpartition('.')[2]}")
    return {name: value for name, value in found if named.get(name) != value}


def chosen_options(
    parser: Any, config: Any, given: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the options that a configuration's recipe chooses, and the one that ends it; show a table.

    What a recipe has measured is kept in a file, so that other processes, and the same command later, choose the same.
    """
    if not config.recipe:
        return []
    recipe: Recipe = _made(parser, config, "recipe")
    seed = config.seed_everything if type(config.seed_everything) is int else 0
    typed, world = given_settings(given, parts), _world(config)
    run = Run(typed, lambda: _data(parser, config), lambda: _module(parser, config), _seconds, seed, world)
    with log_level(logging.WARNING, RANK_ZERO):  # the run says it again
        pairs = hasattr(run.data, "sources")
        choices, kept = _kept(recipe, run) if pairs and recipe.measures else (recipe.choices(run), None)
    if not pairs and not choices:
        rank_zero_info(f"recipe: {recipe!r} chooses nothing for {type(run.data).__name__}, which opens no pairs")
    if kept is not None:
        rank_zero_info(f"recipe: measured by an earlier run; delete {kept} to measure again")
    if pairs and "Proof" not in _named_callbacks(config.trainer.callbacks):
        choices = [*choices, Choice("trainer.callbacks+", "callbacks.Proof", "what training changed, at its end")]
    if getattr(rank_zero_only, "rank", 0) == 0 and choices:
        _show(repr(recipe), choices)
    values = [each.value if isinstance(each.value, str) else json.dumps(each.value) for each in choices]
    return [*(f"--{each.option}={value}" for each, value in zip(choices, values, strict=True)), "--recipe=null"]


def _named_callbacks(settings: Any) -> list[str]:
    """Return the short names of the listed callbacks and of those left out."""
    every = settings if isinstance(settings, list) else [settings] if settings else []
    names = [each.class_path.rpartition(".")[2] for each in every]
    return names + [name for each in every for name in each.get("init_args", {}).get("names", ())]


def _kept(recipe: Recipe, run: Run) -> tuple[list[Choice], Path | None]:
    """Return choices, and their file if an earlier process with the same settings and pairs made them."""
    folder = Path(run.data.cache_folder) / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    key = [
        repr(recipe),
        run.facts.digest,
        json.dumps(dict(run.given), sort_keys=True, default=str),
        run.seed,
        run.world,
    ]
    file = folder / f"{hex_digest(key)[:20]}.json"
    with FileLock(file.with_suffix(".lock")):
        if file.exists():
            with reading(file, "choices of a recipe", hint="delete it"):
                return [Choice(**each) for each in json.loads(file.read_text(encoding="utf-8"))], file
        choices = recipe.choices(run)
        with replacing(file) as draft:
            draft.write_text(json.dumps([plain(each._asdict()) for each in choices]), encoding="utf-8")
    return choices, None


def _made(parser: Any, config: Any, name: str) -> Any:
    """Create one part alone; with groups, the parser would also create LitCLIP's default model, a ViT-B-32."""
    return parser.instantiate(Namespace({name: config[name]}), instantiate_groups=False)[name]


def _data(parser: Any, config: Any) -> Any:
    data = _made(parser, config, "data")
    if hasattr(data, "sources"):
        data.train_source, data.val_source = getattr(data, "opened_sources", data.sources)(True)
    return data


def _module(parser: Any, config: Any) -> Any:
    return parser.instantiate(Namespace(model=config.model)).model


def _world(config: Any) -> int:
    """Return the trainer's number of ranks, if its settings show it."""
    if "WORLD_SIZE" in os.environ:  # torchrun's
        return max(1, int(os.environ["WORLD_SIZE"]))
    trainer = config.trainer
    devices = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        devices = torch.accelerator.device_count() if trainer.accelerator != "cpu" else 1
    counted = len(devices) if isinstance(devices, list) else devices
    return max(1, counted if isinstance(counted, int) else 1) * max(1, trainer.num_nodes)


def _seconds() -> float:
    return time.monotonic() - STARTED


def _show(recipe: str, choices: Sequence[Choice]) -> None:
    table = Table(Column("setting", overflow="fold", no_wrap=True), "chosen", "because", title=f"Recipe: {recipe}")
    for each in choices:
        described = isinstance(each.value, dict) and "class_path" in each.value
        table.add_row(each.option, shown(each.value) if described else _shown(each.value), each.why)
    Console().print(table)


def _shown(value: Any) -> str:
    """Return a value as YAML would be typed, without settings that are off."""
    if not isinstance(value, dict):
        return "null" if value is None else str(value)
    return f"{{{', '.join(f'{name}: {_shown(part)}' for name, part in value.items() if part not in (None, False))}}}"
