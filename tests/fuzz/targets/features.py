"""Features and indexes of them, tables of decisions, and stored rows."""

import csv
import io
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st

from datamodules.pairs.custom import CustomPairs
from datamodules.pairs.decisions import ALL_PAIRS, FINDINGS
from datamodules.pairs.findings import DataOptions, Finding, write_findings
from datamodules.pairs.kept import kept_pairs
from datamodules.pairs.score_files import SCORES, PairFilters, ScoreFile, write_scores
from datamodules.pairs.source import Columns
from lit_clip.embedding.feature_files import FeatureTable, read_features, write_features
from lit_clip.embedding.parts import load_arrays, save_arrays
from lit_clip.tools.hashing import pair_hash
from lit_clip.tools.reading import naming
from lit_clip.tools.stored_rows import StoredRows
from tests.fuzz.inputs import CANARY, Edit, Input, Inputs, Target, damaged, edited, edited_json, edits, to_json
from tests.fuzz.targets.pairs import odd_tables, to_parquet

pc: Any = pyarrow.compute  # its functions are defined at run time
MODEL = "a model's fingerprint"
WHEN = 1_700_000_000 * 10**9  # modification time of an image


@cache
def _features() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@cache
def whole_features() -> dict[str, bytes]:
    """Return feature files as `lit-clip embed` writes them."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        metadata = {"model": "m", "model_sha256": "0" * 64, "content": "images"}
        for suffix in (".parquet", ".npy"):
            write_features(folder / f"f{suffix}", [f"{row}.png" for row in range(6)], _features(), metadata, ["a"] * 6)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _odd_features(table: pa.Table) -> Input:
    names = ["key", "feature", "caption"][: table.num_columns]
    table = table.select(list(range(len(names))))
    return Input("f.parquet", to_parquet(table.rename_columns(names)))


def _scaled_features(name: str, row: int, scale: float) -> Input:
    """Return features of which one row, or from 6 on all, has another length."""
    features = _features().copy()
    features[row if row < 6 else slice(None)] *= np.float32(scale)
    file = io.BytesIO()
    if name == "f.npy":
        np.save(file, features)
        return Input(name, file.getvalue())
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table({"key": [f"{each}.png" for each in range(6)], "feature": column})
    return Input(name, to_parquet(table.replace_schema_metadata({"model": "m"})))


SCALES = (0.0, 100.0, 2.0, 0.9, -1.0, 1.001, 1e30, 1e-30, float("nan"), float("inf"))


def feature_inputs() -> Inputs:
    keys = {"f.keys.json": json.loads(whole_features()["f.keys.json"])}
    names = st.sampled_from(("f.npy", "f.parquet"))
    scaled = st.builds(_scaled_features, names, st.integers(0, 7), st.sampled_from(SCALES))
    return st.one_of(damaged(whole_features), edited_json(lambda: keys), odd_tables().map(_odd_features), scaled)


def read_feature_file(folder: Path, given: Input) -> Iterator[str]:
    """Read a feature file."""
    for name, data in whole_features().items():
        (folder / name).write_bytes(data)
    (folder / given.name).write_bytes(given.data)
    stored = read_features(folder / ("f.parquet" if given.name == "f.parquet" else "f.npy"))
    assert stored.features.dtype == np.float32
    assert stored.features.shape == (len(stored.keys), stored.features.shape[1])
    lengths = np.linalg.norm(stored.features.astype(np.float64), axis=1)
    assert np.allclose(lengths, 1, rtol=0, atol=0.011), f"features of length {lengths.min():.3g} to {lengths.max():.3g}"
    assert all(isinstance(key, str) for key in stored.keys), "keys that are no texts"
    yield "used"


@cache
def whole_feature_index() -> bytes:
    """Return an index of a folder's images."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "index.npz")
        save_arrays(
            path, MODEL, FeatureTable([(f"{row}.png", 100 + row, WHEN + row) for row in range(6)], _features()).arrays()
        )
        return path.read_bytes()


def _odd_arrays(changes: list[Edit], scale: float) -> Input:
    with np.load(io.BytesIO(whole_feature_index())) as file:
        arrays = {name: file[name] for name in file.files}
    tree: dict[str, Any] = {name: array.tolist() for name, array in arrays.items() if name != "identities"}
    tree["identities"] = json.loads(arrays["identities"].tobytes())
    tree = edited(tree, changes)
    for name, value in tree.items() if isinstance(tree, dict) else ():
        try:
            made = np.frombuffer(json.dumps(value).encode(), np.uint8) if name == "identities" else np.array(value)
        except (ValueError, OverflowError):
            continue
        if made.dtype != object:
            old = arrays.get(name)
            fits = old is not None and old.dtype.kind == made.dtype.kind
            arrays[name] = made.astype(old.dtype) if fits and old is not None else made
    if scale != 1 and arrays["features"].dtype == np.float32:
        arrays["features"] = arrays["features"] * np.float32(scale)
    file = io.BytesIO()
    named = {
        name.encode(errors="replace").decode().replace("/", "_")[:50] or "_": each for name, each in arrays.items()
    }
    np.savez(file, **named)
    return Input("index.npz", file.getvalue())


def feature_index_inputs() -> Inputs:
    scales = st.sampled_from((1.0, 1.0, 1.0, float("nan"), float("inf"), 0.0, 2.0, -1.0))
    whole = {"index.npz": whole_feature_index()}
    odd = st.builds(_odd_arrays, edits((f"{CANARY}.Evil",)), scales)
    return st.one_of(damaged(lambda: whole), odd)


def read_feature_index(folder: Path, given: Input) -> Iterator[str]:
    """Read an index of features: a usable table, or none, so that it is made again."""
    path = folder / given.name
    path.write_bytes(given.data)
    table = load_arrays(path, MODEL, FeatureTable.of)
    if table is None:
        yield "skipped"
        return
    features = np.asarray(table.features)
    assert features.dtype == np.float32, features.dtype
    assert features.ndim == 2, features.shape
    assert len(features) == len(table.identities), "another number of features than of images"
    assert np.isfinite(features).all(), "features that are not finite"
    lengths = np.linalg.norm(features, axis=1)
    assert np.allclose(lengths, 1, atol=1e-2), f"features of length {lengths.min():.3g} to {lengths.max():.3g}"
    hash(tuple(table.identities))
    yield "used"


@cache
def whole_scores() -> dict[str, bytes]:
    """Return a file of scores as `lit-clip score` writes it."""
    texts = [f"number {row}" for row in range(6)]
    pairs = [(row, pair_hash(f"{row}.png", text), f"{row}.png", text) for row, text in enumerate(texts)]
    pairs = [(*pair, 0.1 * (1 + pair[0]), 8, 8, None) for pair in pairs]
    table = pa.table([list(column) for column in zip(*pairs, strict=True)], SCORES)
    label = f"{ALL_PAIRS} 6 rows"
    with TemporaryDirectory() as name:
        path = Path(name, "s.parquet")
        write_scores(path, [table], table["score"].to_numpy(), PairFilters(threshold=0.25), {"model": "m"}, label)
        return {path.name: path.read_bytes()}


class SixPairs(CustomPairs):
    """The source that the tables decide on; its images are not read."""

    def __len__(self) -> int:
        return 6

    def key(self, index: int) -> str:
        return f"{index}.png"

    def image(self, index: int) -> bytes:
        raise AssertionError(index)

    def captions(self, index: int) -> list[str]:
        return [f"number {index}"]


@cache
def whole_findings() -> dict[str, bytes]:
    """Return a table of findings as `lit-clip inspect` writes it: rows 1 and 3 are dropped."""
    lines = [Finding.of_row(1, "1.png"), *(Finding.of_pair(row, f"{row}.png", f"number {row}", 1) for row in (3, 4))]
    for line, decision in zip(lines, ("drop", "drop", "keep"), strict=True):
        line.add("copy", decision)
    with TemporaryDirectory() as name:
        path = Path(name, "f.csv")
        write_findings(path, lines, SixPairs(), DataOptions(["d.csv"], Columns(), None))
        return {path.name: path.read_bytes()}


WORDS = ("drop", "KEEP", "maybe", "all", "1 of 1", "1 of 0", "1 of 999999999", "p0000000000000000", "p", "nan")
NUMBERS = ("-1", "5", "6", "1e3", "1.0", "1.5", "0x10", "\uff11", "9" * 4000)
LABELS = ("findings in 6 rows", "every pair of 6 rows", "findings in 999999999999999 rows")
CELLS = (*WORDS, *NUMBERS, *LABELS, "", " ", "=1+1", "\x00", "\x1b[31m", "\u202e", '"', "\n")


def _odd_findings(changes: list[tuple[int, int, str]], copies: int, delimiter: str) -> Input:
    """Return the table with some cells changed, and some of its lines more than once."""
    lines = list(csv.reader(io.StringIO(whole_findings()["f.csv"].decode("utf-8-sig"))))
    for line, column, cell in changes:
        lines[line % len(lines)][column % len(lines[0])] = cell
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([*lines, *lines[1 : 1 + copies]])
    return Input("f.csv", file.getvalue().encode(errors="replace"))


def _odd_parquet(changes: list[tuple[int, int, str]], kind: str) -> Input:
    """Return such a table as parquet, whose numbers have some type."""
    lines = list(csv.reader(io.StringIO(_odd_findings(changes, 0, ",").data.decode())))
    columns: dict[str, Any] = {name: [line[place] for line in lines[1:]] for place, name in enumerate(lines[0])}
    for name in {"row", "copy_of_row"} & columns.keys() if kind != "text" else ():
        with suppress(ValueError, pa.ArrowException):
            numbers = [float(cell) if cell else None for cell in columns[name]]
            columns[name] = pa.array(numbers, pa.float64()).cast(kind)
    return Input("f.parquet", to_parquet(pa.table(columns)))


def finding_inputs() -> Inputs:
    cells = st.one_of(st.sampled_from(CELLS), st.text(max_size=6))
    changes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10), cells), max_size=3)
    odd = st.builds(_odd_findings, changes, st.integers(0, 3), st.sampled_from((",", ";", "\t")))
    typed = st.builds(_odd_parquet, changes, st.sampled_from(("text", "int64", "double", "int8", "uint64")))
    return st.one_of(damaged(whole_findings), odd, typed)


def _odd_scores(name: str, row: int, value: Any, metadata: list[tuple[bytes, bytes]]) -> Input:
    table = pq.read_table(io.BytesIO(whole_scores()["s.parquet"]))
    place = table.schema.get_field_index(name)
    values = table[name].to_pylist()
    values[row] = value
    with suppress(pa.ArrowException, TypeError, OverflowError, ValueError):  # no such column
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **dict(metadata)})
    return Input("s.parquet", to_parquet(table))


def score_inputs() -> Inputs:
    names = st.sampled_from(("score", "score", "score", "row", "pair", "decision", "data", "width", "caption"))
    numbers = st.sampled_from(
        (float("nan"), float("inf"), float("-inf"), None, 0.0, 1e38, -1, 7, 2**62, True, "x", "keep")
    )
    keys = st.sampled_from((b"model", b"filters", b"\xff"))
    texts = st.sampled_from((b"\xff", b"", b"-1", b"1e9", b"[]", b'{"f": 1}', b"\x1b[31m", b"9" * 5000))
    metadata = st.lists(st.tuples(keys, texts), max_size=1)
    odd = st.builds(_odd_scores, names, st.integers(0, 5), numbers, metadata)
    return st.one_of(damaged(whole_scores), odd, finding_inputs())


def read_score_file(folder: Path, given: Input) -> Iterator[str]:
    """Read which pairs a table keeps; filter a file of scores anew, by share and by score: no score but a number."""
    path = folder / given.name
    path.write_bytes(given.data)
    kept = kept_pairs(SixPairs(), path)
    assert 0 < len(kept) <= 6
    assert [kept.captions(index) for index in range(len(kept))] == [[f"number {row}"] for row in kept.rows]
    assert np.array_equal(kept.rows, np.unique(kept.rows)), kept.rows
    if not given.name.startswith("s."):
        yield "used"
        return
    file = ScoreFile(path)
    scores = file.scores()
    assert np.isfinite(scores).all(), f"scores {scores}"
    for number, filters in enumerate((PairFilters(fraction=0.5), PairFilters(threshold=0.25), PairFilters())):
        again = folder / f"again{number}.parquet"
        with naming(path):
            write_scores(again, file.pairs(), scores, filters, file.metadata, file.label)
        table = pq.read_table(again)
        kept = table.filter(pc.equal(table["decision"], "keep"))["score"].to_numpy()
        assert np.isfinite(kept).all(), f"{filters} keeps {kept}"
        if filters.threshold is not None:
            assert (kept >= filters.threshold - 1e-6).all(), f"{filters} keeps {kept}"
    yield "used"


class NinePairs(SixPairs):
    """A source of six rows, of which every second has two captions."""

    def captions(self, index: int) -> list[str]:
        return [f"number {index}", f"again {index}"][: 1 + index % 2]


ALL = {(row, text) for row in range(6) for text in NinePairs().captions(row)}


def decision_inputs() -> Inputs:
    """Describe tables of scores or findings, each a file or a folder of several; 2 is the whole row."""
    places = st.sampled_from([(row, place) for row in range(6) for place in range(1 + row % 2)])
    whole = st.tuples(st.integers(0, 5), st.just(2))
    decision = st.sampled_from(("keep", "keep", "drop"))
    scores = st.tuples(st.just(ALL_PAIRS), st.lists(st.tuples(places, decision), min_size=1, max_size=9))
    findings = st.tuples(st.just(FINDINGS), st.lists(st.tuples(st.one_of(places, whole), decision), max_size=6))
    table = st.tuples(st.one_of(scores, findings), st.sampled_from((0, 1, 3)))
    return st.lists(table, min_size=1, max_size=3).map(lambda tables: Input("t.json", to_json(tables)))


def _decided(kind: str, lines: list[Any]) -> pa.Table:
    cells = [[row, NinePairs().captions(row)[place] if place < 2 else ""] for (row, place), _ in lines]
    columns = {
        "row": pa.array([row for row, _ in cells], pa.int64()),
        "pair": pa.array([pair_hash(f"{row}.png", text) for row, text in cells], pa.int64()),
        "decision": [decision for _, decision in lines],
        "data": [f"{kind} 6 rows"] * len(lines),
        "captions": [f"1 of {1 + row % 2}" if text else "all" for row, text in cells],
    }
    return pa.table(columns)


def read_decisions(folder: Path, given: Input) -> Iterator[str]:
    """Keep what tables keep: of the lines on a pair one that drops it decides, and so does one of the tables."""
    expected, paths = ALL, list[str]()
    for number, ((kind, lines), parts) in enumerate(json.loads(given.data)):
        path = folder / (f"{number}.parquet" if parts == 0 else f"t{number}")
        path.mkdir() if parts else pq.write_table(_decided(kind, lines), path)
        for part in range(parts):
            pq.write_table(_decided(kind, lines[part::parts]), path / f"{part}.parquet")
        on = {decision: set[tuple[int, str]]() for decision in ("keep", "drop")}
        for (row, place), decision in lines:
            texts = NinePairs().captions(row)
            on[decision] |= {(row, text) for text in (texts if place == 2 else texts[place : place + 1])}
        expected = expected & (on["keep"] if kind == ALL_PAIRS else ALL) - on["drop"]
        paths.append(str(path))
    kept = kept_pairs(NinePairs(), paths)
    found = {(int(row), text) for index, row in enumerate(kept.rows) for text in kept.captions(index)}
    assert found == expected, f"{sorted(found - expected)} are kept, and {sorted(expected - found)} are not"
    yield "used"


@cache
def whole_stored_rows() -> dict[str, bytes]:
    """Return the files of stored rows; the last row cannot be computed, and another is absent."""
    with TemporaryDirectory() as name:
        stored = StoredRows.create(Path(name, "rows"), 8, (8,), torch.float32)
        stored.write(np.arange(6), torch.from_numpy(_features()))
        stored.mark_unusable([7])
        stored.close()
        return {path.name: path.read_bytes() for path in sorted(stored.folder.iterdir())}


def _moved(seed: int, zeros: bool) -> Input:
    """Overwrite some values by others, or by zeros."""
    values, rng = bytearray(whole_stored_rows()["values"]), random.Random(seed)
    size = rng.choice((4, 16, 32, 64))
    start, other = (rng.randrange(0, len(values) - size, 4) for _ in range(2))
    values[start : start + size] = bytes(size) if zeros else values[other : other + size]
    return Input("values", bytes(values))


def stored_row_inputs() -> Inputs:
    layout = {"layout.json": json.loads(whole_stored_rows()["layout.json"])}
    moved = st.builds(_moved, st.integers(0, 2**64), st.booleans())
    return st.one_of(damaged(whole_stored_rows), moved, edited_json(lambda: layout))


def read_stored_rows(folder: Path, given: Input) -> Iterator[str]:
    """Open stored rows as FrozenFeatures does: a row has the values that were written, or is absent."""
    rows = folder / "rows"
    rows.mkdir()
    for name, data in whole_stored_rows().items():
        (rows / name).write_bytes(data)
    (rows / given.name).write_bytes(given.data)
    stored = StoredRows.create(rows, 8, (8,), torch.float32)
    list(stored.remove_damaged(np.arange(8)))
    for row in range(8):
        found = stored.read(row)
        assert found is None or (row < 6 and np.array_equal(found.numpy(), _features()[row])), f"row {row} is {found}"
        yield "skipped" if found is None else "used"


feature_files = Target(feature_inputs, read_feature_file)
feature_index = Target(feature_index_inputs, read_feature_index)
decisions = Target(decision_inputs, read_decisions)
score_files = Target(score_inputs, read_score_file)
stored_rows = Target(stored_row_inputs, read_stored_rows)
