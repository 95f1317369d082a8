"""``lit-clip inspect``: report the contents of training data, and propose which pairs to leave out."""

import tempfile
from pathlib import Path

import torch
from rich.table import Table

from lit_clip.embedding.parts import Parts
from lit_clip.errors import InputError, require
from lit_clip.models.registry import list_models, resolve_architecture
from lit_clip.models.tokenizer import CLIPTokenizer, TextTokenizer
from lit_clip.tools.atomic import Share, claimed
from lit_clip.tools.console import Console, Text, stderr
from lit_clip.tools.html import page_path
from lit_clip.tools.imports import __version__
from ..inspection.copies import ValidationCopies, find_copies, find_validation_copies, scan_lines
from ..inspection.page import Inspection, Summary, find_duplicates, summarize, write_inspection
from ..inspection.scan import ScanFindings, inspect_source, scan
from ..open_source import open_data, stamp_of_data
from ..pairs.findings import DataOptions, write_findings
from ..pairs.source import PairSource, numbered

PAPERS_CONTEXT = 77
SHOWN = 5  # problems that the terminal shows; the page and the table beside it have more


def inspect(
    given: DataOptions,
    *,
    output: str = "inspect.html",
    val: list[str] | None = None,
    model: str | None = None,
    context_length: int | None = None,
    num_workers: int = 4,
    share: str | None = None,
) -> None:
    """Read data once and report sizes, formats, bad rows, duplicates and long captions.

    Every image is decoded. The same command resumes an interrupted run.

    Args:
        given: the data.
        output: an HTML page with figures, sample images and problems, in one file. Beside it .findings.csv has a line
            for each pair that is broken, a copy or a near copy, or has a caption that says nothing or is too long, with
            a decision: keep or drop. Edit it, and train on the rest:
            lit-clip fit --data.train DATA --data.keep inspect.findings.csv
        val: the validation data; copies of their images are proposed to be dropped from the data.
        model: a checkpoint, or a name that lit_clip.create_model or lit_clip.load_model accepts; its tokenizer
            measures the captions. By default CLIP's.
        context_length: tokens that a model reads of a caption; by default the model's, or 77.
        num_workers: number of data workers.
        share: i/n, such as 3/16: read the third sixteenth, beside other jobs; when all have ended, the same command
            without it joins their work.
    """
    page, tokenizer = page_path("output", output), _tokenizer(model, context_length)
    opened = open_data(given)
    source = opened.every
    validation = open_data(DataOptions(val, given.columns), default_split="validation").every if val else None
    name, table = ", ".join(given.data), page.with_suffix(".findings.csv")
    reads = f"{model} {stamp_of_data([model] if model else [])} {tokenizer.context_length}"
    parts = Parts(page, f"{__version__} {reads} {opened.stamp(page, table)}", Share.typed(share))
    with claimed(page, table, share=parts.share):
        if share is not None:
            scan(source, tokenizer, num_workers, parts)
            parts.shared()
            return
        findings = inspect_source(source, tokenizer, num_workers, parts)
        leaks = None if validation is None else (validation, _leaks(findings, validation, tokenizer, num_workers))
        things = source.things()
        duplicates = find_duplicates(findings, None if things is None else numbered(things))
        copies = find_copies(findings, source, num_workers)
        lines = scan_lines(source, findings, copies, leaks, tokenizer)
        counts, command = write_findings(table, lines, source, given)
        inspection = Inspection(name, source, findings, duplicates, tokenizer.context_length)
        summary = summarize(inspection, counts)
        replaced = " (replaces the one before)" if page.exists() else ""
        write_inspection(page, inspection, summary, (table.name, command) if counts else None)
        parts.remove()
    _print(inspection, summary)
    stderr().print(f"page with images: {page}{replaced}")
    if not len(findings.usable):
        first = findings.problems[0][2]
        raise InputError(f"{name}: none of {len(findings.images):,} pairs can be used; the first: {first}")
    what = "all findings, and a decision on each" if counts else "nothing was found to decide on"
    stderr().print(f"{what}: {table}\ntrain on the rest: {command}")


def _leaks(found: ScanFindings, validation: PairSource, tokenizer: TextTokenizer, num_workers: int) -> ValidationCopies:
    """Read the validation data and compare their images with the training images; do not report other problems."""
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder, "validation"), "")
        return find_validation_copies(found, inspect_source(validation, tokenizer, num_workers, parts))


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


def _print(inspection: Inspection, summary: Summary) -> None:
    findings, left_out = inspection.findings, inspection.source.left_out
    table = Table(title=Text(inspection.name), show_header=False)
    table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    for title, lines in summary.items():
        table.add_section()
        table.add_row(Text(title, style="bold"), "")
        for line in lines:
            table.add_row(Text(f"  {line.name}"), Text(line.value, style="yellow" if line.wrong else ""))
    Console(file_width=120).print(table)
    wrong = [line for _, _, line in findings.problems] + [f"{where}: {reason}" for where, reason in left_out.listed]
    for line in wrong[:SHOWN]:
        stderr().print(line)
    more = findings.reasons.total() + left_out.counts.total() - min(SHOWN, len(wrong))
    if more > 0:
        stderr().print(f"... and {more:,} more that cannot be used")
