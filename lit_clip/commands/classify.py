"""``lit-clip classify``: classify image files, zero-shot or with a head from examples."""

import os
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, get_args

from lit_clip import load_model
from lit_clip.commands.class_examples import TABLES, read_examples
from lit_clip.commands.class_output import Output, RankedClass, ranked, write_classes
from lit_clip.commands.class_sources import NAMES_ALONE, ClassOptions, ClassSource, Scores
from lit_clip.commands.class_truth import NO_TRUTH, Judge, folder_names, folder_truth
from lit_clip.embedding.encoding_task import Encoding, check_complete, report_skipped
from lit_clip.embedding.image_files import FileRows, find_images
from lit_clip.embedding.precision import check_precision
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
from lit_clip.tools.claims import claimed
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.images import OnError, or_skip
from lit_clip.tools.text_files import read_text, read_yaml


@dataclass(frozen=True)
class Known:
    """Options for images with known classes.

    Args:
        metrics: for images in class folders, further metrics as NAME=CLASS_PATH, of torchmetrics or of your own, such
            as auroc=torchmetrics.classification.MulticlassAUROC.
        sheet: for images in class folders, an HTML page with accuracy, confusions and the wrong images, which replaces
            an earlier one.
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    metrics: list[str] | None = None
    sheet: str = "classify.html"


ENCODING, KNOWN = Encoding(), Known()
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
    known: Known = KNOWN,
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
        known: what is done with images whose classes are known.
        learning: a head that is fitted on examples, or was.
        encoding: how images are read and encoded.
    """
    require(top_k >= 1, f"--top_k {top_k} must be at least 1")
    target = _place(output_file, "--output_file")
    _place(known.sheet, "--sheet", ".html")
    check_precision(encoding.precision)
    learning.check(classes)
    given, typed = metrics_typed(known.metrics or []), read_groups(classes or [])
    prompts = imagenet_templates() if templates == ["imagenet"] else _lines(templates, "templates")
    check_templates(prompts)
    groups = _groups(images, typed, prompts, learning, given, encoding.on_error)
    judged = any(group.judge.known for group in groups)
    require(judged or known.sheet == Known.sheet, f"--sheet: {NO_TRUTH}")
    sheet = Path(known.sheet) if judged else None
    saved = [path for group in groups for path in group.source.saved]
    listed = [path for group in groups for path in group.source.listed]
    with claimed(target, sheet, *saved, option="file"), claimed(*listed, option=""):
        clip = load_model(model).to(best_device())
        for group in groups:
            group.source.begin(clip, group.names, prompts, encoding)
        answers = Answers(FileRows(groups[0].judge.files), groups, top_k)
        few = FEW if output is None and target is None and judged else None
        by_name: Output = next((kind for kind in get_args(Output) if target and target.suffix == f".{kind}"), "table")
        answers.collect(Classifier(clip, [group.source for group in groups], encoding), output or by_name, target, few)
        for group in groups:
            group.source.report([answers.files[row] for row in answers.rows], group.kept)
        for group in groups:
            group.judge.finish(Path(known.sheet))


def _groups(
    images: Sequence[str],
    typed: Mapping[str, list[str] | None],
    prompts: Sequence[str],
    learning: ClassOptions,
    metrics: Mapping[str, Any],
    on_error: OnError,
) -> list["Group"]:
    """Return the groups of classes, or one untitled group, each with its source and a judge of the files."""
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
    return groups


def _place(name: str | None, option: str, suffix: str = "") -> Path | None:
    path = Path(name) if name else None
    require(path is None or path.suffix == suffix or not suffix, f"{option} {path}: must be a {suffix} file")
    require(path is None or path.absolute().parent.is_dir(), f"{option} {path}: there is no such folder")
    return path


@dataclass
class Classifier:
    """Encode images and score them; remember unreadable images."""

    model: CLIP
    sources: Sequence[ClassSource]
    encoding: Encoding
    unreadable: list[UnreadableRow] = field(default_factory=list)

    def scored(self, files: FileRows, title: str) -> Generator[tuple[list[int], list[Scores]], None, None]:
        """Yield each batch's file places and every source's scores, without skipped files."""
        self.unreadable, settings, width = [], self.encoding, self.model.config.embed_dim
        kind = features_of_both_kinds if self.sources[0].both_kinds else image_features
        encode = kind(self.model, settings.precision)
        batch_size, workers = settings.batch_size, settings.num_workers
        with closing(encoded_batches(self.model, files, batch_size, workers, encode=encode, title=title)) as batches:
            for batch, features in batches:
                for bad in batch.unreadable:
                    require(settings.on_error == "skip", or_skip(bad.message, "--on_error skip"))
                self.unreadable += batch.unreadable
                if batch.rows:
                    check_finite(features, files[batch.rows[0]].key)
                    found = [source.scores(features[:, :-width], features[:, -width:]) for source in self.sources]
                    yield batch.rows, [Scores(*(each.detach().cpu() for each in scores)) for scores in found]


@dataclass
class Group:
    """Classes of which an image has one, and their scores; the title is empty for a single group."""

    title: str
    names: Sequence[str]
    source: ClassSource
    judge: Judge
    kept: list[Scores] = field(default_factory=list)
    none: int = 0  # number of images that show none of the classes


@dataclass
class Answers:
    """The classes of each image, by its key; judged if the truth is known."""

    files: FileRows
    groups: Sequence[Group]
    top_k: int
    classes: dict[str, list[RankedClass]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)  # of the images that are classified

    def collect(self, classifier: Classifier, output: Output, path: Path | None, few: int | None) -> None:
        """Classify all images and write the answers (with ``few``, the first ones); after Ctrl-C, the finished ones."""
        try:
            with closing(classifier.scored(self.files, "images")) as batches:
                for rows, scores in batches:
                    self._add(rows, scores)
        except KeyboardInterrupt:
            kept = path.with_name(f"{path.name}.partial") if path else None
            write_classes(self.classes, output, kept)
            done = f"{len(self.classes)} of {len(self.files)} are in {kept or 'the output'}"
            raise KeyboardInterrupt(done) from None
        check_complete(len(self.classes), len(self.files), classifier.unreadable)
        write_classes(dict(islice(self.classes.items(), few)), output, path)
        if few is not None and len(self.classes) > few:
            stderr().print(
                f"the first {few} of {len(self.classes):,} images; --output table shows all", highlight=False
            )
        for group in self.groups:
            if summary := group.source.summary(group.none, len(self.classes)):
                stderr().print(f"{group.title}: {summary}" if group.title else summary, highlight=False)
        if path:
            keys = [file.key for file in self.files]
            report_skipped(keys, classifier.unreadable, path.with_name(f"{path.name}.skipped.txt"))
        for bad in () if path else classifier.unreadable:
            stderr().print(f"skipped: {bad.message}")

    def _add(self, rows: list[int], scores_of: Sequence[Scores]) -> None:
        self.rows += rows
        self.classes |= {self.files[row].key: [] for row in rows}
        for group, scores in zip(self.groups, scores_of, strict=True):
            none = scores.none.tolist()
            found = ranked(scores.probability, none, group.names, self.top_k, group.source.above, group.title)
            for row, best in zip(rows, found, strict=True):
                self.classes[self.files[row].key] += best
            group.judge.add(rows, scores.probability, none)
            group.none += sum(none)
            if group.source.keeps:
                group.kept.append(scores)


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
    names, text = _lines(words, "classes"), " ".join(words)
    if bracketed := bool(re.fullmatch(r"\[[^\[\]]*\]", text)):
        names = [" ".join(text[1:-1].split())]
    if bracketed or (len(names) == len(words) == 1 and "," in names[0]):
        names = [name.strip(" '\"") for name in names[0].split(",")]
    require(all(names), "--classes: a name is empty")
    for name in names:
        even = all(name.count(left) == name.count(right) for left, right in ("[]", "()"))
        one = even and not re.fullmatch(r"\[.*,.*\]", name)
        require(one, f"--classes: {name}: its brackets hold no list here; type all names as [a, b], or each as a word")
    counts = Counter(name.casefold() for name in names)
    duplicates = {name.casefold(): name for name in names if counts[name.casefold()] > 1}
    if duplicates:
        listed = ", ".join(map(repr, duplicates.values()))
        raise InputError(f"--classes: named more than once: {listed}; an image has one best class, name each once")
    return names
