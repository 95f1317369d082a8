"""Suites: YAML files of evaluation sets, each opened only when its turn comes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from jsonargparse import ArgumentError, ArgumentParser

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, MissingData
from lit_clip.tools.messages import one_line, user_error
from lit_clip.tools.text_files import read_yaml

Task = Literal["zero_shot", "linear_probe", "few_shot", "retrieval", "geolocation", "bias"]
TASKS: tuple[Task, ...] = get_args(Task)
Metric = Literal[
    "top1", "mean_per_class", "map11", "roc_auc", "mean_top1_top5", "pm", "lexicon", "mwap", "within_km", "recall@1"
]
PLACES = ("root", "path")  # arguments that say where the files are, below the data root
NAME_BYTES = 100  # of a set, whose name is part of names of files, which have at most 255
ClassNames = str | list[str | list[str]] | dict[str, list[str]] | None


@dataclass
class SuiteEntry:
    """One set of a suite, as its YAML says it.

    Attributes:
        data: ``class_path`` and ``init_args`` of a :class:`lit_clip.evaluation.data.ImageSet`; its ``root`` or ``path``
            is below the data root.
        splits: by ``train``, ``val`` and ``test`` the arguments that differ; a set has at least ``test``.
        folds: arguments of predefined divisions, whose results are averaged.
        class_names: None: the set's own; else what :func:`lit_clip.evaluation.prompts.prompts_of` understands.
        templates: likewise; None: ``a photo of a {}.``. Of a retrieval set ``{}`` is the caption.
        metric: what the set is judged by.
        tasks: what is done with it; None: what its splits allow.
        paper: what the paper's tables call it, for its published figures.
        how_to_get: the files.
        note: how the protocol differs from the paper's, or what is not known of that.
    """

    data: dict[str, Any]
    splits: dict[str, dict[str, Any]] = field(default_factory=lambda: {"test": {}})
    folds: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    class_names: ClassNames = None
    templates: str | list[str] | None = None
    metric: Metric = "top1"
    tasks: list[Task] | None = None
    paper: str = ""
    how_to_get: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        require("class_path" in self.data, "data: no class_path; name the class that reads the set")
        require(isinstance(self.data["class_path"], str), "data: class_path is not the name of a class")
        unknown = sorted(map(str, self.data.keys() - {"class_path", "init_args"}))
        require(
            not unknown, f"data: {', '.join(unknown)} is neither class_path nor init_args; arguments go below init_args"
        )
        options = self.data.get("init_args") or {}
        require(isinstance(options, dict), f"data: init_args is {options!r}, not a mapping of arguments")
        self.data = self.data | {"init_args": options}
        require("test" in self.splits, f"splits: there is no test, only {', '.join(self.splits)}")
        unknown = self.splits.keys() - {"train", "val", "test"}
        require(not unknown, f"splits: {', '.join(sorted(unknown))} is none of train, val, test")
        require(bool(self.folds), "folds: empty; leave it out for a set without folds")
        twice = sorted(
            {key for fold in self.folds for split in self.splits.values() for key in fold.keys() & split.keys()}
        )
        require(not twice, f"folds: {', '.join(twice)} of a fold would be put in the place of what splits say of it")
        for name in self.splits.keys() - {"test"}:
            same = self.splits[name] == self.splits["test"]
            require(
                not same, f"splits: {name} and test have the same arguments, so the test images would be learnt from"
            )
        if self.tasks is None:
            self.tasks = self._possible()
        require(bool(self.tasks), "tasks: empty; leave it out for what the splits allow")
        trained = {"linear_probe", "few_shot", "geolocation"} & set(self.tasks)
        require(not trained or "train" in self.splits, f"tasks: {', '.join(trained)} needs a split called train")

    def _possible(self) -> list[Task]:
        if self.metric == "recall@1":
            return ["retrieval"]
        if self.metric == "within_km":
            return ["geolocation"]
        if "train" not in self.splits:
            return ["zero_shot"]
        if self.metric == "map11":  # of images with several classes a few of each are not defined
            return ["zero_shot", "linear_probe"]
        return ["zero_shot", "linear_probe", "few_shot"]

    def open(self, split: str, fold: int, data_root: Path) -> ImageSet:
        """One split of one fold.

        Raises:
            MissingData: it is not below ``data_root``.
            InputError: it is there and cannot be used.
        """
        options: dict[str, Any] = {**self.data["init_args"], **self.splits[split], **self.folds[fold]}
        for key in PLACES:
            if isinstance(options.get(key), str):
                options[key] = str(data_root / options[key])
                if not os.path.exists(options[key]):  # Path's own fails where a name is too long
                    raise MissingData(f"{options[key]}: not there; {self.how_to_get or 'see the suite file'}")
        return _instantiate({"class_path": self.data["class_path"], "init_args": options})


def _instantiate(spec: Mapping[str, Any]) -> ImageSet:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=ImageSet, required=True)
    try:
        return parser.instantiate_classes(parser.parse_object({"data": dict(spec)}))["data"]
    except Exception as error:  # jsonargparse wraps what a constructor raises
        ours = user_error(error)
        if ours is None:
            raise
        if isinstance(ours, InputError):
            raise ours from error
        raise InputError(f"{spec['class_path']}: {one_line(ours)}") from error


def read_suite(paths: str | Path | Sequence[str | Path]) -> dict[str, SuiteEntry]:
    """Entries by name, of one or several YAML files with a mapping ``sets``.

    Raises:
        InputError: a file that cannot be read, or an entry that is wrong; the message names both.
    """
    entries: dict[str, SuiteEntry] = {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SuiteEntry)
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for name, value in _sets(Path(path)).items():
            check_name(name, str(path))
            require(name not in entries, f"{path}: {name} is in the suite already; call one of the two otherwise")
            entries[name] = _entry(parser, value, f"{path}: {name}")
    require(bool(entries), "suite: no sets")
    return entries


def check_name(name: Any, where: str) -> None:
    """Raise :class:`InputError` for what cannot be a set's name: it is part of those of metrics and files."""
    if not isinstance(name, str):
        raise InputError(f"{where}: the name of a set is {name!r}, not a text; put it in quotes")
    require("/" not in name, f"{where}: {name!r} is part of metric and file names; leave out the slash")
    fits = name == name.strip() and name.isprintable() and not name.startswith(".")
    rule = f"1 to {NAME_BYTES} bytes, no dot before, no spaces around, no line breaks"
    require(
        fits and 0 < len(name.encode()) <= NAME_BYTES,
        f"{where}: {name[:NAME_BYTES]!r} cannot be part of file names: {rule}",
    )


def _sets(path: Path) -> Mapping[Any, Any]:
    values = read_yaml(path)
    sets = values.get("sets") if isinstance(values, dict) else None
    if not isinstance(sets, dict):
        raise InputError(f"{path}: no mapping called sets; a suite is sets: {{name: {{data: ...}}}}")
    return sets


def _entry(parser: ArgumentParser, value: Any, where: str) -> SuiteEntry:
    try:
        require(isinstance(value, dict), "a set is a mapping with data, splits, ...")
        texts = {key: _texts(value[key], key) for key in ("class_names", "templates") if value.get(key) is not None}
        return SuiteEntry(**parser.parse_object(value | texts).as_dict())
    except (ArgumentError, InputError) as error:
        raise InputError(f"{where}: {one_line(error)}") from error


def _texts(value: Any, where: str) -> Any:
    """Texts, lists of them, or a mapping from texts to lists; YAML reads some as numbers, which is no harm."""
    if isinstance(value, dict):
        lists = {name: words if isinstance(words, list) else [words] for name, words in value.items()}
        return {_texts(name, where): _texts(words, where) for name, words in lists.items()}
    if isinstance(value, list):
        return [_texts(one, where) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    require(isinstance(value, str), f"{where}: {value!r} is not a text; put it in quotes")
    return value
