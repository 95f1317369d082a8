"""``lit-clip export``: write a model for other tools, checked against the original before it appears."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Column, Table

from lit_clip.commands.class_sources import NAMES_ALONE, ClassOptions
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import claimed, replacing_folder
from lit_clip.tools.console import Console, progress
from lit_clip.tools.guarded_output import log_level
from lit_clip.tools.hashing import sha256_of_file
from lit_clip.tools.weight_files import is_path
from lit_clip.weights.export import ExportSample, Parity, check_onnx_packages, parity_of, write_onnx
from lit_clip.weights.formats import FORMATS, FormatName, OnnxDType, check_onnx_dtype, shrink_onnx, tolerance_of
from lit_clip.weights.load import load_model
from lit_clip.weights.publish import ExportedSource, find_repository, model_card, upload

TALKATIVE = ("", "torch.onnx", "onnxscript", "transformers")  # loggers of what only these libraries can act on


def export(
    model: str,
    *,
    format: FormatName,
    output: str,
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
    dtype: OnnxDType = "float32",
    head: ClassOptions = NAMES_ALONE,
) -> None:
    """Write a model in another tool's format, and check that it computes the same there.

    The folder appears only when everything in it has been written, opened with the other tool and compared; it is
    uploaded after that.

    Args:
        model: a checkpoint, a folder or a name: anything that lit_clip.load_model opens.
        format: open_clip and hugging_face (also for sentence-transformers): float32 weights with their configuration;
            onnx: one file per encoder; immich: for Immich.
        output: a folder that does not exist yet, or is empty.
        license: of the weights, for the model card; by default unknown.
        push: a repository on the Hugging Face hub, org/name, to upload the folder to; made if it does not exist.
        private: a repository that push makes is private.
        dtype: of the weights in onnx files; float16 halves and int8 quarters transformers, and features change by that.
        head: a file of classify --save_head, of this model: the image encoder in onnx also gives its probabilities.
    """
    folder = Path(output)
    check_onnx_dtype(dtype, format)
    require(not head.path or format == "onnx", f"--head {head.path}: only onnx files hold a head; give --format onnx")
    classes = head.opened()
    if format in ("onnx", "immich"):
        check_onnx_packages()
    require(not folder.exists() or folder.is_dir(), f"{folder}: is a file; name a folder")
    require(not folder.exists() or not any(folder.iterdir()), f"{folder}: the folder is not empty; name another")
    require(push is not None or not private, "--private: belongs to --push org/name")
    repository = find_repository(push, private) if push is not None else None
    console = Console(soft_wrap=True)
    with claimed(folder), progress(f"export to {format}", 4) as advance:
        original = load_model(model)
        source = source_of(model)
        if classes:
            classes.check(original, f"--head {head.path}")
        advance(1)
        with (
            replacing_folder(folder) as draft,
            log_level(logging.ERROR, *TALKATIVE),
            warnings.catch_warnings(action="ignore"),
        ):
            parity = write_checked(original, format, draft, advance, dtype, classes)
            card = model_card(original, format, folder.name, source, parity, license, push, dtype)
            (draft / "README.md").write_text(card, encoding="utf-8")
            if repository:
                repository.check([path.relative_to(draft).as_posix() for path in _files(draft)], card)
            advance(1)
    console.print(_table(folder, format, parity, dtype))
    console.print(f"written and checked: {folder}")
    for note in _left_out(original, format):
        console.print(note)
    if repository:
        console.print(f"uploaded: {upload(folder, repository)}")


def _left_out(model: CLIP, format: FormatName) -> Iterator[str]:
    if (window := model.preprocessing.window) is not None:
        reopened = format in ("open_clip", "hugging_face")
        reads = "; lit-clip reads the window from the folder" if reopened else ""
        yield f"{format} has no window of grey levels: scale them by {json.dumps(window)} to 8 bits before{reads}"
    if format != "open_clip":
        return
    encoder, crop_pct = getattr(model.config.text, "hugging_face", ""), model.preprocessing.crop_pct
    if encoder and is_path(encoder):
        opens = f"open_clip opens it only where {encoder} is, with the text encoder's settings"
        yield f"{opens}; lit-clip needs the folder alone"
    if crop_pct != 1:
        changed = "until its transform is changed as README.md shows; lit-clip reads it"
        yield f"open_clip leaves out crop_pct, which is {crop_pct} here, {changed}"


def write_checked(
    original: CLIP,
    format: FormatName,
    draft: Path,
    advance: Callable[[int], object],
    dtype: OnnxDType = "float32",
    head: Any = None,
) -> Parity:
    """Write the model into a folder, open it with the other tool, and compare the results."""
    target = FORMATS[format]
    if head is None:
        target.write(original, draft)
    else:
        write_onnx(original, draft, head)
    for file in sorted(draft.glob("*.onnx")):
        shrink_onnx(file, dtype)
    advance(1)
    instead = "" if format == "onnx" else "; use onnx"
    sample = ExportSample.of(original)
    try:
        reading = target.read(draft, sample)
    except InputError:
        raise
    except Exception as error:  # another library may raise anything for a file it cannot use
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{format} cannot open this model ({type(error).__name__}: {reason}){instead}") from error
    advance(1)
    parity, tolerance = parity_of(original, sample, reading, head), tolerance_of(format, dtype)
    head_differs, levels, more = parity.head or 0.0, parity.pixels or 0.0, f"more than {tolerance:.0e}"
    smaller = dtype != "float32"  # a head's probabilities follow the features, as far as those go
    checks = {
        f"image features differ by {parity.image:.1e} from the original's, {more}": parity.image <= tolerance,
        f"text features differ by {parity.text:.1e} from the original's, {more}": parity.text <= tolerance,
        f"the head's probabilities differ by {head_differs:.1e}, {more}": smaller or head_differs <= tolerance,
        "its tokenizer gives other token ids than the model's": parity.tokens is not False,
        f"its preprocessing differs from the model's by {levels:.1f} of 255 levels": levels <= 1.001,
    }
    for problem, holds in checks.items():
        require(holds, f"{format}: {problem}; nothing was written{instead}")
    return parity


def source_of(model: str) -> ExportedSource:
    """Return the given name, and the SHA-256 of the file, or of the largest file in a folder."""
    path = Path(model)
    if not path.exists():
        architecture, _, file = model.partition(":")
        if not file or not is_path(file):
            return ExportedSource(model, None)
        name, sha256 = source_of(str(Path(file).expanduser()))
        return ExportedSource(f"{architecture}:{name}", sha256)
    inside = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    weights = max(inside, key=lambda file: file.stat().st_size)
    name = weights.name if path.is_file() else f"{path.resolve().name}/{weights.name}"
    return ExportedSource(name, sha256_of_file(weights))


def _table(folder: Path, format: str, parity: Parity, dtype: OnnxDType) -> Table:
    columns = (Column(name, justify="right") for name in ("difference", "tolerance"))
    table = Table("", *columns, title=f"{format} in {dtype}: largest difference from the original")
    tolerance = tolerance_of(format, dtype)
    table.add_row("image features (unit length)", f"{parity.image:.1e}", f"{tolerance:.0e}")
    table.add_row("text features (unit length)", f"{parity.text:.1e}", f"{tolerance:.0e}")
    if parity.head is not None:
        table.add_row("probabilities of the head", f"{parity.head:.1e}", f"{tolerance:.0e}")
    if parity.pixels is not None:
        table.add_row("preprocessed pixels (of 255)", f"{parity.pixels:.2f}", "1")
    if parity.tokens is not None:
        table.add_row("token ids", "none", "none")
    table.caption = ", ".join(f"{path.relative_to(folder)} {decimal(path.stat().st_size)}" for path in _files(folder))
    return table


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
