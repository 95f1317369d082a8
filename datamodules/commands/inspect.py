"""``lit-clip inspect``: report what training data contain, and what is wrong with them."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TextIO

import torch
from rich.table import Table

from lit_clip.errors import InputError, require
from lit_clip.models.registry import list_models, resolve_architecture
from lit_clip.models.tokenizer import CLIPTokenizer, TextTokenizer
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import Console, Text, stderr
from ..inspection.page import write_inspection
from ..inspection.scan import ScanFindings, inspect_source
from ..inspection.summary import SummarySection, find_duplicates, summarize
from ..open_source import open_source
from ..pairs.source import Columns, SkippedRows

PAPERS_CONTEXT = 77
SHOWN = 5  # problems that the terminal shows; the page and the list beside it have more


def inspect(
    data: list[str],
    *,
    output: str = "inspect.html",
    model: str | None = None,
    context_length: int | None = None,
    columns: Columns = Columns(),  # noqa: B008  # immutable
    split: str | None = None,
    num_workers: int = 4,
) -> None:
    """Read data once and report sizes, formats, bad rows, duplicates and long captions.

    Every image is decoded. All rows that cannot be used are listed in a .problems.jsonl beside the page.

    Args:
        data: a table, a folder of images with captions beside them, tar shards or anything else that training takes.
        output: an HTML page with figures, sample images and problems, in one file.
        model: a checkpoint, or a name that lit_clip.create_model or lit_clip.load_model accepts; its tokenizer
            measures the captions. By default CLIP's.
        context_length: tokens that a model reads of a caption; by default the model's, or 77.
        columns: of a table.
        split: of data that come in splits.
        num_workers: number of data workers.
    """
    require(bool(data), "no data: name a table, a folder or shards before the options")
    page = Path(output)
    require(page.suffix == ".html", f"--output {output}: must be a .html file")
    require(page.absolute().parent.is_dir(), f"--output {output}: there is no such folder")
    tokenizer = _tokenizer(model, context_length)
    source = open_source(data, columns=columns, split=split, option_prefix="--", on_error="skip")
    source.prepare()
    require(len(source) > 0, f"{', '.join(data)}: has no pairs")
    problem_list = page.with_suffix(".problems.jsonl")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as problems:
        for where, reason in source.left_out.listed:
            problems.write(json.dumps({"where": where, "reason": reason}) + "\n")
        findings = inspect_source(source, tokenizer, problems, num_workers)
        _save_problems(problems, problem_list)
    duplicates = find_duplicates(findings)
    sections = summarize(findings, source.left_out, duplicates, tokenizer.context_length)
    replaced = " (replaces the one before)" if page.exists() else ""
    write_inspection(page, ", ".join(data), source, findings, duplicates, sections, tokenizer.context_length)
    _print(", ".join(data), sections, findings, source.left_out)
    stderr().print(f"page with images: {page}{replaced}")
    if problem_list.exists():
        stderr().print(f"all pairs that cannot be used: {problem_list}")
    if not len(findings.usable):
        first = findings.problems[0][2]
        raise InputError(f"{', '.join(data)}: none of {len(findings.images):,} pairs can be used; the first: {first}")


def _save_problems(problems: TextIO, path: Path) -> None:
    """Write the list of problems; without problems, remove an earlier run's."""
    if not problems.tell():
        path.unlink(missing_ok=True)
        return
    problems.seek(0)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        shutil.copyfileobj(problems, file)


def _tokenizer(model: str | None, context_length: int | None) -> TextTokenizer:
    if context_length is not None:
        require(context_length >= 2, f"--context_length {context_length} must be at least 2")
    if model is None:
        return CLIPTokenizer(context_length or PAPERS_CONTEXT)
    if model in list_models():
        from lit_clip.models.clip import CLIP

        with torch.device("meta"):  # only the tokenizer is needed
            tokenizer = CLIP(resolve_architecture(model)).tokenizer
    else:
        from lit_clip.weights.load import load_model

        tokenizer = load_model(model).tokenizer
    return tokenizer.with_context(context_length) if context_length else tokenizer


def _print(data: str, sections: list[SummarySection], findings: ScanFindings, left_out: SkippedRows) -> None:
    console = Console(file_width=120)
    table = Table(title=Text(data), show_header=False)
    table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    for section in sections:
        table.add_section()
        table.add_row(Text(section.title, style="bold"), "")
        for line in section.lines:
            table.add_row(Text(f"  {line.name}"), Text(line.value, style="yellow" if line.wrong else ""))
    console.print(table)
    wrong = [line for _, _, line in findings.problems] + [f"{where}: {reason}" for where, reason in left_out.listed]
    for line in wrong[:SHOWN]:
        stderr().print(line)
    more = findings.reasons.total() + left_out.counts.total() - min(SHOWN, len(wrong))
    if more > 0:
        stderr().print(f"... and {more:,} more that cannot be used")
