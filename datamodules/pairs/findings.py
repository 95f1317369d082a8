"""Tables of findings on a source for people to read and edit: problems of pairs, and decisions."""

import csv
import filecmp
import itertools
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import stderr
from lit_clip.tools.hashing import pair_hash
from lit_clip.tools.reading import no_formula
from .decisions import DROP, FINDINGS, KEEP, WHOLE_ROW, label_of, pair_text
from .source import COLUMNS, NO_CAPTION, Columns, PairSource

CHARACTERS = 200  # of a caption
Counts = Counter[tuple[str, str]]  # lines by finding and decision


@dataclass
class Finding:
    """A line of findings on a pair or a whole row, with the columns of :mod:`datamodules.pairs.decisions`."""

    decision: str = KEEP
    finding: str = ""
    detail: str = ""
    key: str = ""
    caption: str = ""
    copy_of: str = ""  # the key of the same image
    copy_of_row: int | None = None
    captions: str = WHOLE_ROW
    row: int | None = None
    pair: str = ""

    @classmethod
    def of_row(cls, row: int, key: str | None) -> "Finding":
        """Return a line on a whole row; the row's key may be unreadable."""
        return cls(key=without_secrets(key or ""), row=row, pair="" if key is None else pair_text(pair_hash(key, "")))

    @classmethod
    def of_pair(cls, row: int, key: str, caption: str, captions: int) -> "Finding":
        text = " ".join(caption.split())
        text = text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}..."
        pair = pair_text(pair_hash(key, caption))
        return cls(key=key, caption=text, captions=f"1 of {captions}", row=row, pair=pair)

    def add(self, finding: str, decision: str, detail: str = "") -> None:
        """Add a finding and its proposed decision; one finding that drops the line is enough."""
        self.finding = "; ".join(filter(None, (self.finding, finding)))
        self.detail = "; ".join(filter(None, (self.detail, detail)))
        self.decision = DROP if DROP in (decision, self.decision) else KEEP


@dataclass(frozen=True)
class DataOptions:
    """The training data of a command.

    Args:
        data: a table, a folder of images with captions beside them, tar shards or anything else that training takes.
        columns: of a table.
        split: of data that come in splits; embed, mine and score take train by default.
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    data: list[str]
    columns: Columns = Columns()  # noqa: RUF009  # immutable
    split: str | None = None


def write_findings(
    path: Path, lines: Iterable[Finding], source: PairSource, options: DataOptions
) -> tuple[Counts, str]:
    """Write a ``.csv`` file; return counts of its lines, and the command that trains on the kept pairs.

    An earlier file that differs, maybe because decisions were edited, is kept under another name.
    """
    counts: Counts = Counter()
    label = label_of(source, FINDINGS)
    with (
        replacing(path) as draft,  # the byte order mark tells spreadsheets that it is UTF-8
        draft.open("w", newline="", encoding="utf-8-sig", errors="replace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Finding)), "data"])
        for line in lines:
            writer.writerow(map(no_formula, (*asdict(line).values(), label)))
            counts.update((finding, line.decision) for finding in line.finding.split("; "))
        file.flush()
        if path.exists() and not filecmp.cmp(path, draft, shallow=False):
            names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            shutil.copy2(path, kept)
            stderr().print(f"{path}: the table that was there differs; it is now {kept}")
    return counts, _command(path, source, options)


def _command(path: Path, source: PairSource, options: DataOptions) -> str:
    train = options.data[0] if len(options.data) == 1 else f"[{','.join(options.data)}]"
    words = ["lit-clip", "fit", "--data.train", train, "--data.keep", str(path)]
    for name in (*COLUMNS, "root"):
        column = getattr(options.columns, name)
        typed = f"[{','.join(column)}]" if isinstance(column, list) else column
        words += [f"--data.columns.{name}", typed] if column is not None else []
    words += ["--data.splits.train", options.split] if options.split is not None else []
    unusable = source.left_out.counts.keys() - {NO_CAPTION}
    return shlex.join([*words, *(("--data.bad_samples.on_error", "skip") if unusable else ())])
