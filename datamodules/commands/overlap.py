"""``lit-clip overlap``: find evaluation images in training data, and measure how much they help a model."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Column, Table
from torch import Tensor

from lit_clip import load_model
from lit_clip.embedding.encode import Encoding
from lit_clip.embedding.parts import Parts
from lit_clip.embedding.reading import UnreadableRow, row_means
from lit_clip.errors import require
from lit_clip.evaluation.data import ImageSet, LabelledImages, MissingData
from lit_clip.evaluation.overlap import CONFIDENCE, bonferroni
from lit_clip.evaluation.prompts import Prompts, prompts_of_set, text_classifier
from lit_clip.evaluation.suite import SuiteEntry, read_suite
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.tools.atomic import claimed, make_folder, remove, replacing
from lit_clip.tools.console import Console, Text, plural, stderr
from lit_clip.tools.hardware import Precision, autocast, best_device
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.images import OnError
from lit_clip.tools.imports import __version__
from lit_clip.tools.reading import naming
from ..evaluation.own_classes import ImageFolderClasses
from ..open_source import open_data
from ..overlap.page import percent, points, write_overlap
from ..overlap.search import (
    EncodedImages,
    Searched,
    SetFindings,
    SourceRows,
    encode_images,
    findings_of,
    leaked_rows,
)
from ..pairs.findings import DataOptions, write_findings
from ..pairs.source import Columns, PairSource

LISTED_BAD = 20
OUTPUTS = (".findings.csv", ".html", ".json")


@dataclass(frozen=True)
class SkippingEncoding(Encoding):
    """Options for encoding; by default the report counts images that cannot be read."""

    on_error: OnError = "skip"


def overlap(
    evaluation: list[str],
    *,
    train: list[str],
    model: str,
    output: str = "overlap.html",
    suite: list[str] | None = None,
    sets: list[str] | None = None,
    data_root: str = ".",
    threshold: float = 0.95,
    templates: list[str] = ["a photo of a {}."],  # noqa: B006 # jsonargparse shows it in the help; nothing writes to it
    columns: Columns = Columns(),  # noqa: B008  # immutable
    split: str | None = None,
    encoding: SkippingEncoding = SkippingEncoding(),  # noqa: B008  # immutable
) -> None:
    """Find evaluation images in a training set, and measure how much they help a model (section 5 of the paper).

    The page shows pairs around the threshold, and the figures at others: look at them, and run the command again
    with another threshold if need be.
    The same command resumes an interrupted run.

    Args:
        evaluation: folders with a subfolder for each class; or none, and --suite.
        train: a table, a folder of images with captions beside them, tar shards or anything else that training takes.
        model: a checkpoint, or a name that lit_clip.load_model accepts; it compares images, and its accuracy is told.
        output: an HTML page, beside which a JSON file has all figures and pairs; or only the .json file. Beside them
            .findings.csv lists all training images that are in a set, for fit --data.keep and shard --keep.
        suite: YAML files of evaluation sets, or names of packaged ones.
        sets: names of sets of the suite; by default all that are on disk.
        data_root: folder of the suite's sets.
        threshold: least cosine similarity of images that count as the same. Images also do if they look the same, by a
            hash that survives scaling and compression.
        templates: prompt templates with {} for the class name, for folders; sets of a suite have their own.
        columns: of a table of training pairs.
        split: of training data that come in splits.
        encoding: how images are read and encoded.
    """
    path = Path(output)
    require(path.suffix in (".html", ".json"), f"--output {output}: must be a .html or a .json file")
    require(path.absolute().parent.is_dir(), f"--output {output}: there is no such folder")
    require(-1 <= threshold <= 1, f"--threshold {threshold}: must be between -1 and 1, as cosine similarities are")
    opened = open_sets(evaluation, suite or [], sets, Path(data_root), templates)
    for name, each in opened.items():  # class names that do not fit are refused before the training data are read
        with naming(name):
            _prompts(each)
    require(bool(train), "--train: name a table, a folder or shards")
    data = DataOptions(train, columns, split)
    training = open_data(data, encoding.on_error)
    outputs = [path.with_suffix(suffix) for suffix in OUTPUTS]
    with claimed(*outputs):
        clip = load_model(model)
        described = {"name": model, "fingerprint": fingerprint(clip).model, "precision": encoding.precision}
        cache = path.with_name(f".{path.stem}.found")
        stamp = [described["fingerprint"], encoding.precision, training.stamp(*outputs)]
        searched, unreadable = _searched(clip, opened, threshold, training.every, cache, stamp, encoding)
        clip.to(best_device())
        findings = {}
        for name, each in opened.items():
            correct = recognised(clip, each, searched[name].images, encoding.precision)
            findings[name] = findings_of(each.images, searched[name], correct)
        leaks = leaked_rows(findings, training.every)
        counts, command = write_findings(outputs[0], leaks, training.every, data)
        figures = {
            "data": train,
            "images": len(training.every) - len(unreadable),
            "skipped": dict(Counter(row.reason for row in unreadable)),
            "skipped_lines": [row.message for row in unreadable[:LISTED_BAD]],
        }
        report = _report(findings, described, figures, training.every)
        _write(path, report, findings, training.every, command if counts else "")
        remove(cache)


class EvaluationSet(NamedTuple):
    """A set to search the training data for, and its entry in the suite, which names the classes."""

    images: ImageSet
    entry: SuiteEntry


def open_sets(
    folders: Sequence[str], suites: Sequence[str], names: Sequence[str] | None, data_root: Path, templates: list[str]
) -> dict[str, EvaluationSet]:
    """Open the sets; skip a suite's missing sets with a note, unless they were named."""
    require(bool(folders or suites), "no evaluation set; name a folder of classes before the options, or a --suite")
    require(not names or bool(suites), "--sets: needs a --suite")
    opened: dict[str, EvaluationSet] = {}
    for folder in folders:
        name = os.path.basename(os.path.realpath(folder))  # Path.resolve fails for a link to itself
        require(name not in opened, f"{folder}: another set is named {name}; rename the folder")
        entry = SuiteEntry({"class_path": "lit_clip.datamodules.ImageFolderClasses"}, templates=templates)
        opened[name] = EvaluationSet(ImageFolderClasses(folder), entry)
    entries = read_suite(suites) if suites else {}
    for name in names or []:
        require(name in entries, f"--sets {name}: not in the suite; it has {', '.join(entries)}")
    for name, entry in entries.items():
        if names and name not in names:
            continue
        require(name not in opened, f"--sets {name}: a folder has the same name; rename it")
        try:
            opened[name] = EvaluationSet(entry.open("test", 0, data_root), entry)
        except MissingData as error:
            if names:
                raise
            stderr().print(f"skipped: {name}: {error}")
    require(bool(opened), f"--suite: none of its {len(entries)} sets is in {data_root}; set --data_root")
    return opened


def _prompts(each: EvaluationSet) -> Prompts | None:
    """Return the prompts of a set's classes; None unless each image has one class."""
    images = each.images
    if not isinstance(images, LabelledImages) or images.truth.relevance is not None:
        return None
    return prompts_of_set(each.entry, images)


def recognised(
    model: CLIP, each: EvaluationSet, encoded: EncodedImages, precision: Precision = "32-true"
) -> Tensor | None:
    """Return whether the model's first prediction is right, bool ``[N]``; None unless each image has one class."""
    images, prompts = each.images, _prompts(each)
    if prompts is None or not isinstance(images, LabelledImages):
        return None
    items, counts = np.unique(encoded.rows, return_counts=True)
    features = row_means(torch.from_numpy(encoded.features), counts.tolist())
    labels = torch.tensor(images.labels())[torch.from_numpy(items)]
    with autocast(model.device, precision):
        classifier = text_classifier(model, prompts, None).cpu().float()
    return (features @ classifier).argmax(dim=1) == labels


def _searched(
    clip: CLIP,
    opened: Mapping[str, EvaluationSet],
    threshold: float,
    source: PairSource,
    cache: Path,
    stamp: Sequence[str],
    settings: Encoding,
) -> tuple[dict[str, Searched], list[UnreadableRow]]:
    """Encode all images that the ``cache`` lacks, compare them, and return the unreadable training images."""
    make_folder(cache)
    device = best_device()
    searched = {}
    for name, each in opened.items():
        images, size = each.images, len(each.images)
        parts = _parts(cache, "set", *stamp[:2], type(images).__qualname__, images.stamp(), size)
        bad = encode_images(clip, images, parts, settings, f"images of {name}", images.several)
        searched[name] = Searched(EncodedImages.joined(parts), [row.message for row in bad], threshold, device)
    parts = _parts(cache, "training", *stamp)
    unreadable = encode_images(clip, SourceRows(source), parts, settings, "training images")
    for part in parts.read(EncodedImages.of):
        for batch in part.batches(settings.batch_size):
            for each in searched.values():
                each.add(batch)
    return searched, unreadable


def _parts(cache: Path, kind: str, *stamp: object) -> Parts:
    digest = hex_digest([__version__, *stamp])
    return Parts(cache / f"{kind}-{digest[:16]}", digest)


def _write(
    path: Path, report: Mapping[str, Any], findings: Mapping[str, SetFindings], source: PairSource, command: str
) -> None:
    """Write and print the results; ``command`` trains on the images that are in no set, empty if none is in one."""
    with replacing(path.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if path.suffix == ".html":
        write_overlap(path, report, findings, source, command)
    _print(report)
    stderr().print(f"pairs to look at: {path}" if path.suffix == ".html" else f"{path}")
    if command:
        stderr().print(f"train on the rest: {command}")


def _report(
    judged: Mapping[str, SetFindings], model: dict[str, str], train: dict[str, Any], source: PairSource
) -> dict[str, Any]:
    adjusted = bonferroni([findings.overlap.p_value for findings in judged.values()])
    sets = {}
    for (name, findings), p_value in zip(judged.items(), adjusted, strict=True):
        sets[name] = {
            "threshold": findings.searched.threshold,
            **asdict(findings.overlap),
            "p_value_bonferroni": p_value,
            "skipped": findings.searched.bad,
            "thresholds": [{"threshold": value, **asdict(other)} for value, other in findings.tried],
            "pairs": findings.pairs(source),
        }
    return {
        "lit_clip": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "train": train,
        "interval_confidence": CONFIDENCE,
        "sets": sets,
    }


def _print(report: Mapping[str, Any]) -> None:
    table = Table(Column("set", overflow="fold"), title=Text("data overlap"))
    for column in ("images", "overlap", "all", "clean", "on overlap", "all - clean, points", "p"):
        table.add_column(column, justify="right")
    for name, figures in report["sets"].items():
        share = f"{figures['overlap']:,} ({percent(figures['contamination'])})"
        accuracies = [percent(figures[f"accuracy_{part}"]) for part in ("all", "clean", "overlap")]
        p_value = figures["p_value_bonferroni"]
        last = [points(figures["difference"]), "" if p_value is None else f"{p_value:.2g}"]
        table.add_row(Text(name), f"{figures['images']:,}", share, *accuracies, *last)
    console = Console(file_width=120)
    console.print(table)
    train = report["train"]
    stderr().print(plural(train["images"], "training image"))
    for reason, count in train["skipped"].items():
        stderr().print(f"{plural(count, 'training image')} could not be read: {reason}")
    for name, figures in report["sets"].items():
        if figures["skipped"]:
            count = plural(len(figures["skipped"]), "image")
            stderr().print(f"{name}: {count} could not be read; the first: {figures['skipped'][0]}")
