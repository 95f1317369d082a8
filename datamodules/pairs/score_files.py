"""Files of scores: the score of each pair of a source, whether the pair is kept, and if not, why."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_clip.embedding.pair_scores import SCORES
from lit_clip.errors import InputError, require
from lit_clip.tools.atomic import replacing
from lit_clip.tools.reading import reading
from .pair_filters import Cut, PairFilters
from .source import compute

GROUP = 65_536  # pairs that are read and written at once
WRITE_AGAIN = "write it with lit-clip score"
ROWS, VERSIONS = "rows", "versions"  # in the metadata: the source's number of rows, its versions as JSON
UNREADABLE = "cannot be used"
SCHEMA = (
    SCORES.remove(SCORES.get_field_index("reason")).append(pa.field("kept", pa.bool_())).append(SCORES.field("reason"))
)


@dataclass
class Filtered:
    """Counts of a file of scores."""

    pairs: int = 0
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)  # by filter; a pair counts for each that removes it


def write_scores(
    path: Path, tables: Iterable[pa.Table], scores: np.ndarray, filters: PairFilters, metadata: Mapping[str, str]
) -> Filtered:
    """Filter pairs and write them all to a ``.parquet`` file.

    ``tables`` hold the pairs in their order, with the columns ``SCORES``, and ``scores`` those of all pairs that have
    one, in any order, float32 ``[P]``.
    """
    cut, counts = filters.cut(scores), Filtered()
    about = {**metadata, "filters": json.dumps({name: value for name, value in asdict(filters).items() if value})}
    with replacing(path) as draft, pq.ParquetWriter(draft, SCHEMA.with_metadata(about)) as writer:
        for table in _in_groups(tables):
            filtered, cut = _filtered(table, filters, cut, counts)
            writer.write_table(filtered)
        if not counts.kept:
            why = ", ".join(f"{name} {count:,}" for name, count in counts.removed.items() if count)
            raise InputError(f"none of {counts.pairs:,} pairs is kept (removed by {why}); loosen the filters")
    return counts


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of ``GROUP`` rows, from parts of any size: equal pairs make equal files."""
    waiting = SCORES.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) > GROUP:
            yield waiting[:GROUP].combine_chunks()
            waiting = waiting[GROUP:]
    yield waiting.combine_chunks()


def _filtered(table: pa.Table, filters: PairFilters, cut: Cut | None, counts: Filtered) -> tuple[pa.Table, Cut | None]:
    """Return pairs with ``SCHEMA``, and the cut for the next ones; adds to the counts."""
    has_score = table["score"].is_valid().to_numpy()
    scored = table.filter(pa.array(has_score))
    removed = filters.removed(scored, cut)
    if cut is not None:
        ties = int(np.count_nonzero(scored["score"].to_numpy() == np.float32(cut.score)))
        cut = cut._replace(ties=max(0, cut.ties - ties))
    kept = np.zeros(len(table), dtype=bool)
    kept[has_score] = ~np.logical_or.reduce([np.zeros(len(scored), dtype=bool), *removed.values()])
    reasons = table["reason"].to_pylist()
    rows = np.flatnonzero(has_score)
    for name, mask in removed.items():
        counts.removed[name] += int(mask.sum())
        for row in rows[mask]:
            reasons[row] = f"{reasons[row]}, {name}" if reasons[row] else name
    counts.removed[UNREADABLE] += len(table) - len(scored)
    counts.pairs, counts.kept = counts.pairs + len(table), counts.kept + int(kept.sum())
    columns = {name: table[name] for name in SCORES.names} | {"kept": kept, "reason": pa.array(reasons, pa.string())}
    return pa.table({name: columns[name] for name in SCHEMA.names}, SCHEMA), cut


class ScoreFile:
    """A file that :func:`write_scores` wrote; its metadata have the model and the source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path, "file of scores", hint=WRITE_AGAIN):
            schema = pq.read_schema(path)
            require(schema.equals(SCHEMA), f"{path}: is no file of scores; {WRITE_AGAIN}")
            self.metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            self.rows = int(self.metadata[ROWS])
            self.versions: dict[str, str] = dict(json.loads(self.metadata[VERSIONS]))

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a path is a file of scores."""
        with suppress(InputError):
            return path.suffix == ".parquet" and bool(ScoreFile(path))
        return False

    def _batches(self, names: list[str]) -> Iterator[pa.Table]:
        with reading(self.path, "file of scores", hint=WRITE_AGAIN):
            file = pq.ParquetFile(self.path)
            first = 0
            for batch in file.iter_batches(GROUP, columns=list({*names, "score"}), use_threads=False):
                batch.validate(full=True)
                wrong = np.flatnonzero(~np.isfinite(batch["score"].fill_null(0).to_numpy()))
                if len(wrong):
                    row, score = first + int(wrong[0]), batch["score"][int(wrong[0])]
                    raise InputError(f"{self.path}: the score of row {row} is {score}; {WRITE_AGAIN}")
                first += len(batch)
                yield pa.Table.from_batches([batch]).select(names)

    def pairs(self) -> Iterator[pa.Table]:
        """Yield all pairs as before filtering, with the columns ``SCORES``."""
        for table in self._batches(SCORES.names):
            unscored = table["score"].is_null().combine_chunks()
            reasons = compute.if_else(unscored, table["reason"].combine_chunks(), None)
            yield table.set_column(SCORES.get_field_index("reason"), "reason", reasons).cast(SCORES)

    def scores(self) -> np.ndarray:
        """Return the scores of all pairs that have one, float32 ``[P]``."""
        found = [table["score"].drop_null().to_numpy() for table in self._batches(["score"])]
        return np.concatenate([np.zeros(0, dtype=np.float32), *found])

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and the hash of each pair that is kept, int64 ``[K]`` each; the rows ascend."""
        found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
        for table in self._batches(["row", "pair", "kept"]):
            kept = table.filter(table["kept"])
            with reading(self.path, "file of scores", hint=WRITE_AGAIN):
                found.append((kept["row"].to_numpy(), kept["pair"].to_numpy()))
        rows, pairs = (np.concatenate(columns) for columns in zip(*found, strict=True))
        ordered = rows.dtype == pairs.dtype == np.int64 and bool((np.diff(rows) >= 0).all())
        inside = ordered and (not len(rows) or (rows[0] >= 0 and rows[-1] < self.rows))
        require(inside, f"{self.path}: its rows are not those of {self.rows} in order; {WRITE_AGAIN}")
        require(len(rows) > 0, f"{self.path}: keeps no pair; {WRITE_AGAIN}")
        return rows, pairs
