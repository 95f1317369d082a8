"""Approximate indices: the list of an index's files, and the files of features beside it."""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
from hypothesis import strategies as st

from lit_clip.approximate import ApproximateIndex, add_to_index, open_index
from lit_clip.embedding.feature_files import write_features
from tests.fuzz.inputs import Input, Inputs, Target, damaged, edited_json, exchanged, placed
from tests.fuzz.targets.features import WHEN
from tests.fuzz.targets.weights import HOSTILE

INDEX, FACTS = "all.usearch", "all.usearch.json"
WIDTH, FEW = 8, 3
ROWS = {"a.npy": 30, "b.parquet": 12, "new.npy": 5}  # of which the last is not in the index


@cache
def whole_index(seed: int = 0) -> dict[str, bytes]:
    """Return an index with its files of features."""
    with TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(seed)
        for file, rows in ROWS.items():
            features = rng.normal(size=(rows, WIDTH)).astype(np.float32)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            keys = [f"{seed}{file}{row}.png" for row in range(rows)]
            write_features(folder / file, keys, features, {"model": "m", "model_sha256": "0" * 64})
        for path in folder.iterdir():
            os.utime(path, ns=(WHEN, WHEN))
        add_to_index(folder / INDEX, [folder / "a.npy", folder / "b.parquet"])
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@cache
def other_files() -> dict[str, bytes]:
    """Return the files of an index of other features of the same number and width."""
    return {f"other/{name}": data for name, data in whole_index(1).items()}


def index_inputs() -> Inputs:
    names = ("", ".", "..", "/", "../a.npy", "new.npy", "b.parquet", FACTS, INDEX, *HOSTILE)
    facts = edited_json(lambda: {FACTS: json.loads(whole_index()[FACTS])}, names)
    features = damaged(lambda: {name: data for name, data in whole_index().items() if name != INDEX})
    return st.one_of(facts, facts, features, exchanged(whole_index(), other_files()))


def read_index(folder: Path, given: Input) -> Iterator[str]:
    """Search an index as it is, and with a further file: scores are those of the files, and no row is missed."""
    files = placed(given, whole_index(), other_files())
    for name, data in files.items():
        (folder / name).write_bytes(data)
        when = WHEN if data == whole_index()[name] else WHEN + 1
        os.utime(folder / name, ns=(when, when))
    found = open_index(folder / INDEX)
    _check(folder, found)
    yield "used"
    found = add_to_index(folder / INDEX, [folder / "new.npy"])
    assert "new.npy" in [file.name for file in found.files]
    _check(folder, found)
    yield "used"


def _check(folder: Path, found: ApproximateIndex) -> None:
    stored = [_stored(folder / file.name) for file in found.files]
    keys = [key for names, _ in stored for key in names]
    features = np.concatenate([each for _, each in stored]).astype(np.float64)
    assert [key for table in found.tables for key in table.keys] == keys
    queries = np.random.default_rng(2).normal(size=(4, WIDTH)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cosines = queries.astype(np.float64) @ features.T
    for k in (FEW, len(keys)):
        scores, rows = found.nearest(queries, k)
        assert np.allclose(scores, np.take_along_axis(cosines, rows, axis=1), atol=1e-5), "other scores"
        assert (np.diff(scores) <= 0).all(), "not the nearest first"
        assert all(len({*each}) == k for each in rows.tolist()), "a row twice"
    best = np.sort(cosines)[:, ::-1]
    assert np.allclose(scores, best, atol=1e-5), "rows are missing"


def _stored(path: Path) -> tuple[list[str], np.ndarray]:
    """Return keys and features of a file."""
    if path.suffix == ".npy":
        return json.loads(path.with_suffix(".keys.json").read_text())["keys"], np.load(path)
    table = pq.read_table(path)
    return table["key"].to_pylist(), np.array(table["feature"].to_pylist())


approximate = Target(index_inputs, read_index)
