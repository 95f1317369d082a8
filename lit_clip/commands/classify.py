"""``lit-clip classify``: classify image files, zero-shot or with a head from examples."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lit_clip import load_model
from lit_clip.commands.class_examples import TABLES, folder_names, folder_truth, read_examples
from lit_clip.commands.class_output import NO_TRUTH, Judge, Output, RankedClass, ranked, write_classes
from lit_clip.commands.class_sources import NAMES_ALONE, ClassOptions, ClassSource
from lit_clip.embedding.encode import Encoding, check_complete, report_skipped
from lit_clip.embedding.image_files import FileRows, find_images
from lit_clip.embedding.reading import (
    UnreadableRow,
    check_finite,
    encoded_batches,
    features_of_both_kinds,
    image_features,
)
from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_metrics import metrics_typed
from lit_clip.evaluation.suite import check_name
from lit_clip.evaluation.zero_shot import check_templates, imagenet_templates
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import claimed
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.html import page_path
from lit_clip.tools.images import OnError, or_skip
from lit_clip.tools.reading import read_text, read_yaml

ENCODING, SHEET = Encoding(), "classify.html"
NO_LINES = (".json", ".yaml", ".yml")  # files in which names stand between other signs
FEW = 20  # images in class folders that are shown unless --output is typed: the summary is what is read


def classify(
    images: list[str],
    *,
    model: str,
    classes: list[str] | None = None,
    templates: list[str] = ["a photo of a {}."],  # noqa: B006 # jsonargparse shows it in the help; nothing writes to it
    top_k: int = 5,
    output: Output | None = None,
    output_file: str | None = None,
    metrics: list[str] | None = None,
    sheet: str = SHEET,
    learning: ClassOptions = NAMES_ALONE,
    encoding: Encoding = ENCODING,
) -> None:
    """Classify images zero-shot, from class names, or with a head from examples.

    The probabilities of an image's classes add up to 1, except with a SigLIP, which judges each class by itself, and
    where examples have several classes.

    Args:
        images: files, and folders with everything below; with groups of classes also a table (.csv, .tsv) with the
            column image and one for each group, of the true classes.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        classes: names; or a text file with one name per line; or a YAML file of groups, such as colour: [red, blue],
            with a class of each for an image; if not given, those of the head or of the examples, or the names of the
            folder's subfolders.
        templates: prompt templates with {} for the name; or a text file with one per line; or imagenet, the paper's 80.
        top_k: number of classes shown for each image.
        output: format of the results; by default what the name of output_file ends in, or a table, of the first 20
            images if images lie in class folders. CSV has an apostrophe before names that a spreadsheet would compute,
            such as =1.
        output_file: write the results to this file instead of standard output.
        metrics: for images in class folders, further metrics as NAME=CLASS_PATH, of torchmetrics or of your own, such
            as auroc=torchmetrics.classification.MulticlassAUROC.
        sheet: for images in class folders, an HTML page with accuracy, confusions and the wrong images, which replaces
            an earlier one.
        learning: a head that is fitted on examples, or was.
        encoding: how images are read and encoded.
    """
    require(top_k >= 1, f"--top_k {top_k} must be at least 1")
    target, page = Path(output_file) if output_file else None, page_path("sheet", sheet)
    require(target is None or target.absolute().parent.is_dir(), f"--output_file {target}: there is no such folder")
    given, typed = metrics_typed(metrics or []), read_groups(classes or [])
    prompts = imagenet_templates() if templates == ["imagenet"] else _lines(templates, "templates")
    check_templates(prompts)
    files, groups = _groups(images, typed, prompts, learning, given, encoding.on_error)
    judged = any(group.judge.known for group in groups)
    require(judged or sheet == SHEET, f"--sheet: {NO_TRUTH}")
    saved = [path for group in groups for path in group.source.saved]
    listed = [path for group in groups for path in group.source.listed]
    few = FEW if output is None and target is None and judged else None
    form: Output = output or next(
        (kind for kind in get_args(Output) if target and target.suffix == f".{kind}"), "table"
    )
    with claimed(target, page if judged else None, *saved, option="file"), claimed(*listed, option=""):
        clip = load_model(model).to(best_device())
        for group in groups:
            group.source.begin(clip, group.names, prompts, encoding)
        found, unreadable = _classified(clip, files, groups, encoding, top_k, form, target)
        write_classes(dict(islice(found.items(), few)), form, target)
        if few and len(found) > few:
            stderr().print(f"the first {few} of {len(found):,} images; --output table shows all", highlight=False)
        for group in groups:
            if summary := group.source.summary(group.none, len(found)):
                stderr().print(f"{group.title}: {summary}" if group.title else summary, highlight=False)
        if target:
            report_skipped([file.key for file in files], unreadable, target.with_name(f"{target.name}.skipped.txt"))
        for bad in () if target else unreadable:
            stderr().print(f"skipped: {bad.message}")
        for group in groups:
            group.source.report([file for file in files if file.key in found])
        for group in groups:
            group.judge.finish(page)


@dataclass
class Group:
    """Classes of which an image has one; the title is empty for a single group."""

    title: str
    names: Sequence[str]
    source: ClassSource
    judge: Judge
    none: int = 0  # number of images that show none of the classes

    @torch.no_grad()
    def classes(self, rows: Sequence[int], before: Tensor, after: Tensor, top_k: int) -> list[list[RankedClass]]:
        """Score a batch and judge it; return the classes of each image."""
        scores = self.source.scores(before, after)
        probability, none = scores.probability.cpu(), scores.none.tolist()
        self.none += sum(none)
        self.judge.add(rows, probability, none)
        return ranked(probability, none, self.names, top_k, self.source.above, self.title)


def _groups(
    images: Sequence[str],
    typed: Mapping[str, list[str] | None],
    prompts: Sequence[str],
    learning: ClassOptions,
    metrics: Mapping[str, Any],
    on_error: OnError,
) -> tuple[FileRows, list[Group]]:
    """Return the files, and the groups of classes or one untitled group, each with its source and judge."""
    labelled = "" not in typed and len(images) == 1 and Path(images[0]).suffix.lower() in TABLES
    files = FileRows([] if labelled else find_images(images, on_error))
    folders = [path for path in map(Path, images) if path.is_dir()]
    groups: list[Group] = []
    for title, own in typed.items():
        source = learning.source(own, prompts, on_error, title)
        names = source.names or own or folder_names(images, files)
        truth = [-1] * len(files) if title else folder_truth(files, names, folders)
        if labelled:
            files, labels, *_ = read_examples(images[0], names, on_error, title, "")
            truth = labels.tolist()
        groups.append(Group(title, names, source, Judge(files, names, truth, metrics, title)))
    return files, groups


def _classified(
    model: CLIP,
    files: FileRows,
    groups: Sequence[Group],
    encoding: Encoding,
    top_k: int,
    output: Output,
    target: Path | None,
) -> tuple[dict[str, list[RankedClass]], list[UnreadableRow]]:
    """Return the classes of each readable image by its key; after Ctrl-C, write the finished ones."""
    found: dict[str, list[RankedClass]] = {}
    unreadable: list[UnreadableRow] = []
    kind = features_of_both_kinds if groups[0].source.both_kinds else image_features
    encode, width = kind(model, encoding.precision), model.config.embed_dim
    settings = encoding.batch_size, encoding.workers
    try:
        with closing(encoded_batches(model, files, *settings, encode=encode, title="images")) as batches:
            for batch, features in batches:
                for bad in batch.unreadable:
                    require(encoding.on_error == "skip", or_skip(bad.message, "--on_error skip"))
                unreadable += batch.unreadable
                if batch.rows:
                    check_finite(features, files[batch.rows[0]].key)
                    kinds = features[:, :-width], features[:, -width:]
                    best = [group.classes(batch.rows, *kinds, top_k) for group in groups]
                    keys = [files[row].key for row in batch.rows]
                    found |= {key: list(chain(*own)) for key, *own in zip(keys, *best, strict=True)}
    except KeyboardInterrupt:
        kept = target.with_name(f"{target.name}.partial") if target else None
        write_classes(found, output, kept)
        raise KeyboardInterrupt(f"{len(found)} of {len(files)} are in {kept or 'the output'}") from None
    check_complete(len(found), len(files), unreadable)
    return found, unreadable


def _lines(words: Sequence[str], option: str) -> list[str]:
    """Return the words, or the lines of a file if the only word is its path."""
    path = Path(words[0]) if len(words) == 1 else None
    if path is None or not (os.path.isfile(path) or path.suffix == ".txt"):  # Path.is_file fails beyond 255 characters
        return [" ".join(word.split()) for word in words]
    require(path.suffix not in NO_LINES, f"--{option} {path}: write a text file, {path.stem}.txt, with one per line")
    text = read_text(path, f"--{option}")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    require(bool(lines), f"--{option} {path}: the file is empty; write one per line")
    return lines


def read_groups(words: Sequence[str]) -> dict[str, list[str] | None]:
    """Return the classes of each group in a YAML file, or one untitled group with the typed classes, if any."""
    path = words[0] if len(words) == 1 else ""
    if not path.endswith((".yaml", ".yml")):
        return {"": read_classes(words) if words else None}
    found, groups = read_yaml(path, "--classes"), dict[str, list[str] | None]()
    wanted = "must be groups with two names or more, such as colour: [red, blue]; put yes, no and numbers in quotes"
    require(isinstance(found, dict) and bool(found), f"--classes {path}: {wanted}")
    for title, names in found.items():
        check_name(title, f"--classes {path}")
        require(title != "image", f"--classes {path}: image is a table's column of images; rename the group")
        fits = isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)
        require(fits, f"--classes {path}: {title}: {wanted}")
        groups[title] = read_classes(names)
    return groups


def read_classes(words: Sequence[str]) -> list[str]:
    """Return class names as typed, from a file with one name per line, or from a list with commas, as in YAML."""
    names, bracketed = _lines(words, "classes"), re.fullmatch(r"\[([^\[\]]*)\]", " ".join(words))
    if bracketed or (len(names) == len(words) == 1 and "," in names[0]):
        text = " ".join((bracketed[1] if bracketed else names[0]).split())
        names = [name.strip(" '\"") for name in text.split(",")]
    require(all(names), "--classes: a name is empty")
    for name in names:
        even = all(name.count(left) == name.count(right) for left, right in ("[]", "()"))
        one = even and not re.fullmatch(r"\[.*,.*\]", name)
        require(one, f"--classes: {name}: its brackets hold no list here; type all names as [a, b], or each as a word")
    counts = Counter(name.casefold() for name in names)
    if repeated := {name.casefold(): repr(name) for name in names if counts[name.casefold()] > 1}:
        listed = ", ".join(repeated.values())
        raise InputError(f"--classes: named more than once: {listed}; an image has one best class, name each once")
    return names
