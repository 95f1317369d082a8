"""The pairs of a source that tables of decisions keep."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.hashing import hex_digest, pair_hash
from lit_clip.tools.reading import naming
from .mixture import Concatenated
from .source import MAKE_AGAIN, Pair, PairSource, Row, Rows, one_of

if TYPE_CHECKING:
    from .decisions import Decisions

CHECKED = 100  # pairs that are compared with the source before it is used
SPREAD = 10_000  # rows that these lie within at most: of shards in a store, one or two are fetched


def kept_pairs(source: PairSource, tables: str | Path | Sequence[str], option: str = "") -> "FilteredPairs":
    """Return the pairs of a source that every table of decisions keeps; messages name ``option``."""
    from .decisions import KEEP, joined

    paths = [str(each) for each in ([tables] if isinstance(tables, str | Path) else tables)]
    with naming(option):
        require(bool(paths), "an empty list of tables; name one, or leave it out")
        kept = [_kept_pairs(source, path) for path in paths]
        if len(kept) == 1:
            return kept[0]
        decisions, name = joined([each.decisions for each in kept]), ", ".join(paths)
        require(len(decisions.kept_rows) > 0, f"{name}: together keep no pair; change some decisions to {KEEP}")
        return FilteredPairs(source, decisions.kept_rows, decisions, name)


def _kept_pairs(source: PairSource, path: str) -> "FilteredPairs":
    from .decisions import ALL_PAIRS, FINDINGS, label_of, read_decisions

    decisions = read_decisions(Path(path).expanduser())
    kind = ALL_PAIRS if decisions.keeps_listed else FINDINGS
    decisions = decisions if decisions.label else replace(decisions, label=label_of(source, kind))
    theirs, ours = (label.removeprefix(f"{kind} ") for label in (decisions.label, label_of(source, kind)))
    other = "it is of other data, or they have changed since"
    require(theirs == ours, f"{path}: is of {theirs}, and the data have {ours}; {other}; {MAKE_AGAIN}")
    kept = FilteredPairs(source, decisions.kept_rows, decisions, path)
    kept.check_first()
    return kept


def digest_of_kept(source: PairSource) -> str:
    """Return a hash that changes with the kept pairs of a source or its parts; empty without a table."""
    if isinstance(source, FilteredPairs):
        return source.digest
    if isinstance(source, Rows):
        return digest_of_kept(source.source)
    parts = [digest_of_kept(part) for part in source.sources] if isinstance(source, Concatenated) else []
    return hex_digest(parts) if any(parts) else ""


class FilteredPairs(Rows):
    """Some pairs of a source: rows with some of their captions.

    The pairs of rows that decisions list are compared with the source when they are loaded, so that none is used by
    another's decision. Rows with the same image have the key of the first of them, and are not divided.
    """

    def __init__(self, source: PairSource, rows: np.ndarray, decisions: "Decisions", name: str) -> None:
        super().__init__(source, rows)
        self.decisions, self.name = decisions, name

    def __str__(self) -> str:
        pairs, rows = f"{len(self.decisions.rows):,} pairs", f"{len(self):,} of {len(self.source):,} rows"
        return f"{self.name}: keeps {pairs if self.decisions.keeps_listed else rows}"

    @cached_property
    def digest(self) -> str:
        found = self.decisions
        arrays = (self.rows, found.rows, found.pairs, *found.copies)
        return hex_digest([found.keeps_listed, *(array.tobytes() for array in arrays)])

    def _kept(self, index: int, key: str, captions: list[str]) -> list[str]:
        row, keeps = int(self.rows[index]), self.decisions.keeps_listed
        listed = set(self.decisions.of_row(row).tolist())
        if not (listed or keeps):
            return captions
        hashes = [pair_hash(key, caption) for caption in captions]
        kept = [caption for caption, pair in zip(captions, hashes, strict=True) if (pair in listed) == keeps]
        same = bool(kept) and (keeps or listed <= set(hashes))
        require(same, f"{self.name}: decided on row {row} with other captions than {key} has now; {MAKE_AGAIN}")
        return kept

    def row(self, index: int) -> Row:
        found = self.source.row(int(self.rows[index]))
        captions = self._kept(index, found.key, found.captions)
        return found._replace(captions=captions, key=self.renamed(index, found.key))

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        """Draw again if the source drew a dropped caption; all kept captions stay equally likely."""
        row = int(self.rows[index])
        pair, listed = self.source.draw(row, rng, decoded), self.decisions.of_row(row)
        if pair_hash(pair.key, pair.caption) not in listed if self.decisions.keeps_listed else len(listed):
            captions = self.captions(index)
            if pair.caption not in captions:
                pair = pair._replace(caption=captions[0] if rng is None else one_of(captions, rng))
        return pair._replace(key=self.renamed(index, pair.key))

    def renamed(self, index: int, key: str) -> str:
        """Return the key of the first row with the same image."""
        row = int(self.rows[index])
        first = int(self.decisions.copies.first_of(self.rows[index : index + 1])[0])
        return key if first == row else self.source.key(first)

    def check_first(self) -> None:
        """Compare the first pairs, and the last lines of findings, with the source; raise if they changed."""
        try:
            if self.decisions.keeps_listed:
                for index in range(min(CHECKED, len(self))):
                    self.captions(index)
            lines = self.decisions.lines[self.decisions.lines["known"]]
            rows = lines["row"]
            first = lines[rows < rows[:1] + SPREAD][:CHECKED]
            last = lines[rows > rows[-1:] - SPREAD][-CHECKED:]
            for line in np.unique(np.concatenate([first, last])):
                row = int(line["row"])
                key, captions = self.source.key(row), self.source.captions(row) if line["captions"] else [""]
                changed = f"decided on row {row} with another key or caption than {key} has now; {MAKE_AGAIN}"
                same = any(pair_hash(key, caption) == line["pair"] for caption in captions)
                require(same, f"{self.name}: {changed}")
        except BadSample as error:  # it could be read when it was decided on
            raise InputError(f"{self.name}: is of other data: {error}") from error

    def check(self) -> None:
        """Load the first pair: the command that wrote the table has read all, but perhaps from another root."""
        self.load(0, None)

    def divide(self, share: float, seed: int, groups: bool = False) -> tuple[PairSource, PairSource]:
        """Divide the source, so that an image is on the same side whichever pairs are kept."""
        train, held_out = (self._within(part) for part in self.source.divide(share, seed, groups))
        return train, held_out

    def _within(self, part: PairSource) -> "FilteredPairs":
        usable = isinstance(part, Rows) and part.source is self.source
        require(usable, f"{self.name}: {type(self.source).__name__} cannot be divided; set data.val")
        assert isinstance(part, Rows)
        chosen = np.isin(self.decisions.copies.first_of(self.rows), part.rows)
        require(
            bool(chosen.any()),
            f"{self.name}: keeps no pair for training, or none for validation; keep more, or set data.val",
        )
        return FilteredPairs(self.source, self.rows[chosen], self.decisions, self.name)
