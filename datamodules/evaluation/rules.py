"""Sets defined by a rule in ``rules.yaml``: a list of images or class folders, and an order of labels.

torchvision's own classes are not used. Some decode images or hash gigabytes on construction, their label order is not
always the order of the paper's prompts, and a broken list ends in a traceback that does not name the file. The tests
compare with them.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Literal

from lit_clip.errors import InputError, require
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.tools.reading import naming, read_yaml
from lit_clip.tools.untrusted import entries
from .annotation_files import AGAIN, find, read_json, read_json_lines, read_table, read_text
from .image_files import ImageFiles, by_hash, in_class_folders, subfolders


@dataclass(frozen=True)
class Rule:
    """Layout of a set on disk; ``rules.yaml`` explains the fields."""

    doc: str
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)
    places: tuple[str, ...] = ("",)
    inside: str = ""
    images: str = ""
    lists: tuple[str, ...] = ()
    line: str = ""
    columns: tuple[str, str, str] | None = None
    once: bool = False
    file: str = "{file}"
    classes: list[str] | int | str | None = None
    class_line: str = "(.+)"
    digits: int = 1
    count: int = 0
    needs: str = ""
    names: list[str] | Literal["imagenet"] | None = None
    words: dict[str, str] = field(default_factory=lambda: {"_": " "})
    by_words: bool = False

    def name_of(self, label: str) -> str:
        """Return the name of a class."""
        for expression, words in self.words.items():
            label = re.sub(expression, words, label)
        return label


@cache
def rules() -> dict[str, Rule]:
    """Read ``rules.yaml``."""
    return {name: Rule(**fields) for name, fields in read_yaml(Path(__file__).with_name("rules.yaml")).items()}


def list_set(
    name: str, root: str, split: str = "", **options: int
) -> tuple[Path, list[tuple[str, str]], list[str], list[Path], list[str]]:
    """Return a split's folder, rows of file and class, classes, annotations and class names; see ``rules.yaml``."""
    rule = rules()[name]
    if rule.splits and split not in rule.splits:
        raise InputError(f"split: must be one of {', '.join(rule.splits)}, not {split!r}")
    differs = dict(rule.splits.get(split, {}))
    in_paths = {"split": differs.pop("split", split), **rule.options, **options}
    rule = replace(rule, **differs)
    folder = Path(root)
    if rule.inside:
        places = [f"{place}/{rule.inside}".lstrip("/") for place in rule.places]
        folder = find(folder, places, "files of this set").parent
    elif any(rule.places):
        folder = find(folder, rule.places, "folder of this set")
    images = folder / rule.images.format(**in_paths)
    lists = [find(folder, [each.format(**in_paths) for each in rule.lists], "list of images")] if rule.lists else []
    rows = [row for path in lists for row in _rows(rule, path)]
    classes, annotations = _classes(rule, folder, images, rows)
    if not lists:
        rows = _in_folders(name, images, classes, split, options)
    names = imagenet_class_names() if rule.names == "imagenet" else rule.names or list(map(rule.name_of, classes))
    rows = [(rule.file.format(file=file), each) for file, each in rows]
    return images, rows, classes, [*lists, *annotations], names


def _rows(rule: Rule, path: Path) -> list[tuple[str, str]]:
    if path.suffix == ".json":
        lists = read_json(path, dict[str, list[str]])
        return [(image, each) for each in sorted(lists) for image in lists[each]]
    if rule.columns:
        delimiter, file, label = rule.columns
        if path.suffix == ".jsonl":
            kind = entries({file: str, label: int}, total=True)
            return [(row[file], str(row[label])) for row in read_json_lines(path, kind)]
        return [(row[file], row[label]) for row in read_table(path, {file: [file], label: [label]}, delimiter)]
    rows = [(match["file"], match["class"]) for match in _matches(rule.line, path)]
    first = dict(reversed(rows))
    return [(file, first[file]) for file in dict.fromkeys(file for file, _ in rows)] if rule.once else rows


def _matches(expression: str, path: Path) -> list[re.Match[str]]:
    matches = []
    for number, line in enumerate(map(str.strip, read_text(path).splitlines()), start=1):
        match = re.fullmatch(expression, line)
        if line and match is None:
            raise InputError(f"{path} line {number}: {line[:60]!r} is no line of this list; {AGAIN}")
        matches += [match] if match else []
    return matches


def _classes(rule: Rule, folder: Path, images: Path, rows: list[tuple[str, str]]) -> tuple[list[str], list[Path]]:
    """Return the classes in label order, and the file that lists them."""
    if isinstance(rule.classes, int):
        return [f"{number:0{rule.digits}}" for number in range(rule.classes)], []
    if isinstance(rule.classes, list):
        return rule.classes, []
    listed = [] if rule.classes is None or (folder / rule.classes).is_dir() else [folder / rule.classes]
    if listed:
        classes = [match[1] for match in _matches(rule.class_line, listed[0])]
    elif rule.classes is None and rows:
        classes = list({each for _, each in rows})
    else:
        classes = subfolders(images if rule.classes is None else folder / rule.classes)
    if rule.count not in (0, len(classes)):
        raise InputError(f"{images}: {len(classes)} class folders instead of {rule.count}; unpack the archive again")
    if rule.needs and rule.needs not in classes:
        raise InputError(f"{images}: no {rule.needs}, which is a class of table 9; unpack the archive again")
    return sorted(classes, key=rule.name_of if rule.by_words else None), listed


def _caltech101(files: list[str], split: str, shots: int, seed: int, **_: Any) -> list[str]:
    part = slice(shots) if split == "train" else slice(shots, None)
    return by_hash(files, seed)[part]


def _resisc45(files: list[str], split: str, seed: int, **_: Any) -> list[str]:
    tenth = len(files) // 10
    part = slice(tenth) if split == "train" else slice(tenth, 9 * tenth)
    return by_hash(files, seed)[part]


def _eurosat(files: list[str], split: str, sampled: int, generator: random.Random, **_: Any) -> list[str]:
    name, third = files[0].partition("/")[0], sampled // 3
    require(len(files) >= sampled, f"{name}: {len(files)} images, not {sampled}; unpack the archive again")
    start = ("train", "val", "test").index(split) * third
    return generator.sample(files, sampled)[start : start + third]


# Choose a split's images of a class, for a set without published splits.
DRAWN: dict[str, Callable[..., list[str]]] = {"Caltech101": _caltech101, "EuroSAT": _eurosat, "RESISC45": _resisc45}


def _in_folders(
    name: str, images: Path, classes: list[str], split: str, options: dict[str, int]
) -> list[tuple[str, str]]:
    """List the images in the classes' folders, or the drawn ones if a set has no published splits."""
    if name not in DRAWN:
        return in_class_folders(images, classes)
    rows, generator = [], random.Random(options["seed"])
    with naming(images):
        for each in sorted(classes):
            files = [file for file, _ in in_class_folders(images, [each])]
            rows += [(file, each) for file in sorted(DRAWN[name](files, split, generator=generator, **options))]
    return rows


@cache
def opener(name: str) -> Callable[..., ImageFiles]:
    """Return the function that opens a set, with its rule's arguments."""
    rule, kind = rules()[name], Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter("root", kind, annotation=str)]
    if rule.splits:
        splits = tuple(rule.splits)
        parameters.append(Parameter("split", kind, annotation=Literal[splits], default=splits[-1]))
    parameters += [Parameter(each, kind, annotation=int, default=default) for each, default in rule.options.items()]
    signature = Signature(parameters, return_annotation=ImageFiles)

    def open_set(*args: Any, **kwargs: Any) -> ImageFiles:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return ImageFiles(*list_set(name, **given.arguments))

    hints = {each.name: each.annotation for each in parameters} | {"return": ImageFiles}
    vars(open_set)["__signature__"] = signature
    open_set.__name__, open_set.__doc__, open_set.__annotations__ = name, rule.doc, hints
    return open_set
