"""Filters of pairs, and score files: tables of decisions on all pairs of a source, with each pair's score.

The filters are those of DataComp's baselines (Gadre et al. 2023; mlfoundations/datacomp, ``baselines/apply_filter.py``)
that depend on the pair alone, under the names that its code gives the quantities.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_clip.errors import InputError, require
from lit_clip.tools.atomic import replacing
from lit_clip.tools.reading import reading
from .decisions import DROP, KEEP, check_scores
from .source import compute

SCORES = pa.schema(
    {
        "row": pa.int64(),
        "pair": pa.int64(),  # pair_hash; like all but row and finding null for a row that cannot be read
        "key": pa.string(),
        "caption": pa.string(),
        "score": pa.float32(),  # null where there is a finding
        "width": pa.int32(),
        "height": pa.int32(),
        "finding": pa.string(),
    }
)


class Cut(NamedTuple):
    """Limit for the best pairs: keep all above a score, and the first ``ties`` with exactly this score."""

    score: float
    ties: int


@dataclass(frozen=True)
class PairFilters:
    """Filters of pairs; a pair is kept if it passes every filter that is set."""

    # the share of all pairs that have a score, best first; rounded down to whole pairs. Of pairs with the same score
    # the earlier ones are kept
    fraction: float | None = None
    threshold: float | None = None  # least score
    min_caption_words: int | None = None  # separated by white space
    min_image_dim: int | None = None  # pixels of the shorter side

    def __post_init__(self) -> None:
        share = self.fraction
        percent = f"; {share:g} % is {share / 100:g}" if share is not None and 1 < share <= 100 else ""
        require(share is None or 0 < share <= 1, f"--fraction {share}: must be above 0 and at most 1{percent}")
        require(self.fraction is None or self.threshold is None, "--threshold: give it or --fraction, not both")
        for name in ("min_caption_words", "min_image_dim"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} {value}: must be at least 1")

    def cut(self, scores: np.ndarray) -> Cut | None:
        """Return the cut for ``fraction`` from the scores of all scored pairs, float32 ``[N]``."""
        if self.fraction is None:
            return None
        count = int(self.fraction * len(scores) + 1e-6)  # 0.29 * 100 is a little less than 29
        require(count >= 1, f"--fraction {self.fraction}: keeps none of {len(scores)} pairs; raise it")
        score = np.partition(scores, len(scores) - count)[len(scores) - count]
        return Cut(float(score), count - int(np.count_nonzero(scores > score)))

    def removed(self, pairs: pa.Table, cut: Cut | None) -> dict[str, np.ndarray]:
        """Return, by filter, which scored pairs (columns ``SCORES``) it removes, bool ``[N]``."""
        scores = pairs["score"].to_numpy()
        found: dict[str, np.ndarray] = {}
        if cut is not None:
            tie = scores == np.float32(cut.score)
            found["clip_score"] = (scores < np.float32(cut.score)) | (tie & (np.cumsum(tie) > cut.ties))
        if self.threshold is not None:
            found["clip_score"] = scores.astype(np.float64) < self.threshold
        if self.min_caption_words is not None:
            words = [len(caption.split()) for caption in pairs["caption"].to_pylist()]
            found["caption_num_words"] = np.array(words, dtype=np.int64) < self.min_caption_words
        if self.min_image_dim is not None:
            width, height = (pairs[name].to_numpy() for name in ("width", "height"))
            found["min_image_dim"] = np.minimum(width, height) < self.min_image_dim
        return found


WRITE_AGAIN = "write it with lit-clip score"
UNREADABLE = "cannot be used"
GROUP = 65_536  # lines that are written and read at once
SCHEMA = pa.schema(
    [
        *SCORES.remove(SCORES.get_field_index("finding")),
        *(pa.field(name, pa.string()) for name in ("decision", "finding", "data")),
    ]
)


@dataclass
class Filtered:
    """Counts of a score file."""

    pairs: int = 0
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)  # by filter; a pair counts for each that removes it


def write_scores(
    path: Path,
    tables: Iterable[pa.Table],
    scores: np.ndarray,
    filters: PairFilters,
    metadata: Mapping[str, str],
    data: str,
) -> Filtered:
    """Filter pairs, and write all of them to a ``.parquet`` file.

    ``tables`` hold the pairs in their order, with the columns ``SCORES``, and ``scores`` those of all pairs that have
    one, in any order, float32 ``[P]``; ``data`` is :func:`datamodules.pairs.decisions.label_of` their source.
    """
    cut, counts = filters.cut(scores), Filtered()
    about = {**metadata, "filters": json.dumps({name: value for name, value in asdict(filters).items() if value})}
    with replacing(path) as draft, pq.ParquetWriter(draft, SCHEMA.with_metadata(about)) as writer:
        for table in _in_groups(tables):
            filtered, cut = _filtered(table, filters, cut, counts)
            labels = pa.array([data] * len(filtered), pa.string())
            writer.write_table(filtered.append_column("data", labels).select(SCHEMA.names))
        if not counts.kept:
            why = ", ".join(f"{name} {count:,}" for name, count in counts.removed.items() if count)
            raise InputError(f"none of {counts.pairs:,} pairs is kept (removed by {why}); loosen the filters")
    return counts


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of ``GROUP`` rows, so that equal pairs make equal files."""
    waiting = SCORES.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) > GROUP:
            yield waiting[:GROUP].combine_chunks()
            waiting = waiting[GROUP:]
    yield waiting.combine_chunks()


def _filtered(table: pa.Table, filters: PairFilters, cut: Cut | None, counts: Filtered) -> tuple[pa.Table, Cut | None]:
    """Return pairs with ``SCHEMA``, and the cut for the next pairs; update the counts."""
    has_score = table["score"].is_valid().to_numpy()
    scored = table.filter(pa.array(has_score))
    removed = filters.removed(scored, cut)
    if cut is not None:
        ties = int(np.count_nonzero(scored["score"].to_numpy() == np.float32(cut.score)))
        cut = cut._replace(ties=max(0, cut.ties - ties))
    kept = np.zeros(len(table), dtype=bool)
    kept[has_score] = ~np.logical_or.reduce([np.zeros(len(scored), dtype=bool), *removed.values()])
    findings = table["finding"].to_pylist()
    rows = np.flatnonzero(has_score)
    for name, mask in removed.items():
        counts.removed[name] += int(mask.sum())
        for row in rows[mask]:
            findings[row] = f"{findings[row]}, {name}" if findings[row] else name
    counts.removed[UNREADABLE] += len(table) - len(scored)
    counts.pairs, counts.kept = counts.pairs + len(table), counts.kept + int(kept.sum())
    decision = pa.array(np.where(kept, KEEP, DROP).tolist(), pa.string())
    columns = {name: table[name] for name in SCORES.names} | {"finding": pa.array(findings, pa.string())}
    return pa.table(columns).append_column("decision", decision), cut


class ScoreFile:
    """A file from :func:`write_scores`; its metadata have the model and the source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path, "file of scores", hint=WRITE_AGAIN):
            schema = pq.read_schema(path)
            require(schema.equals(SCHEMA), f"{path}: is no file of scores; {WRITE_AGAIN}")
            self.metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            first = next(pq.ParquetFile(path).iter_batches(1, columns=["data"]), None)
            require(first is not None and first["data"][0].is_valid, f"{path}: has no pairs; {WRITE_AGAIN}")
            assert first is not None
            self.label: str = first["data"][0].as_py()

    @staticmethod
    def is_one(path: Path) -> bool:
        with suppress(InputError):
            return path.suffix == ".parquet" and bool(ScoreFile(path))
        return False

    def _batches(self, names: list[str]) -> Iterator[pa.Table]:
        with reading(self.path, "file of scores", hint=WRITE_AGAIN):
            file = pq.ParquetFile(self.path)
            first = 0
            for batch in file.iter_batches(GROUP, columns=list({*names, "score"}), use_threads=False):
                batch.validate(full=True)
                check_scores(self.path, batch["score"], first)
                first += len(batch)
                yield pa.Table.from_batches([batch]).select(names)

    def pairs(self) -> Iterator[pa.Table]:
        """Yield all pairs as before filtering, with the columns ``SCORES``."""
        for table in self._batches(SCORES.names):
            unscored = table["score"].is_null().combine_chunks()
            findings = compute.if_else(unscored, table["finding"].combine_chunks(), None)
            yield table.set_column(SCORES.get_field_index("finding"), "finding", findings).cast(SCORES)

    def scores(self) -> np.ndarray:
        """Return the scores of all scored pairs, float32 ``[P]``."""
        found = [table["score"].drop_null().to_numpy() for table in self._batches(["score"])]
        return np.concatenate([np.zeros(0, dtype=np.float32), *found])
