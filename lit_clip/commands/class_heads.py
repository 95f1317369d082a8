"""Heads for ``lit-clip classify``: fit them on examples or read them, and suggest images to label next."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from lit_clip.commands.class_examples import ExampleFiles, read_examples
from lit_clip.commands.class_output import percent
from lit_clip.commands.class_sources import ClassOptions, ClassSource, Scores, prompt_weights
from lit_clip.commands.search import TEMPLATE, THUMBNAIL, small_image
from lit_clip.embedding.encoding_task import Encoding, EncodingSettings
from lit_clip.embedding.image_files import ImageFile
from lit_clip.embedding.index import EXAMPLES, update_index
from lit_clip.errors import listed, require
from lit_clip.evaluation.class_head import FOLDS, MOST_FITS
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.thresholds import FIXED, NONE, ClassThreshold, macro
from lit_clip.heads.curve import accuracy_by_examples
from lit_clip.heads.examples import TEMPLATES, Examples, FittedHead, fit_on
from lit_clip.heads.head import Head
from lit_clip.heads.head_file import load_head, save_head
from lit_clip.heads.labelling import label_next
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import Text, progress, stderr
from lit_clip.tools.html import thumbnail, write_page
from lit_clip.tools.images import OnError
from lit_clip.tools.text_files import no_formula

LABEL_NEXT = Path("label_next.csv")
SHOWN = 40  # classes whose thresholds are printed
Summary = list[str | Table]


@dataclass(frozen=True)
class Learning(ClassOptions):
    """A head to fit on examples, or a fitted head from a file.

    Args:
        examples: images with known classes, on which a head is fitted: a folder of class folders, whose images in no
            class's folder show none of the classes; or a table (.csv, .tsv) with the columns image and classes, several
            with ; between them. Features are kept in .lit-clip-examples.npz beside them.
        none_error: share of new images of the classes that may be called none of these.
        save_head: write the head to this .safetensors file.
        head: a file of save_head, of the same model; its classes are used.
        label_next: of the images, list this many that are best labelled next, in label_next.csv, which may become a
            table of examples, and label_next.html.
    """

    examples: str | None = None
    none_error: float = 0.05
    save_head: str | None = None
    head: str | None = None
    label_next: int | None = None

    def check(self, classes: Sequence[str] | None) -> None:
        """Raise :class:`InputError` for options that contradict each other, before the model is loaded."""
        require(0 < self.none_error < 1, f"--none_error {self.none_error}: must be above 0 and below 1")
        require(not (self.head and self.examples), "--head: was fitted already; leave out --examples, or fit anew")
        require(not (self.head and classes), "--classes: a head has its own; leave them out")
        for option in ("none_error", "save_head", "label_next"):
            given = getattr(self, option) != getattr(Learning, option)
            require(self.examples is not None or not given, f"--{option}: needs --examples")
        require(self.label_next is None or self.label_next >= 1, f"--label_next {self.label_next}: must be at least 1")
        path = Path(self.save_head or "head.safetensors")
        require(path.suffix == ".safetensors", f"--save_head {path}: must be a .safetensors file")
        require(path.absolute().parent.is_dir(), f"--save_head {path}: there is no such folder")

    def source(
        self, classes: Sequence[str] | None, prompts: Sequence[str], on_error: OnError, group: str = ""
    ) -> ClassSource:
        """Return the classes of the head, or of the examples."""
        if self.head:
            return _OfFile(self.head, prompts)
        if not self.examples:
            return ClassSource()
        if not group:
            return _OfExamples(self, read_examples(self.examples, classes, on_error))
        require(self.label_next is None, "--label_next: lists images for one head; name the classes of one group")
        path = Path(self.save_head).with_stem(f"{Path(self.save_head).stem}_{group}") if self.save_head else None
        own = replace(self, save_head=str(path) if path else None)
        return _OfExamples(own, read_examples(self.examples, classes, on_error, group), group)


class _OfFile(ClassSource):
    """The classes of a head from a file."""

    head: Head
    both_kinds = True

    def __init__(self, path: str, prompts: Sequence[str]) -> None:
        self.path, self.head = path, load_head(path)
        self.names = self.head.facts.names
        own = list(prompts) in (list(TEMPLATES), self.head.facts.templates)
        require(own, f"--templates: {path} was fitted with its own; leave them out")

    def begin(self, model: CLIP, names: Sequence[str], prompts: Sequence[str], encoding: Encoding) -> None:
        self.head.check(model, f"--head {self.path}")

    def scores(self, before: Tensor, after: Tensor) -> Scores:
        head = self.head.to(after.device)
        self.above = head.thresholds.cpu() if head.facts.several else None
        logits = head(before, after)
        return Scores(head.probabilities(logits), head.none_of(logits), after)

    def summary(self, none: int, count: int) -> str:
        if self.head.facts.several or self.head.facts.none is not None:
            return f"{NONE}: {none:,} of {count:,} images"
        return f"{NONE}: not said; the head was fitted on too few examples for it"


class _OfExamples(_OfFile):
    """The classes of examples, with a head fitted on them."""

    def __init__(self, options: Learning, examples: ExampleFiles, group: str = "") -> None:
        self.options, self.examples, self.names = options, examples, examples.names
        self.group = group
        self.keeps = options.label_next is not None
        self.saved = [Path(options.save_head)] if options.save_head else []
        self.listed = [LABEL_NEXT, LABEL_NEXT.with_suffix(".html")] if self.keeps else []

    def begin(self, model: CLIP, names: Sequence[str], prompts: Sequence[str], encoding: Encoding) -> None:
        """Fit the head, and save it."""
        text, settings = prompt_weights(model, names, prompts, encoding), EncodingSettings(**vars(encoding))
        self.learned = learn(model, self.examples, prompts, text, self.options.none_error, settings)
        self.head = self.learned.head
        for path in self.saved:
            save_head(self.head, path)

    def report(self, files: Sequence[ImageFile], kept: Sequence[Scores]) -> None:
        """Print the head's errors on its examples, its file, and the images to label next."""
        if self.group:
            stderr().print(f"{self.group}:", highlight=False)
        for each in self.learned.summary:
            stderr().print(each, highlight=False, soft_wrap=isinstance(each, str))
        for path in self.saved:
            stderr().print(f"head: {path}")
        if self.options.label_next is not None:
            probability, _, after = (torch.cat(parts) for parts in zip(*kept, strict=True))
            write_label_next(self.options.label_next, files, probability, after, self.learned)


class Learned(NamedTuple):
    """A head, the unit features ``[N, D]`` of its examples, and a summary of its errors on them."""

    head: Head
    labelled: Tensor
    summary: Summary


def learn(
    model: CLIP,
    examples: ExampleFiles,
    templates: Sequence[str],
    text: Tensor,
    none_error: float,
    settings: EncodingSettings,
) -> Learned:
    """Fit a head on examples; ``text`` has the unit features ``[D, C]`` of the names."""
    found = _features(model, examples, settings)
    shown = found if found.labels.ndim == 2 else found.take((found.labels >= 0).nonzero()[:, 0])
    with progress("head", MOST_FITS) as advance:
        fitted = fit_on(model, examples.names, templates, text, shown, none_error, advance)
    if fitted.thresholds:
        summary = _of_several(fitted.thresholds, examples.names, len(shown.labels))
    else:
        zero_shot = float(model.logit_scale.detach().exp()) * (shown.after @ text.cpu())
        others = found.take((found.labels < 0).nonzero()[:, 0])
        summary = [
            *_of_one(fitted, zero_shot, shown.labels, examples.names),
            *_of_none(fitted, others),
            *_curve(fitted, shown, zero_shot),
        ]
    return Learned(fitted.head, shown.after, summary)


def _features(model: CLIP, examples: ExampleFiles, settings: EncodingSettings) -> Examples:
    """Return the features of the readable examples; encode examples that the index beside them lacks."""
    table = update_index(model, examples.files, examples.place / EXAMPLES, settings, both_kinds=True)
    rows = {file.identity: row for row, file in enumerate(examples.files)}
    labels = examples.labels[[rows[identity] for identity in table.identities]]
    require(labels.ndim == 2 or bool((labels >= 0).any()), "--examples: none of the classes' images could be read")
    return Examples.of(torch.from_numpy(np.array(table.features)), model.config.embed_dim, labels)


def _of_one(fitted: FittedHead, zero_shot: Tensor, labels: Tensor, names: Sequence[str]) -> Summary:
    """Summarise a one-class-per-image head on held-out examples, beside zero-shot."""
    counts = labels.bincount(minlength=len(names))
    by_name = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    seen = fitted.fit.held_out.isfinite().all(dim=1)
    line = f"head of {len(names)} classes, fitted on {len(labels):,} examples"
    if bool(seen.any()):
        right = [
            UnitScores((logits[seen].argmax(dim=1) == labels[seen]).double().numpy()).mean()
            for logits in (fitted.fit.held_out, zero_shot)
        ]
        line += f": {percent(right[0])} right on held-out ones ({FOLDS} folds), zero-shot {percent(right[1])}"
    return [line, *([f"without an example, and so known by name alone: {listed(by_name)}"] if by_name else [])]


def _of_none(fitted: FittedHead, others: Examples) -> Summary:
    facts = fitted.head.facts
    if facts.none is None:
        return [f"{NONE}: not said; {fitted.none_left_out}"]
    summary: Summary = [
        f"{NONE}: a logit below {facts.none:.3f} of every class; fitted on held-out examples, so that on average "
        f"at most {percent(facts.none_error)} of new images of the classes are called so"
    ]
    if len(others.labels):
        rejected = UnitScores(fitted.head.none_of(fitted.head(others.before, others.after)).double().numpy())
        low, high = rejected.interval()
        summary.append(
            f"of {len(others.labels):,} examples of no class {percent(rejected.mean())} are called so (99.5 % interval "
            f"{percent(low)} to {percent(high)})"
        )
    return summary


def _curve(fitted: FittedHead, examples: Examples, zero_shot: Tensor) -> Summary:
    points = accuracy_by_examples(examples.before, zero_shot, examples.labels, fitted.fit)
    if not points:
        return []
    table = Table("examples a class", title="accuracy on held-out examples")
    for title in ("right", "99.5 % interval"):
        table.add_column(title, justify="right")
    for shots, accuracy, (low, high) in points:
        table.add_row(str(shots), percent(accuracy), f"{percent(low)} to {percent(high)}")
    return [table]


def _of_several(found: Sequence[ClassThreshold], names: Sequence[str], examples: int) -> Summary:
    means = macro(found)
    line = (
        f"head and thresholds of {len(names)} classes, fitted on {examples:,} examples: mean F1 "
        f"{percent(means['f1_held_out'])} on held-out examples ({FOLDS} folds), {percent(means['f1_fixed'])} with "
        f"{FIXED} for all"
    )
    table = Table("class")
    for title in ("examples", "threshold", f"F1 of {FIXED}", "F1 held out"):
        table.add_column(title, justify="right")
    for name, each in list(zip(names, found, strict=True))[:SHOWN]:
        numbers = (str(each.examples), f"{each.threshold:.3g}", percent(each.f1_fixed), percent(each.f1_held_out))
        table.add_row(Text(name), *numbers)
    by_name = [name for name, each in zip(names, found, strict=True) if not each.examples]
    return [line, table, *([f"without an example, and so known by name alone: {listed(by_name)}"] if by_name else [])]


def write_label_next(
    count: int, files: Sequence[ImageFile], probability: Tensor, after: Tensor, learned: Learned
) -> None:
    """Write which images to label next: a table of examples with the head's guesses, and a page."""
    facts, head = learned.head.facts, learned.head
    chosen = label_next(probability, after, learned.labelled, count, facts.several)
    lines: list[tuple[ImageFile, str, float]] = []
    for row in chosen:
        best = int(probability[row].argmax())
        given = [best]
        if facts.several:
            given = (probability[row] >= head.thresholds.cpu()).nonzero()[:, 0].tolist()
        lines.append((files[row], "; ".join(facts.names[place] for place in given), float(probability[row, best])))
    table, page = LABEL_NEXT, LABEL_NEXT.with_suffix(".html")
    with replacing(table) as draft, draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "classes", "probability"])
        writer.writerows([no_formula(each.key), no_formula(guess), f"{value:.6f}"] for each, guess, value in lines)
    shown: list[tuple[str, str, str]] = []
    for rank, (each, guess, value) in enumerate(lines, start=1):
        image = small_image(each.path, THUMBNAIL)
        source = "" if image is None else thumbnail(image, THUMBNAIL)
        shown.append((source, f"{rank}. {each.key}: {guess or 'none'}, {percent(value)}", ""))
    write_page(page, TEMPLATE, title="Label next", found={"Label next": shown})
    stderr().print(f"label next: {table}, with the head's guesses to correct; page with images: {page}")
