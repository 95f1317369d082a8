"""``lit-clip classify``: zero-shot classification of image files."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from rich.table import Table
from torch import Tensor

from lit_clip import load_model
from lit_clip.embedding.encode import check_complete, report_skipped
from lit_clip.embedding.image_files import FileRows, find_images
from lit_clip.embedding.precision import Precision, autocast, check_precision
from lit_clip.embedding.reading import UnreadableRow, check_finite, encoded_batches, image_features
from lit_clip.errors import InputError, require
from lit_clip.evaluation.zero_shot import check_templates, imagenet_templates, zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import Console, Text, from_totals, progress, stderr, write_results
from lit_clip.tools.hardware import best_device
from lit_clip.tools.images import OnError, or_skip
from lit_clip.tools.text_files import no_formula, read_text

Output = Literal["table", "csv", "json"]


class RankedClass(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


def classify(
    images: list[str],
    *,
    model: str,
    classes: list[str],
    templates: list[str] = ["a photo of a {}."],  # noqa: B006 # jsonargparse shows it in the help; nothing writes to it
    top_k: int = 5,
    output: Output = "table",
    output_file: str | None = None,
    batch_size: int = 64,
    num_workers: int = 4,
    precision: Precision = "32-true",
    on_error: OnError = "error",
) -> None:
    """Classify images zero-shot, from class names.

    The probabilities of an image's classes add up to 1, except with a SigLIP, which judges each class by itself.

    Args:
        images: files, and folders with everything below.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        classes: names; or a text file with one name per line.
        templates: prompt templates with {} for the name; or a text file with one per line; or imagenet, the paper's 80.
        top_k: number of classes shown for each image.
        output: format of the results. CSV has an apostrophe before names that a spreadsheet would compute, such as =1.
        output_file: write the results to this file instead of standard output.
        batch_size: images encoded at once.
        num_workers: processes that decode images.
        precision: of the encoders; 32-true is exact, bf16-mixed and on a GPU 16-mixed are faster.
        on_error: error ends the run at an image that cannot be read; skip reports it.
    """
    names = read_classes(classes)
    prompts = imagenet_templates() if templates == ["imagenet"] else _lines(templates, "templates")
    check_templates(prompts)
    require(top_k >= 1, f"--top_k {top_k} must be at least 1")
    path = Path(output_file) if output_file else None
    require(path is None or path.absolute().parent.is_dir(), f"--output_file {path}: there is no such folder")
    check_precision(precision)
    files = find_images(images, on_error)
    clip = load_model(model).to(best_device())
    if len(names) == 1 and clip.logit_bias is None:
        raise InputError(f"--classes {names[0]}: a single class gets 100 % of every image; name what else it may be")
    with autocast(clip.device, precision), progress("class prompts", len(names) * len(prompts)) as advance:
        classifier = zero_shot_classifier(clip, names, prompts, progress=from_totals(advance))
    check_finite(classifier, "--classes")
    encode = image_features(clip, precision)
    encoded = encoded_batches(clip, FileRows(files), batch_size, num_workers, encode=encode, title="images")
    classes_of: dict[str, list[RankedClass]] = {}  # by key
    unreadable: list[UnreadableRow] = []
    try:
        with closing(encoded) as batches:
            for batch, features in batches:
                for bad in batch.unreadable:
                    require(on_error == "skip", or_skip(bad.message, "--on_error skip"))
                unreadable += batch.unreadable
                if batch.rows:
                    check_finite(features, files[batch.rows[0]].key)
                    ranked = _ranked(class_probabilities(clip, features, classifier), names, top_k)
                    classes_of |= zip((files[row].key for row in batch.rows), ranked, strict=True)
    except KeyboardInterrupt:
        kept = path.with_name(f"{path.name}.partial") if path else None
        _write(classes_of, output, kept)
        raise KeyboardInterrupt(f"{len(classes_of)} of {len(files)} are in {kept or 'the output'}") from None
    check_complete(len(classes_of), len(files), unreadable)
    _write(classes_of, output, path)
    if path:
        report_skipped([file.key for file in files], unreadable, path.with_name(f"{path.name}.skipped.txt"))
    for bad in () if path else unreadable:
        stderr().print(f"skipped: {bad.message}")


def _lines(words: Sequence[str], option: str) -> list[str]:
    """Return the words, or the lines of a file if there is one word, its path."""
    path = Path(words[0]) if len(words) == 1 else None
    if path is None or not (os.path.isfile(path) or path.suffix == ".txt"):  # Path.is_file fails beyond 255 characters
        return [" ".join(word.split()) for word in words]
    text = read_text(path, f"--{option}")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    require(bool(lines), f"--{option} {path}: the file is empty; write one per line")
    return lines


def read_classes(words: Sequence[str]) -> list[str]:
    """Return class names as typed, from a file with one name per line, or from one word that lists them with commas."""
    names = _lines(words, "classes")
    if len(names) == len(words) == 1 and "," in names[0]:
        names = [name.strip() for name in names[0].split(",")]
    require(all(names), "--classes: a name is empty")
    counts = Counter(name.casefold() for name in names)
    duplicates = {name.casefold(): name for name in names if counts[name.casefold()] > 1}
    if duplicates:
        listed = ", ".join(map(repr, duplicates.values()))
        raise InputError(f"--classes: named more than once: {listed}; an image has one best class, name each once")
    return names


def _ranked(probabilities: Tensor, names: Sequence[str], top_k: int) -> Iterator[list[RankedClass]]:
    """Yield for each row of ``[B, C]`` the most probable classes, best first."""
    best = probabilities.topk(min(top_k, len(names)), dim=1)
    for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield [RankedClass(str(names[i]), value) for value, i in zip(values, indices, strict=True)]


def class_probabilities(model: CLIP, features: Tensor, classifier: Tensor) -> Tensor:
    """Return the probabilities ``[B, C]`` from unit features ``[B, D]`` and a classifier ``[D, C]``.

    Softmax over the classes, as in the paper; with a ``logit_bias`` (SigLIP) a sigmoid for each class.
    """
    logits = model.logit_scale.exp() * (features @ classifier)
    return logits.softmax(dim=1) if model.logit_bias is None else (logits + model.logit_bias).sigmoid()


def _write(classes_of: dict[str, list[RankedClass]], output: Output, path: Path | None) -> None:
    text = io.StringIO()
    if output == "table":
        (Console() if path is None else Console(file=text, width=200)).print(_table(classes_of))
    else:
        text.write((_as_csv if output == "csv" else _as_json)(classes_of))
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape", newline="")
    elif output != "table":
        write_results(text.getvalue())


def _table(classes_of: dict[str, list[RankedClass]]) -> Table:
    table = Table("image", "class")
    table.add_column("probability", justify="right")
    for key, best in classes_of.items():
        for i, prediction in enumerate(best):
            image = Text(key if i == 0 else "", overflow="fold")
            table.add_row(image, Text(prediction.name), f"{100 * prediction.probability:.1f} %")
    return table


def _as_csv(classes_of: dict[str, list[RankedClass]]) -> str:
    text = io.StringIO()
    names = (*classes_of, *(name for best in classes_of.values() for name, _ in best))
    bare = any("\r" in name for name in names)  # which the writer quotes only where it ends lines
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL)
    writer.writerow(["image", "rank", "class", "probability"])
    for key, best in classes_of.items():
        writer.writerows(
            [no_formula(key), rank, no_formula(name), f"{value:.6f}"]
            for rank, (name, value) in enumerate(best, start=1)
        )
    return text.getvalue()


def _as_json(classes_of: dict[str, list[RankedClass]]) -> str:
    rows = [
        {"image": key, "classes": [{"class": name, "probability": round(value, 6)} for name, value in best]}
        for key, best in classes_of.items()
    ]
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        text = json.dumps(rows, indent=1)  # a file name that is not Unicode has to be escaped in JSON
    return text + "\n"
