"""``lit-clip classify``: classify image files, zero-shot or with a head from examples."""

import os
import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from lit_clip import load_model
from lit_clip.commands.class_examples import ExampleFiles, read_examples
from lit_clip.commands.class_heads import LABEL_NEXT, Learned, Learning, learn, write_label_next
from lit_clip.commands.class_output import NONE, Output, RankedClass, ranked, write_classes
from lit_clip.commands.class_truth import NO_TRUTH, Judge, folder_names, folder_truth
from lit_clip.embedding.encoding_task import Encoding, EncodingSettings, check_complete, report_skipped
from lit_clip.embedding.image_files import FileRows, find_images
from lit_clip.embedding.precision import autocast, check_precision
from lit_clip.embedding.reading import (
    UnreadableRow,
    check_finite,
    encoded_batches,
    features_of_both_kinds,
    image_features,
)
from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_metrics import metrics_typed
from lit_clip.evaluation.zero_shot import check_templates, imagenet_templates, zero_shot_classifier
from lit_clip.heads import Head, load_head, save_head
from lit_clip.heads.examples import TEMPLATES
from lit_clip.models.clip import CLIP
from lit_clip.tools.claims import claimed
from lit_clip.tools.console import from_totals, progress, stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.images import or_skip
from lit_clip.tools.text_files import read_text


class Scored(NamedTuple):
    """Places of B files, the classes' probabilities ``[B, C]``, which show none, and unit features ``[B, D]``."""

    rows: list[int]
    probability: Tensor
    none: Tensor
    after: Tensor


@dataclass(frozen=True)
class Known:
    """What is done with images whose classes are known.

    Args:
        metrics: for images in class folders, further metrics as NAME=CLASS_PATH, of torchmetrics or of your own, such
            as auroc=torchmetrics.classification.MulticlassAUROC.
        sheet: for images in class folders, an HTML page with accuracy, confusions and the wrong images, which replaces
            an earlier one.
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    metrics: list[str] | None = None
    sheet: str = "classify.html"


ENCODING, KNOWN, LEARNING = Encoding(), Known(), Learning()
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
    learning: Learning = LEARNING,
    encoding: Encoding = ENCODING,
) -> None:
    """Classify images zero-shot, from class names, or with a head from examples.

    The probabilities of an image's classes add up to 1, except with a SigLIP, which judges each class by itself, and
    where examples have several classes.

    Args:
        images: files, and folders with everything below.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        classes: names; or a text file with one name per line; if not given, those of the head or of the examples, or
            the names of the folder's subfolders.
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
    given, typed = metrics_typed(known.metrics or []), read_classes(classes) if classes else None
    prompts = imagenet_templates() if templates == ["imagenet"] else _lines(templates, "templates")
    check_templates(prompts)
    files = FileRows(find_images(images, encoding.on_error))
    head = load_head(learning.head) if learning.head else None
    own = head is None or tuple(templates) == TEMPLATES or prompts == head.facts.templates
    require(own, f"--templates: {learning.head} was fitted with its own; leave them out")
    examples = read_examples(learning.examples, typed, encoding.on_error) if learning.examples else None
    names = head.facts.names if head else examples.names if examples else typed or folder_names(images, files)
    folders = [path for path in map(Path, images) if path.is_dir()]
    judge = Judge(files, names, folder_truth(files, names, folders), given)
    require(judge.known or known.sheet == Known.sheet, f"--sheet: {NO_TRUTH}")
    sheet, saved = Path(known.sheet) if judge.known else None, _place(learning.save_head, "--save_head")
    listed = [LABEL_NEXT, LABEL_NEXT.with_suffix(".html")] if learning.label_next else []
    with claimed(target, sheet, saved, option="file"), claimed(*listed, option=""):
        clip = load_model(model).to(best_device())
        classifier, learned = _classifier(clip, head, examples, names, prompts, learning, encoding)
        answers = Answers(files, names, classifier.head, top_k, judge, keep=learning.label_next is not None)
        few = FEW if output is None and target is None and judge.known else None
        by_name: Output = next((kind for kind in get_args(Output) if target and target.suffix == f".{kind}"), "table")
        answers.collect(classifier, output or by_name, target, few)
        if learned:
            _report(learned, learning, answers)
        judge.finish(Path(known.sheet))


def _classifier(
    model: CLIP,
    head: Head | None,
    examples: ExampleFiles | None,
    names: Sequence[str],
    prompts: Sequence[str],
    learning: Learning,
    encoding: Encoding,
) -> tuple["Classifier", Learned | None]:
    """Return what classifies: a head, one that is fitted on examples and saved, or the names alone."""
    if head:
        head.check(model, f"--head {learning.head}")
        return Classifier(model, None, encoding, head), None
    by_name = Classifier.of(model, names, prompts, encoding)
    if examples is None or by_name.weights is None:
        return by_name, None
    learned = learn(model, examples, prompts, by_name.weights, learning.none_error, EncodingSettings(**vars(encoding)))
    if learning.save_head:
        save_head(learned.head, learning.save_head)
    return Classifier(model, None, encoding, learned.head), learned


def _report(learned: Learned, learning: Learning, answers: "Answers") -> None:
    """Say what a head costs on its examples, where it is, and which images to label next."""
    learned.print_summary()
    if learning.save_head:
        stderr().print(f"head: {learning.save_head}")
    if learning.label_next is not None:
        files = [answers.files[row] for row in answers.rows]
        probability, after = (torch.cat(parts) for parts in zip(*answers.kept, strict=True))
        write_label_next(learning.label_next, files, probability, after, learned)


def _place(name: str | None, option: str, suffix: str = "") -> Path | None:
    path = Path(name) if name else None
    require(path is None or path.suffix == suffix or not suffix, f"{option} {path}: must be a {suffix} file")
    require(path is None or path.absolute().parent.is_dir(), f"{option} {path}: there is no such folder")
    return path


@dataclass
class Classifier:
    """Encodes images and compares them with classes; remembers the images that cannot be read."""

    model: CLIP
    weights: Tensor | None  # [D, C]
    encoding: Encoding
    head: Head | None = None  # in place of the weights
    unreadable: list[UnreadableRow] = field(default_factory=list)

    @classmethod
    def of(cls, model: CLIP, names: Sequence[str], prompts: Sequence[str], encoding: Encoding) -> "Classifier":
        """Encode the prompts of the classes."""
        if len(names) == 1 and model.logit_bias is None:
            raise InputError(
                f"--classes {names[0]}: a single class gets 100 % of every image; name what else it may be"
            )
        with (
            autocast(model.device, encoding.precision),
            progress("class prompts", len(names) * len(prompts)) as advance,
        ):
            weights = zero_shot_classifier(model, names, prompts, progress=from_totals(advance))
        check_finite(weights, "--classes")
        return cls(model, weights, encoding)

    def scored(self, files: FileRows, title: str) -> Generator[Scored, None, None]:
        """Yield the scores of one batch of files after the other, without those that are skipped."""
        self.unreadable, settings = [], self.encoding
        encode = (features_of_both_kinds if self.head else image_features)(self.model, settings.precision)
        batch_size, workers = settings.batch_size, settings.num_workers
        with closing(encoded_batches(self.model, files, batch_size, workers, encode=encode, title=title)) as batches:
            for batch, features in batches:
                for bad in batch.unreadable:
                    require(settings.on_error == "skip", or_skip(bad.message, "--on_error skip"))
                self.unreadable += batch.unreadable
                if batch.rows:
                    check_finite(features, files[batch.rows[0]].key)
                    yield Scored(batch.rows, *(each.detach().cpu() for each in self._scores(features)))

    def _scores(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities ``[B, C]``, which images show none of the classes, and unit features ``[B, D]``."""
        if self.head is None:
            assert self.weights is not None
            none = torch.zeros(len(features), dtype=torch.bool)
            return class_probabilities(self.model, features, self.weights), none, features
        head, (before, after) = self.head.to(features.device), _kinds(self.model, features)
        logits = head(before, after)
        return head.probabilities(logits), head.none_of(logits), after


@dataclass
class Answers:
    """The classes of each image, by its key; judged where the truth is known."""

    files: FileRows
    names: Sequence[str]
    head: Head | None
    top_k: int
    judge: Judge
    keep: bool  # whether probabilities and features are kept
    classes: dict[str, list[RankedClass]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)  # of the images that are classified
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    none: int = 0  # number of images that show none of the classes

    def collect(self, classifier: Classifier, output: Output, path: Path | None, few: int | None) -> None:
        """Classify all images and write the answers, or those of the first ``few``; after Ctrl-C what is done, too."""
        above = self.head.thresholds.cpu() if self.head and self.head.facts.several else None
        try:
            with closing(classifier.scored(self.files, "images")) as batches:
                for scored in batches:
                    keys, none = (self.files[row].key for row in scored.rows), scored.none.tolist()
                    found = ranked(scored.probability, none, self.names, self.top_k, above)
                    self.classes |= zip(keys, found, strict=True)
                    self.judge.add(scored.rows, scored.probability, none)
                    self.rows, self.none = self.rows + scored.rows, self.none + sum(none)
                    self.kept += [(scored.probability, scored.after)] * self.keep
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
        if self.head and (self.head.facts.several or self.head.facts.none is not None):
            stderr().print(f"{NONE}: {self.none:,} of {len(self.classes):,} images", highlight=False)
        elif self.head:
            stderr().print(f"{NONE}: not said; the head was fitted on too few examples for it", highlight=False)
        if path:
            keys = [file.key for file in self.files]
            report_skipped(keys, classifier.unreadable, path.with_name(f"{path.name}.skipped.txt"))
        for bad in () if path else classifier.unreadable:
            stderr().print(f"skipped: {bad.message}")


def _kinds(model: CLIP, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return features before the projection and after it, from :func:`features_of_both_kinds`."""
    return features[:, : -model.config.embed_dim], features[:, -model.config.embed_dim :]


def _lines(words: Sequence[str], option: str) -> list[str]:
    """Return the words, or the lines of a file if there is one word, its path."""
    path = Path(words[0]) if len(words) == 1 else None
    if path is None or not (os.path.isfile(path) or path.suffix == ".txt"):  # Path.is_file fails beyond 255 characters
        return [" ".join(word.split()) for word in words]
    require(path.suffix not in NO_LINES, f"--{option} {path}: write a text file, {path.stem}.txt, with one per line")
    text = read_text(path, f"--{option}")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    require(bool(lines), f"--{option} {path}: the file is empty; write one per line")
    return lines


def read_classes(words: Sequence[str]) -> list[str]:
    """Return class names as typed, from a file with one name per line, or from a list with commas, as YAML's."""
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


def class_probabilities(model: CLIP, features: Tensor, classifier: Tensor) -> Tensor:
    """Return the probabilities ``[B, C]`` from unit features ``[B, D]`` and a classifier ``[D, C]``.

    Softmax over the classes, as in the paper; with a ``logit_bias`` (SigLIP) a sigmoid for each class.
    """
    logits = model.logit_scale.exp() * (features @ classifier)
    return logits.softmax(dim=1) if model.logit_bias is None else (logits + model.logit_bias).sigmoid()
