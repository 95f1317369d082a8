"""Suites: YAML files of evaluation sets, each opened only when its turn comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData, Pictures

Task = Literal["zero_shot", "linear_probe", "few_shot", "retrieval", "geolocation", "bias"]
TASKS: tuple[Task, ...] = get_args(Task)
Metric = Literal[
    "top1", "mean_per_class", "map11", "roc_auc", "mean_top1_top5", "pm", "lexicon", "mwap", "within_km", "recall@1"
]
PLACES = ("root", "path")  # arguments that say where the files are, below the data root
ClassNames = str | list[str | list[str]] | dict[str, list[str]] | None


@dataclass
class SuiteEntry:
    """One set of a suite, as its YAML says it.

    Attributes:
        data: ``class_path`` and ``init_args`` of a :class:`lit_clip.evaluation.data.Pictures`; its ``root`` or ``path``
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
        require("test" in self.splits, f"splits: there is no test, only {', '.join(self.splits)}")
        unknown = self.splits.keys() - {"train", "val", "test"}
        require(not unknown, f"splits: {', '.join(sorted(unknown))} is none of train, val, test")
        require(bool(self.folds), "folds: empty; leave it out for a set without folds")
        if self.tasks is None:
            self.tasks = self._possible()
        trained = {"linear_probe", "few_shot", "geolocation"} & set(self.tasks)
        require(not trained or "train" in self.splits, f"tasks: {', '.join(trained)} needs a split called train")

    def _possible(self) -> list[Task]:
        if self.metric == "recall@1":
            return ["retrieval"]
        if self.metric == "within_km":
            return ["geolocation"]
        if "train" not in self.splits:
            return ["zero_shot"]
        if self.metric == "map11":  # of pictures with several classes a few of each are not defined
            return ["zero_shot", "linear_probe"]
        return ["zero_shot", "linear_probe", "few_shot"]

    def open(self, split: str, fold: int, data_root: Path) -> Pictures:
        """One split of one fold.

        Raises:
            MissingData: it is not below ``data_root``.
            InputError: it is there and cannot be used.
        """
        options: dict[str, Any] = {**self.data.get("init_args", {}), **self.splits[split], **self.folds[fold]}
        for key in PLACES:
            if isinstance(options.get(key), str):
                options[key] = str(data_root / options[key])
                if not Path(options[key]).exists():
                    raise MissingData(f"{options[key]}: not there; {self.how_to_get or 'see the suite file'}")
        return _instantiate({"class_path": self.data["class_path"], "init_args": options})


def _instantiate(spec: Mapping[str, Any]) -> Pictures:
    from lit_clip.cli import one_line, user_error

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=Pictures, required=True)
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
            require(name not in entries, f"{path}: {name} is in the suite already; call one of the two otherwise")
            require("/" not in name, f"{path}: {name!r} is part of metric and file names; leave out the slash")
            entries[name] = _entry(parser, value, f"{path}: {name}")
    require(bool(entries), "suite: no sets")
    return entries


def _sets(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    sets = values.get("sets") if isinstance(values, dict) else None
    if not isinstance(sets, dict):
        raise InputError(f"{path}: no mapping called sets; a suite is sets: {{name: {{data: ...}}}}")
    return sets


def _entry(parser: ArgumentParser, value: Any, where: str) -> SuiteEntry:
    from lit_clip.cli import one_line

    try:
        require(isinstance(value, dict), "a set is a mapping with data, splits, ...")
        return SuiteEntry(**parser.parse_object(value).as_dict())
    except (ArgumentError, InputError) as error:
        raise InputError(f"{where}: {one_line(error)}") from error
