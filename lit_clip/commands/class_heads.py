"""Heads for ``lit-clip classify``: fit them on examples or read them, and suggest images to label next."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Column, Table
from torch import Tensor

from lit_clip.commands.class_examples import ExampleFiles, read_examples
from lit_clip.commands.class_output import percent
from lit_clip.commands.class_sources import ClassOptions, ClassSource, Scores, prompt_weights
from lit_clip.commands.search import TEMPLATE, THUMBNAIL, small_thumbnail
from lit_clip.embedding.encode import Encoding
from lit_clip.embedding.feature_files import check_output
from lit_clip.embedding.image_files import ImageFile
from lit_clip.embedding.index import EXAMPLES, update_index
from lit_clip.errors import listed, require
from lit_clip.evaluation.class_head import FOLDS, MOST_FITS
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.thresholds import FIXED, NONE, macro
from lit_clip.heads.examples import TEMPLATES, Examples, FittedHead, accuracy_by_examples, fit_on, label_next
from lit_clip.heads.head import Head, load_head, save_head
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.html import write_page
from lit_clip.tools.images import OnError
from lit_clip.tools.reading import no_formula

LABEL_NEXT = Path("label_next.csv")


@dataclass(frozen=True)
class HeadFile(ClassOptions):
    """A head from a file, for ``evaluate``, ``export`` and ``demo``.

    Args:
        head: a file that classify --save_head wrote with this model; its classes are used too.
    """

    head: str | None = None

    @property
    def path(self) -> str:
        return self.head or ""

    def opened(self) -> Head | None:
        return load_head(self.path) if self.head is not None else None


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

    def source(
        self, classes: Sequence[str] | None, prompts: Sequence[str], on_error: OnError, group: str = ""
    ) -> ClassSource:
        """Return the classes of the head, or of the examples."""
        require(0 < self.none_error < 1, f"--none_error {self.none_error}: must be above 0 and below 1")
        require(not (self.head and self.examples), "--head: was fitted already; leave out --examples, or fit anew")
        require(not (self.head and classes), "--classes: a head has its own; leave them out")
        for option in ("none_error", "save_head", "label_next"):
            given = getattr(self, option) != getattr(Learning, option)
            require(self.examples is not None or not given, f"--{option}: needs --examples")
        require(self.label_next is None or self.label_next >= 1, f"--label_next {self.label_next}: must be at least 1")
        if self.head:
            return _OfFile(self.head, prompts)
        if not self.examples:
            return ClassSource()
        path = Path(self.save_head) if self.save_head else None
        if path:
            check_output(path, [".safetensors"], "--save_head")
        if not group:
            return _OfExamples(self, path, read_examples(self.examples, classes, on_error))
        require(self.label_next is None, "--label_next: lists images for one head; name the classes of one group")
        path = path and path.with_stem(f"{path.stem}_{group}")
        return _OfExamples(self, path, read_examples(self.examples, classes, on_error, group), group)


class _OfFile(ClassSource):
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
        return Scores(head.probabilities(logits), head.none_of(logits))

    def summary(self, none: int, count: int) -> str:
        if self.head.facts.several or self.head.facts.none is not None:
            return f"{NONE}: {none:,} of {count:,} images"
        return f"{NONE}: not said; the head was fitted on too few examples for it"


class _OfExamples(_OfFile):
    def __init__(self, options: Learning, path: Path | None, examples: ExampleFiles, group: str = "") -> None:
        self.options, self.examples, self.group, self.names = options, examples, group, examples.names
        self.saved = [path] if path else []
        self.listed = [LABEL_NEXT, LABEL_NEXT.with_suffix(".html")] if options.label_next is not None else []
        self.kept: list[tuple[Tensor, Tensor]] = []  # probabilities and unit features of all images

    def begin(self, model: CLIP, names: Sequence[str], prompts: Sequence[str], encoding: Encoding) -> None:
        """Fit the head, and save it."""
        text = prompt_weights(model, names, prompts, encoding)
        found = _features(model, self.examples, encoding)
        shown = found if found.labels.ndim == 2 else found.take((found.labels >= 0).nonzero()[:, 0])
        with progress("head", MOST_FITS) as advance:
            fitted = fit_on(model, self.examples.names, prompts, text, shown, self.options.none_error, advance)
        zero_shot = float(model.logit_scale.detach().exp()) * (shown.after @ text.cpu())
        self.told = list(_summary(fitted, found, shown, zero_shot))
        self.head, self.labelled = fitted.head, shown.after
        for path in self.saved:
            save_head(self.head, path)

    def scores(self, before: Tensor, after: Tensor) -> Scores:
        found = super().scores(before, after)
        if self.listed:
            self.kept.append((found.probability.cpu(), after.cpu()))
        return found

    def report(self, files: Sequence[ImageFile]) -> None:
        """Print the head's errors on its examples, its file, and the images to label next."""
        if self.group:
            stderr().print(f"{self.group}:", highlight=False)
        for each in self.told:
            stderr().print(each, highlight=False, soft_wrap=isinstance(each, str))
        for path in self.saved:
            stderr().print(f"head: {path}")
        if self.options.label_next is not None:
            probability, after = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
            chosen = label_next(probability, after, self.labelled, self.options.label_next, self.head.facts.several)
            _write_label_next(self.head, [(files[row], probability[row]) for row in chosen])


def _features(model: CLIP, examples: ExampleFiles, settings: Encoding) -> Examples:
    table = update_index(model, examples.files, examples.place / EXAMPLES, settings, both_kinds=True)
    rows = {file.identity: row for row, file in enumerate(examples.files)}
    labels = examples.labels[[rows[identity] for identity in table.identities]]
    require(labels.ndim == 2 or bool((labels >= 0).any()), "--examples: none of the classes' images could be read")
    return Examples.of(torch.from_numpy(np.array(table.features)), model.config.embed_dim, labels)


def _summary(fitted: FittedHead, found: Examples, shown: Examples, zero_shot: Tensor) -> Iterator[str | Table]:
    """Yield what a head's fit says of it; ``shown`` are the examples of its classes."""
    names, total = fitted.head.facts.names, len(shown.labels)
    if fitted.thresholds:
        counts, means = [each.examples for each in fitted.thresholds], macro(fitted.thresholds)
        yield (
            f"head and thresholds of {len(names)} classes, fitted on {total:,} examples: mean F1 "
            f"{percent(means['f1_held_out'])} on held-out examples ({FOLDS} folds), {percent(means['f1_fixed'])} with "
            f"{FIXED} for all"
        )
    else:
        counts, seen = shown.labels.bincount(minlength=len(names)).tolist(), fitted.fit.held_out.isfinite().all(dim=1)
        line = f"head of {len(names)} classes, fitted on {total:,} examples"
        if bool(seen.any()):
            right = [
                percent(float((logits[seen].argmax(dim=1) == shown.labels[seen]).double().mean()))
                for logits in (fitted.fit.held_out, zero_shot)
            ]
            line += f": {right[0]} right on held-out ones ({FOLDS} folds), zero-shot {right[1]}"
        yield line
    if by_name := [name for name, count in zip(names, counts, strict=True) if not count]:
        yield f"without an example, and so known by name alone: {listed(by_name)}"
    if not fitted.thresholds:
        yield from _of_none(fitted, found.take((found.labels < 0).nonzero()[:, 0]))
        yield from _curve(fitted, shown, zero_shot)


def _of_none(fitted: FittedHead, others: Examples) -> Iterator[str]:
    facts = fitted.head.facts
    if facts.none is None:
        yield f"{NONE}: not said; {fitted.none_left_out}"
        return
    yield (
        f"{NONE}: a logit below {facts.none:.3f} of every class; fitted on held-out examples, so that on average "
        f"at most {percent(facts.none_error)} of new images of the classes are called so"
    )
    if len(others.labels):
        rejected = UnitScores(fitted.head.none_of(fitted.head(others.before, others.after)).double().numpy())
        low, high = rejected.interval()
        yield (
            f"of {len(others.labels):,} examples of no class {percent(rejected.mean())} are called so (99.5 % interval "
            f"{percent(low)} to {percent(high)})"
        )


def _curve(fitted: FittedHead, examples: Examples, zero_shot: Tensor) -> Iterator[Table]:
    columns = (Column(title, justify="right") for title in ("right", "99.5 % interval"))
    table = Table("examples a class", *columns, title="accuracy on held-out examples")
    for shots, accuracy, (low, high) in accuracy_by_examples(examples.before, zero_shot, examples.labels, fitted.fit):
        table.add_row(str(shots), percent(accuracy), f"{percent(low)} to {percent(high)}")
    if table.rows:
        yield table


def _write_label_next(head: Head, chosen: Sequence[tuple[ImageFile, Tensor]]) -> None:
    table, page, shown = LABEL_NEXT, LABEL_NEXT.with_suffix(".html"), list[tuple[str, str, str]]()
    with replacing(table) as draft, draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "classes", "probability"])
        for rank, (each, probability) in enumerate(chosen, start=1):
            above = (probability >= head.thresholds.cpu()).nonzero()[:, 0].tolist()
            places = above if head.facts.several else [int(probability.argmax())]
            guess, value = "; ".join(head.facts.names[place] for place in places), float(probability.max())
            writer.writerow([no_formula(each.key), no_formula(guess), f"{value:.6f}"])
            caption = f"{rank}. {each.key}: {guess or 'none'}, {percent(value)}"
            shown.append((small_thumbnail(each.path, THUMBNAIL), caption, ""))
    write_page(page, TEMPLATE, title="Label next", found={"Label next": shown})
    stderr().print(f"label next: {table}, with the head's guesses to correct; page with images: {page}")
