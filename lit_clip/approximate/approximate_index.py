"""An approximate index of feature files; it is updated when files are added. Indices for faiss are written, too."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from lit_clip.embedding.feature_files import WRITE_AGAIN, StoredFeatures, read_features
from lit_clip.embedding.index import nearest
from lit_clip.errors import require
from lit_clip.tools.atomic import claimed, not_written, replacing
from lit_clip.tools.console import progress
from lit_clip.tools.hashing import sha256_of_file
from lit_clip.tools.reading import reading
from lit_clip.tools.workers import usable_cores

if TYPE_CHECKING:
    from usearch.index import Index

AGAIN = "wait if lit-clip index is writing there, or else build another index under a new name"
CONNECTIVITY = 32  # links of a node on each level but the lowest, where there are twice as many
SUFFIX = ".usearch"
BUILDING = 128  # nodes kept in view while a row's neighbours are looked for
RESCORED = 4  # rows compared exactly for each row to find
ROWS, QUERIES = 8_192, 256  # added, and answered, at once
FIRST = 1_000  # rows that one thread adds; of 400 that several add, one of a hundred is not found
TOLERANCE = 0.05  # between the cosines of float32 and of int8


class IndexedFile(msgspec.Struct, frozen=True):
    """State of a feature file when its rows were added; a ``.npy`` file has its keys in a second file."""

    name: str  # in the index's folder
    stamps: list[list[int]]  # each file's size and modification time
    sha256: list[str]  # compared if these differ, as after copying

    @classmethod
    def of(cls, path: Path) -> "IndexedFile":
        """Describe a file."""
        missing = next((each for each in _files(path) if not each.is_file()), None)
        require(missing is None, f"{missing}: there is no such file; {WRITE_AGAIN}")
        return cls(path.name, _stamps(path), [sha256_of_file(each) for each in _files(path)])

    def is_still(self, path: Path) -> bool:
        """Return whether a file has the same content."""
        return self.stamps == _stamps(path) or self.sha256 == [sha256_of_file(each) for each in _files(path)]


class _Facts(msgspec.Struct):
    format: Literal["lit-clip index 1"]
    files: Annotated[list[IndexedFile], msgspec.Meta(min_length=1)]


class ApproximateIndex:
    """Rows of feature files, with a graph (HNSW) that finds nearest neighbours without reading all rows.

    A row's number is its place in the tables, one after the other.
    """

    def __init__(self, path: Path, files: Sequence[IndexedFile], tables: Sequence[StoredFeatures]) -> None:
        self.path, self.files, self.tables = path, list(files), list(tables)
        self._graph = _new_graph(_width(tables))
        self._ends = np.cumsum([len(table.features) for table in tables])
        with reading(path, "index", hint=AGAIN):
            self._graph.view(path)  # memory-mapped
        same = (len(self._graph), self._graph.ndim) == (len(self), _width(tables))
        require(same, f"{path}: is not of {len(self):,} rows of {_width(tables)} numbers; {AGAIN}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of rows by number, float32 ``[..., D]``."""
        found = np.empty((*rows.shape, self.tables[0].features.shape[1]), dtype=np.float32)
        for table, end in zip(self.tables, self._ends, strict=True):
            start = end - len(table.features)
            here = (rows >= start) & (rows < end)
            found[here] = table.features[rows[here] - start]
        return found

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Approximate :func:`lit_clip.embedding.index.nearest` for unit queries ``[Q, D]``.

        The graph's candidates are compared in float32: scores are exact, but a row may be missed.
        """
        parts = [self._nearest(queries[start : start + QUERIES], k) for start in range(0, len(queries), QUERIES)]
        scores, rows = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(rows)

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        most = min(RESCORED * k, len(self))
        self._graph.expansion_search = max(in_view(len(self)), most)
        found: Any = self._graph.search(_int8(queries), most, threads=usable_cores())
        if np.sum(found.counts if len(queries) > 1 else len(found)) < len(queries) * most:  # no links lead to some
            found = self._graph.search(_int8(queries), most, threads=usable_cores(), exact=True)
        rows, distances = (part.reshape(len(queries), most) for part in (found.keys.astype(np.int64), found.distances))
        scores = (self.rows(rows) @ queries[:, :, None])[:, :, 0]
        same = bool((np.abs(scores - (1 - distances)) <= TOLERANCE).all())  # NaN is not
        require(same, f"{self.path}: is not of the features beside it ({self.files[0].name}, ...); {AGAIN}")
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def recall(self, queries: np.ndarray, k: int) -> float:
        """Return the share of the queries' ``k`` nearest rows that the index finds."""
        exact = np.concatenate([nearest(table.features, queries, k)[0] for table in self.tables], axis=1)
        least = np.sort(exact, axis=1)[:, -min(k, len(self)), None]
        return float((self.nearest(queries, k)[0] >= least - 1e-6).mean())


def open_index(path: Path) -> ApproximateIndex:
    """Open an index, memory-mapped; the feature files beside it must not have changed.

    usearch follows the links in its file wherever they lead: open only what ``lit-clip index`` has written.
    """
    facts = _facts(path)
    with reading(facts, "list of an index's files", hint=AGAIN):
        files = msgspec.json.decode(facts.read_bytes(), type=_Facts).files
    for name in (each.name for each in files):
        beside = Path(name).name == name not in ("", "..") and "\0" not in name
        require(beside, f"{facts}: files: {name!r}: must be the name of a file beside the index")
    paths = [path.with_name(file.name) for file in files]
    for file, where in zip(files, paths, strict=True):
        gone = [each.name for each in _files(where) if not each.is_file()]
        require(not gone, f"{path}: {', '.join(gone)} with features that it has is gone; {AGAIN}")
        require(file.is_still(where), f"{path}: is not of the features in {where}, which has changed; {AGAIN}")
    tables = [read_features(where, whole=False) for where in paths]
    check_alike(paths, tables)
    return ApproximateIndex(path, files, tables)


def add_to_index(path: Path, paths: Sequence[Path]) -> ApproximateIndex:
    """Add the rows of feature files to a new or existing index beside them; write and return it."""
    for each in paths:
        require(each.absolute().parent == path.absolute().parent, f"--output {path}: must be in the folder of {each}")
    with claimed(path):
        old = open_index(path) if path.exists() else None
        files = old.files if old else []
        known = [path.with_name(file.name) for file in files]
        added = [each for each in dict.fromkeys(path.with_name(each.name) for each in paths) if each not in known]
        files = [*files, *map(IndexedFile.of, added)]
        tables = [read_features(each) for each in added]
        check_alike([*known, *added], [*(old.tables if old else []), *tables])
        if old and not added:
            return old
        graph = _new_graph(_width(tables))
        if old:
            graph.load(path)
        with progress("index", sum(len(table.features) for table in tables)) as advance:
            for table in tables:
                _add(graph, table.features, advance)
        with replacing(_facts(path)) as facts, replacing(path) as draft:
            facts.write_bytes(msgspec.json.encode(_Facts("lit-clip index 1", files)))
            try:
                graph.save(draft)
            except RuntimeError as error:  # of a full disk
                raise not_written(path, error) from error
        return open_index(path)


def _add(graph: "Index", features: np.ndarray, advance: Callable[[float], None]) -> None:
    for rows in (features[start : start + ROWS] for start in range(0, len(features), ROWS)):
        first = max(0, FIRST - len(graph))
        keys = np.arange(len(graph), len(graph) + len(rows))
        for part, threads in ((slice(first), 1), (slice(first, None), usable_cores())):
            graph.add(keys[part], _int8(rows[part]), threads=threads)
        advance(len(rows))


def in_view(rows: int) -> int:
    """Return how many nodes a search keeps in view: more beyond a million rows, up to the limit of useful recall."""
    return int(np.clip(BUILDING * rows / 1e6, BUILDING, 4 * BUILDING))


def _new_graph(dimensions: int) -> "Index":
    require(find_spec("usearch") is not None, "an approximate index needs usearch: pip install usearch")
    from usearch.index import Index

    return Index(ndim=dimensions, metric="cos", dtype="i8", connectivity=CONNECTIVITY, expansion_add=BUILDING)


def _int8(features: np.ndarray) -> np.ndarray:
    """Return rows ``[N, D]`` as int8: their directions, scaled to int8's full range."""
    return np.rint(features * (127 / np.abs(features).max(axis=1, keepdims=True))).astype(np.int8)


def _width(tables: Sequence[StoredFeatures]) -> int:
    return tables[0].features.shape[1]


def check_alike(paths: Sequence[Path], tables: Sequence[StoredFeatures]) -> None:
    """Raise :class:`InputError` unless all files have rows of the same model and width."""
    first = tables[0]
    for path, table in zip(paths, tables, strict=True):
        require(bool(table.keys), f"{path}: no features in it")
        same = table.made_by == first.made_by and _width([table]) == _width(tables)
        require(same, f"{path}: features of another model than {paths[0]}")


def _facts(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _files(path: Path) -> list[Path]:
    return [path, path.with_suffix(".keys.json")] if path.suffix == ".npy" else [path]


def _stamps(path: Path) -> list[list[int]]:
    return [[each.stat().st_size, each.stat().st_mtime_ns] for each in _files(path)]


def write_faiss(path: Path, features: Sequence[np.ndarray], exact: bool) -> None:
    """Write float32 rows ``[N, D]`` as faiss's ``IndexFlatIP`` if ``exact``, otherwise as ``IndexHNSWFlat``."""
    require(find_spec("faiss") is not None, f"--output {path}: needs faiss: pip install faiss-cpu")
    import faiss

    width = features[0].shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if not exact:
        index = faiss.IndexHNSWFlat(width, CONNECTIVITY, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = BUILDING, in_view(sum(map(len, features)))
    with progress("index", sum(map(len, features))) as advance:
        for rows in (each[start : start + ROWS] for each in features for start in range(0, len(each), ROWS)):
            index.add(np.ascontiguousarray(rows))
            advance(len(rows))
    with replacing(path) as draft:
        try:
            faiss.write_index(index, str(draft))
        except RuntimeError as error:  # of a full disk
            raise not_written(path, error) from error
