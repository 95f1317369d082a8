"""Suites: YAML files that list evaluation sets; a set is opened only when it is evaluated."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from jsonargparse import ArgumentError

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, MissingData
from lit_clip.evaluation.scores import METRICS
from lit_clip.tools.messages import OptionParser, one_line
from lit_clip.tools.own_files import SUITES, configuration_path
from lit_clip.tools.parts import instantiate
from lit_clip.tools.reading import read_yaml
from lit_clip.tools.untrusted import shortened

Task = Literal[
    "zero_shot",
    "linear_probe",
    "few_shot",
    "head",
    "retrieval",
    "image_retrieval",
    "document_retrieval",
    "geolocation",
    "bias",
    "caption_choice",
    "segmentation",
    "pointing",
]
TASKS: tuple[Task, ...] = get_args(Task)
LOCATION_ARGUMENTS = ("root", "path")  # relative to the data root
NAME_BYTES = 100  # limit for a set's name, which is part of file names (at most 255 bytes)
ClassNames = str | list[str | list[str]] | dict[str, list[str]] | None


@dataclass
class SuiteEntry:
    """One set of a suite, as written in YAML.

    Attributes:
        data: ``class_path`` and ``init_args`` of a :class:`lit_clip.evaluation.data.ImageSet`; its ``root`` or ``path``
            is relative to the data root.
        splits: arguments of ``train``, ``val`` and ``test`` that differ between them; ``test`` is required. A split
            with a ``class_path`` of its own, and ``init_args``, is of another set: a probe trained on it is tested on
            this one.
        folds: arguments of predefined divisions of the set, whose results are averaged.
        class_names: see :func:`lit_clip.evaluation.prompts.prompts_of`; None: the set's own.
        templates: prompt templates, see there; None: ``a photo of a {}.``. In a retrieval set ``{}`` is the caption.
        metric: the one of :data:`lit_clip.evaluation.scores.METRICS` that the set is evaluated by.
        tasks: tasks to run; None: by metric and splits, without ``bias``.
        text_weight: weight of the text of a query or document with an image, 0 to 1; the image has the rest.
        paper: name of the set in the paper's tables, to look up published figures.
        download: how ``lit-clip evaluate --download`` gets the files: ``{torchvision: NAME}`` with the arguments of
            that class, or ``{hub: OWNER/NAME}``, a data set of the Hugging Face hub.
        how_to_get: where else the files can be obtained; the commands for ``download`` are put before it.
        note: how the protocol differs, or may differ, from the paper's.
    """

    data: dict[str, Any]
    splits: dict[str, dict[str, Any]] = field(default_factory=lambda: {"test": {}})
    folds: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    class_names: ClassNames = None
    templates: str | list[str] | None = None
    metric: str = "top1"
    tasks: list[Task] | None = None
    text_weight: float = 0.5
    paper: str = ""
    download: list[dict[str, str]] = field(default_factory=list)
    how_to_get: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        self.data = _checked_class(self.data, "data")
        judging = [name for name, metric in METRICS.items() if metric.judges]
        require(self.metric in judging, f"metric: there is no {self.metric}; must be one of {', '.join(judging)}")
        require(0 <= self.text_weight <= 1, f"text_weight: {self.text_weight} must be between 0 and 1")
        commands = [_command(source) for source in self.download]
        require(not commands or bool(self.location), "download: needs the set's folder; set data.init_args.root")
        self.how_to_get = ", and ".join(filter(None, [*commands, self.how_to_get]))
        require("test" in self.splits, f"splits: test is missing; there are only {', '.join(self.splits)}")
        unknown = self.splits.keys() - {"train", "val", "test"}
        require(not unknown, f"splits: unknown split {', '.join(sorted(unknown))}; must be train, val or test")
        for name in self.splits:
            same = name != "test" and self.splits[name] == self.splits["test"]
            message = f"splits: {name} and test have the same arguments, so the probe would train on test images"
            require(not same, message)
            if self.is_of_another_set(name):
                require(name != "test", "splits: test has a class_path; write it under data")
                self.splits = {**self.splits, name: _checked_class(self.splits[name], f"splits: {name}")}
        require(bool(self.folds), "folds: empty; leave it out for a set without folds")
        twice = sorted(
            {key for fold in self.folds for split in self.splits.values() for key in fold.keys() & split.keys()}
        )
        require(not twice, f"folds: {', '.join(twice)} is set by splits too, which the fold would override; keep one")
        if self.tasks is None:
            self.tasks = self._default_tasks()
        require(bool(self.tasks), "tasks: empty; leave it out to run all that the splits allow")
        trained = {"linear_probe", "few_shot", "geolocation"} & set(self.tasks)
        require(
            not trained or "train" in self.splits, f"tasks: {', '.join(sorted(trained))} needs a split called train"
        )

    def is_of_another_set(self, split: str) -> bool:
        return "class_path" in self.splits[split]

    def _default_tasks(self) -> list[Task]:
        metric = METRICS[self.metric]
        if metric.task:
            return [task for task in TASKS if task == metric.task]
        if "train" not in self.splits:
            return ["zero_shot"]
        if "relevance" in metric.needs:  # shots per class are not defined for images with several classes
            return ["zero_shot", "linear_probe"]
        return ["zero_shot", "linear_probe", "few_shot"]

    @property
    def location(self) -> str:
        """The set's folder or file below the data root; empty if its splits have several places, or none."""
        arguments = self.data["init_args"]
        return next((str(arguments[key]) for key in LOCATION_ARGUMENTS if key in arguments), "")

    def spec(self, split: str, fold: int) -> dict[str, Any]:
        if self.is_of_another_set(split):
            return self.splits[split]
        options = {**self.data["init_args"], **self.splits[split], **self.folds[fold]}
        return {"class_path": self.data["class_path"], "init_args": options}

    def open(self, split: str, fold: int, data_root: Path) -> ImageSet:
        """Open one split of one fold; raise :class:`MissingData` if its files are not below ``data_root``."""
        spec = self.spec(split, fold)
        options: dict[str, Any] = spec["init_args"]
        for key in LOCATION_ARGUMENTS:
            if isinstance(options.get(key), str):
                options = options | {key: str(data_root / options[key])}
                if not os.path.exists(options[key]):  # Path.exists raises for a name that is too long
                    hint = "" if self.is_of_another_set(split) else self.how_to_get
                    raise MissingData(f"{options[key]}: not there; {hint or 'see the suite file'}")
        return instantiate(ImageSet, {**spec, "init_args": options})


def _command(source: Mapping[str, Any]) -> str:
    """Return the command that downloads a source."""
    kinds = [key for key in ("torchvision", "hub") if isinstance(source.get(key), str)]
    known = len(kinds) == 1 and (kinds == ["torchvision"] or len(source) == 1)
    require(known, f"download: {dict(source)} must be {{torchvision: NAME, ...}} or {{hub: OWNER/NAME}}")
    if kinds == ["hub"]:
        return f"hf download --repo-type dataset {source['hub']} --local-dir {{root}}"
    options = "".join(f"{key}={value!r}, " for key, value in source.items() if key != "torchvision")
    return f"torchvision.datasets.{source['torchvision']}({{root}}, {options}download=True)"


def _checked_class(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check and return ``class_path`` and ``init_args``; missing arguments become an empty mapping."""
    require("class_path" in value, f"{where}: class_path is missing; name the class that reads the set")
    require(isinstance(value["class_path"], str), f"{where}: class_path must be the name of a class")
    unknown = sorted(map(str, value.keys() - {"class_path", "init_args"}))
    require(
        not unknown,
        f"{where}: unknown key {', '.join(unknown)}; only class_path and init_args, which has the arguments",
    )
    options = value.get("init_args") or {}
    require(isinstance(options, dict), f"{where}: init_args must be a mapping of arguments, not {options!r}")
    return {**value, "init_args": options}


def suite_path(path: str | Path) -> Path:
    """Return the path of a suite file, given by path or by a packaged suite's name."""
    return Path(configuration_path(str(path), "--suite", SUITES))


def read_suite(paths: str | Path | Sequence[str | Path]) -> dict[str, SuiteEntry]:
    """Read the sets of one or several suite files or packaged suites, by name."""
    entries: dict[str, SuiteEntry] = {}
    parser = OptionParser(exit_on_error=False)
    parser.add_class_arguments(SuiteEntry)
    for path in [paths] if isinstance(paths, str | Path) else paths:
        values = read_yaml(suite_path(path))
        sets = values.get("sets") if isinstance(values, dict) else None
        if not isinstance(sets, dict):
            raise InputError(f"{path}: must have a mapping called sets: {{name: {{data: ...}}}}")
        for name, value in sets.items():
            check_name(name, str(path))
            require(name not in entries, f"{path}: there are two sets called {name}; rename one")
            entries[name] = _entry(parser, value, f"{path}: {name}")
    require(bool(entries), f"--suite {paths if isinstance(paths, str | Path) else ', '.join(map(str, paths))}: no sets")
    return entries


def check_name(name: Any, where: str) -> None:
    """Raise :class:`InputError` unless ``name`` can be part of metric and file names."""
    if not isinstance(name, str):
        raise InputError(f"{where}: the name of a set must be a string, not {name!r}; put it in quotes")
    require("/" not in name, f"{where}: {name!r} would be part of metric and file names; remove the slash")
    fits = name == name.strip() and name.isprintable() and not name.startswith(".")
    rule = f"must be 1 to {NAME_BYTES} bytes, without a leading dot, spaces around it or line breaks"
    require(
        fits and 0 < len(name.encode()) <= NAME_BYTES,
        f"{where}: {name[:NAME_BYTES]!r} cannot be part of file names; it {rule}",
    )


def _entry(parser: OptionParser, value: Any, where: str) -> SuiteEntry:
    try:
        require(isinstance(value, dict), "must be a mapping with data, splits, ...")
        value = {key: each for key, each in value.items() if each is not None}  # as if it were not there
        strings = {key: _strings(value[key], key) for key in ("class_names", "templates") if value.get(key) is not None}
        return SuiteEntry(**parser.parse_object(value | strings).as_dict())
    except (ArgumentError, InputError) as error:
        raise InputError(f"{where}: {one_line(error)}") from error


def _strings(value: Any, where: str) -> Any:
    """Convert numbers to strings, in a string, in a list, or in a mapping from strings to lists."""
    if isinstance(value, dict):
        lists = {name: words if isinstance(words, list) else [words] for name, words in value.items()}
        return {_strings(name, where): _strings(words, where) for name, words in lists.items()}
    if isinstance(value, list):
        return [_strings(element, where) for element in value]
    return as_text(value, where)


def as_text(value: Any, where: str) -> str:
    """Return a string; convert a number back that YAML read from it, and refuse other types."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {shortened(value)} is not a string; put it in quotes")
    require(bool(value.strip()), f"{where}: a name or prompt is empty")
    return value
