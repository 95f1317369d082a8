"""Files of features: damaged ones are made again or are one line; exact search in an index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_clip.embedding import index
from lit_clip.embedding.feature_files import FeatureTable, read_features, write_features
from lit_clip.embedding.index import nearest, nearest_others
from lit_clip.embedding.parts import load_arrays, save_arrays
from lit_clip.errors import InputError
from tests.helpers.damage import pipe

N, D = 9, 4
IDENTITIES = [(f"{number}.png", number, 10 * number) for number in range(N)]


def features() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def changed(**changes: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with np.load(path) as file:
            columns = dict(file)
        for name, function in changes.items():
            columns[name] = np.asarray(function(columns[name]))
        with path.open("wb") as file:
            np.savez(file, **columns)

    return change


def encoded(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        changed(features=lambda rows: rows * np.nan),
        changed(features=lambda rows: rows[::-1]),
        changed(features=lambda rows: 3 * rows),
        changed(features=lambda rows: rows[:, :2]),
        changed(features=lambda rows: rows.astype(np.float64)),
        changed(identities=lambda array: encoded(json.loads(array.tobytes())[::-1])),
        changed(identities=lambda _: encoded(list(range(N)))),
        changed(identities=lambda _: encoded([(key, size, time + 1) for key, size, time in IDENTITIES])),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        pipe,
    ],
)
def test_table_that_was_changed_in_any_way_is_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "index.npz"
    save_arrays(path, "model", FeatureTable(IDENTITIES, features()).arrays())
    whole = load_arrays(path, "model", FeatureTable.of)
    assert whole is not None
    assert np.array_equal(whole.features, features())
    assert whole.identities == IDENTITIES
    assert load_arrays(path, "other model", FeatureTable.of) is None
    damage(path)
    assert load_arrays(path, "model", FeatureTable.of) is None


def column(name: str, values: pa.Array) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, values), path)

    return change


def keys(value: object) -> Callable[[Path], object]:
    return lambda path: path.with_suffix(".keys.json").write_text(json.dumps(value))


LISTS = pa.list_(pa.float32(), D)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".npy", lambda path: np.save(path, features() * np.nan), "features are not finite"),
        (".npy", lambda path: np.save(path, 100 * features()), r"row 0 \(0.png\): its features have length 100, not 1"),
        (".npy", lambda path: np.save(path, features() * (np.arange(N) != 4)[:, None]), "row 4 .* have length 0"),
        (".npy", lambda path: np.save(path, 1e30 * features()), "features are not finite"),
        (".npy", lambda path: np.save(path, features()[0]), "not a readable file of features"),
        (".npy", lambda path: path.write_bytes(b""), "not a readable file of features"),
        (".npy", lambda path: path.write_bytes(bytes(999)), "the magic string is not correct"),
        (".npy", pipe, "neither a file nor a folder"),
        (".npy", keys({"keys": list(range(N))}), "keys are not 9 texts"),
        (".npy", keys({"keys": "k" * N}), "keys are not 9 texts"),
        (".npy", keys({"keys": [each[0] for each in IDENTITIES], "captions": 5}), "captions are not 9 texts"),
        (".npy", keys([]), "not a readable list of keys"),
        (".npy", keys({"keys": [], "root": 5}), "its root is no text"),
        (".npy", lambda path: [path.unlink(), path.with_suffix(".keys.json").unlink()], "npy: there is no such file"),
        (".npy", lambda path: path.with_suffix(".keys.json").write_text("[" * 200_000), "nested too deeply"),
        (".parquet", column("key", pa.array([None] * N, pa.string())), "keys are not 9 texts"),
        (".parquet", column("feature", pa.array([[float("nan")] * D] * N, LISTS)), "features are not finite"),
        (".parquet", column("feature", pa.array([[None] * D] * N, LISTS)), "features are not finite"),
        (".parquet", column("feature", pa.array([[5.0] * D] * N, LISTS)), r"row 0 .* have length"),
        (".parquet", column("feature", pa.array([[1.0]] * N)), "its column feature holds"),
        (".parquet", lambda path: path.write_bytes(bytes(999)), "not a readable file of features"),
    ],
)
def test_damaged_file_of_features_is_one_line_that_names_it(
    tmp_path: Path, suffix: str, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / f"features{suffix}"
    write_features(path, [key for key, _, _ in IDENTITIES], features(), {"model": "m"})
    assert np.array_equal(read_features(path).features, features())
    damage(path)
    with pytest.raises(InputError, match=f"features[.].*{message}"):
        read_features(path)


def test_keys_of_other_features_with_as_many_rows_are_refused(tmp_path: Path) -> None:
    """The two files of a ``.npy`` belong together: exchanged with those of another, each row had another's name."""
    names = [key for key, _, _ in IDENTITIES]
    write_features(tmp_path / "a.npy", names, features(), {"model": "m"})
    write_features(tmp_path / "b.npy", names[::-1], -features(), {"model": "m"})
    for one in ("a", "b"):
        (tmp_path / f"{one}.keys.json").rename(tmp_path / f"{one}.json")
    (tmp_path / "a.json").rename(tmp_path / "b.keys.json")
    (tmp_path / "b.json").rename(tmp_path / "a.keys.json")
    for one in ("a", "b"):
        with pytest.raises(InputError, match=rf"{one}\.npy: {one}\.keys\.json is of other features"):
            read_features(tmp_path / f"{one}.npy")


def test_features_of_another_program_without_a_digest_are_read(tmp_path: Path) -> None:
    names = [key for key, _, _ in IDENTITIES]
    np.save(tmp_path / "a.npy", features())
    (tmp_path / "a.keys.json").write_text(json.dumps({"keys": names, "model": "m"}))
    found = read_features(tmp_path / "a.npy")
    assert (found.keys, found.metadata) == (names, {"model": "m"})


@pytest.mark.parametrize("k", [1, 10, 53, 100])
def test_search_in_chunks_equals_a_full_sort(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    random = np.random.default_rng(1)
    features, queries = (random.standard_normal((n, 16)).astype(np.float32) for n in (53, 3))
    monkeypatch.setattr(index, "CHUNK", 7)
    scores, rows = nearest(features, queries, k)
    everything = queries @ features.T
    expected = np.argsort(-everything, axis=1)[:, :k]
    assert np.array_equal(rows, expected)
    assert np.allclose(scores, np.take_along_axis(everything, expected, axis=1), atol=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(600, 32), (257, 40), (2, 32), (1, 3)])
def test_the_nearest_others_are_those_of_a_plain_loop_in_float64(rows: int, k: int) -> None:
    features = np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features.astype(np.float64) @ features.T.astype(np.float64)
    np.fill_diagonal(cosines, -2)
    expected = np.argsort(-cosines, axis=1)[:, : min(k, rows - 1)]
    assert np.array_equal(nearest_others(features, k), expected)
