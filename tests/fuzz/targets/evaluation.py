"""Suites, results of evaluations, and the annotation files of evaluation sets."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from rich.console import Console

from datamodules.evaluation import LabelledTable, LocatedImages
from lit_clip.errors import InputError
from lit_clip.evaluation.comparison import OtherRun, paired_differences
from lit_clip.evaluation.prompts import prompts_of_set
from lit_clip.evaluation.report import charts, page
from lit_clip.evaluation.report.results_table import print_results
from lit_clip.evaluation.report.tables import write_tables
from lit_clip.evaluation.results import read_results
from lit_clip.evaluation.suite import read_suite
from tests.fuzz.inputs import CANARY, Input, Inputs, Target, damaged, edited_json
from tests.fuzz.samples import table_images
from tests.helpers.miniatures import MINIATURES, open_miniature

LABELS = "image,label\n0.png,cat\n1.png,dog\n2.png,cat\n"
PLACES = "image,latitude,longitude\n0.png,1.5,2\n1.png,-89,180\n"


def write_sets(folder: Path) -> None:
    """Write a folder of classes, a labelled table and captions."""
    for number, (name, data) in enumerate(list(table_images().items())[:4]):
        path = folder / "classes" / ("a_dog", "cat")[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (folder / name).write_bytes(data)
    (folder / "labels.csv").write_text(LABELS, encoding="utf-8")
    (folder / "captions.csv").write_text("image,caption\n0.png,a cat\n1.png,a dog\n", encoding="utf-8")


@cache
def suite_trees() -> dict[str, Any]:
    """Return suites of each kind of set."""
    classes = {
        "data": {"class_path": "datamodules.ImageFolderClasses"},
        "splits": {"test": {"root": "classes"}},
        "templates": ["a {}.", "{}"],
        "class_names": ["a dog", "cat"],
        "metric": "top1",
        "tasks": ["zero_shot"],
        "paper": "CIFAR10",
        "how_to_get": "ask",
        "note": "",
        "folds": [{}],
    }
    table = {"data": {"class_path": "datamodules.evaluation.LabelledTable", "init_args": {"path": "labels.csv"}}}
    pairs = {"class_path": "datamodules.evaluation.CaptionedPairs", "init_args": {"path": "captions.csv"}}
    return {"suite.yaml": {"sets": {"a": classes, "b": table, "c": {"data": pairs, "metric": "recall@1"}}}}


def suite_inputs() -> Inputs:
    whole = {name: json.dumps(tree, indent=1).encode() for name, tree in suite_trees().items()}
    return st.one_of(edited_json(suite_trees), edited_json(suite_trees), damaged(lambda: whole))


def open_suite(folder: Path, given: Input) -> Iterator[str]:
    """Read a suite, and open its sets and their prompts as an evaluation does."""
    write_sets(folder)
    path = folder / given.name
    path.write_bytes(given.data)
    entries = read_suite(path)
    for entry in entries.values():
        try:
            opened: Any = entry.open("test", 0, folder)
            if hasattr(opened, "class_names"):
                prompts_of_set(entry, opened)
                assert len(opened.labels()) == len(opened)
            assert opened.images(0)
        except InputError:  # the others go on
            yield "skipped"
        else:
            yield "used"


@cache
def result_trees() -> dict[str, Any]:
    """Return the results of an evaluation."""
    errors = [{"key": "a/1.png", "truth": "cat", "prediction": "dog", "probability": 0.9, "image": "a/1.jpg"}]
    errors[0]["nearest"] = [["dog", 0.9], ["cat", 0.1]]
    zero_shot = {
        "value": 0.5,
        "metrics": {"top1": 0.5, "top5": 0.8},
        "intervals": {"top1": [0.4, 0.6]},
        "baseline": 0.1,
        "per_class": [["cat", 0.5, 10], ["dog", 0.4, 10]],
        "confusions": [["cat", "dog", 88]],
        "errors": errors,
    }
    probe = {"value": 0.9, "metrics": {"top1": 0.9}, "l2": 1.0, "search": [[0.1, 0.4], [1.0, 0.5]], "baseline": 0.1}
    shots = {"value": 0.7, "shots": [[1, [0.4, 0.5]], [2, [0.6, 0.7]]]}
    common = {"status": "done", "reason": "", "how_to_get": "", "note": "", "metric": "top1"}
    splits = {"test": {"images": 1000, "skipped": [["bad.png", "truncated file"]]}}
    prompts = {"classes": 2, "texts": 4, "sha256": "ab" * 32}
    tasks = {"zero_shot": zero_shot, "linear_probe": probe, "few_shot": shots}
    whole = {
        **common,
        "paper": "CIFAR10",
        "splits": splits,
        "prompts": prompts,
        "class_names": ["cat", "dog"],
        "tasks": tasks,
    }
    bias = {
        "images": 3,
        "accuracy": {"gender": {"by_gender": {"Male": {"value": 0.2, "count": 1, "images": 4, "interval": [0, 1]}}}},
    }
    sets = {
        "cifar10": whole,
        "imagenet": {
            **common,
            "paper": "ImageNet",
            "splits": splits,
            "tasks": {"zero_shot": {"value": 0.6, "metrics": {"top1": 0.6}}},
        },
        "imagenetv2": {
            **common,
            "paper": "ImageNetV2",
            "splits": {},
            "tasks": {"zero_shot": {"value": 0.5, "metrics": {"top1": 0.5}}},
        },
        "fairface": {**common, "paper": "", "splits": {}, "tasks": {"bias": bias}},
        "pets": {
            **common,
            "paper": "OxfordPets",
            "status": "missing",
            "reason": "not there",
            "splits": {},
            "tasks": {},
        },
    }
    head = {
        "lit_clip": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "precision": "32-true",
        "packages": {"torch": "2.8.0"},
    }
    model = {
        "name": "ViT-B-32:openai",
        "weights_sha256": "cd" * 32,
        "architecture": {"image": {"width": 768}},
        "parameters": 1,
    }
    return {"results.json": {**head, "model": model, "suite": [{"path": "p.yaml", "sha256": "ef" * 32}], "sets": sets}}


def result_inputs() -> Inputs:
    whole = {name: json.dumps(tree).encode() for name, tree in result_trees().items()}
    trees = edited_json(result_trees, (f"{CANARY}.Evil", "<script>alert(1)</script>", "../../../etc/passwd"))
    return st.one_of(trees, trees, damaged(lambda: whole))


def read_other_results(folder: Path, given: Input) -> Iterator[str]:
    """Read another run's results, and compare with them: what is read must not fail hours later.

    Most charts are made but not written, which takes ten times longer than all else.
    """
    (folder / given.name).write_bytes(given.data)
    results = read_results(folder / given.name)
    whole = result_trees()["results.json"]
    console = Console(file=io.StringIO(), width=200)
    written = charts.svg if sum(given.data) % 16 == 0 else lambda figure, name: ""
    try:
        print_results(results, console)
        with (
            patch.object(page, "svg", written),
            patch.object(page, "few_shot", charts.few_shot),
        ):  # which tests leave out
            page.write_report(whole, folder, {"other": results})
            page.write_report(results, folder, {"other": whole})
        write_tables(results, folder, {"other": whole, "b": results}, {"b": ["b"], "this": ["other"]})
        paired_differences(whole, folder, {"other": OtherRun("", folder, results)})
    except InputError as error:
        raise AssertionError(f"refused after it was read: {error}") from error
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        texts = [cell for row in csv.reader(file) for cell in row if not _is_number(cell)]
    assert not [text for text in texts if text.startswith(tuple("=+-@\t\r"))], "a formula in results.csv"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text, "a script of the results is in the report"
    yield "used"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@cache
def whole_miniatures() -> dict[str, dict[str, bytes]]:
    """Return the files of small evaluation sets, by set and path."""
    sets = {}
    for key, miniature in MINIATURES.items():
        if miniature.index:
            with TemporaryDirectory() as name:
                root = Path(name)
                miniature.write(root)
                files = (path for path in root.rglob("*") if path.is_file())
                sets[key] = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    return sets


@cache
def whole_annotations() -> dict[str, bytes]:
    """Return annotation files by the set's name."""
    files = {key: content[MINIATURES[key].index] for key, content in whole_miniatures().items()}
    jsonl = "\n".join(json.dumps({"image": f"{row}.png", "label": row % 2}) for row in range(3))
    tables = {"labels.csv": LABELS.encode(), "labels.jsonl": jsonl.encode(), "places.csv": PLACES.encode()}
    return {**files, **tables}


def annotation_inputs() -> Inputs:
    def trees() -> Mapping[str, Any]:
        return {name: json.loads(whole_annotations()[name]) for name in ("food101", "clevr_counts")}

    return st.one_of(damaged(whole_annotations), damaged(whole_annotations), edited_json(trees))


def read_annotations(folder: Path, given: Input) -> Iterator[str]:
    """Open an evaluation set of which the annotation file is replaced, and read its labels and some images."""
    if given.name in MINIATURES:
        for name, data in whole_miniatures()[given.name].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / MINIATURES[given.name].index).write_bytes(given.data)
        opened: Any = open_miniature(MINIATURES[given.name], folder, "test")
    else:
        write_sets(folder)
        (folder / given.name).write_bytes(given.data)
        opened = (LocatedImages if given.name == "places.csv" else LabelledTable)(str(folder / given.name))
    if hasattr(opened, "class_names"):
        labels = opened.labels()
        assert len(labels) == len(opened)
        assert all(-1 <= label < len(opened.class_names) for label in labels), "a label outside of the classes"
        assert all(isinstance(name, str) for name in opened.class_names), "class names that are no texts"
    opened.stamp()
    for row in range(min(2, len(opened))):
        assert opened.images(row)
        yield "used"


suites = Target(suite_inputs, open_suite, own=True)
results = Target(result_inputs, read_other_results)
annotations = Target(annotation_inputs, read_annotations)
