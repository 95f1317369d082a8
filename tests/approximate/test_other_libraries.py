"""The files are those of usearch and faiss: both libraries open them and find the same rows."""

from pathlib import Path

import numpy as np
import pytest

from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.feature_files import write_features
from lit_clip.errors import InputError


def unit(rows: int, seed: int) -> np.ndarray:
    features = np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files of features, of 300 and 100 rows."""
    for name, rows in (("a.npy", 300), ("b.parquet", 100)):
        write_features(tmp_path / name, [f"{name}{row}" for row in range(rows)], unit(rows, rows), {"model": "m.ckpt"})
    return [str(tmp_path / "a.npy"), str(tmp_path / "b.parquet")]


def expected(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosines = queries.astype(np.float64) @ np.concatenate([unit(300, 300), unit(100, 100)]).T.astype(np.float64)
    rows = np.argsort(-cosines, axis=1)[:, :5]
    return np.take_along_axis(cosines, rows, axis=1), rows


def test_usearch_opens_the_index(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = pytest.importorskip("usearch.index", reason="the extra index is not installed")
    run_command(["index", *files, "--output", str(tmp_path / "all.usearch")])
    said = capsys.readouterr().err
    assert "all.usearch: 400 rows of 2 files; recall@10 of 100 of them: 1.000" in said
    assert f"search them: lit-clip search {tmp_path / 'all.usearch'} TEXT --model m.ckpt" in said
    found = library.Index.restore(tmp_path / "all.usearch").search(unit(20, 1), 5)
    assert np.mean(found.keys == expected(unit(20, 1))[1]) > 0.8  # int8 swaps near ones


@pytest.mark.parametrize(("exact", "kind"), [(["--exact"], "IndexFlat"), ([], "IndexHNSWFlat")])
def test_faiss_opens_its_file_and_finds_the_same_rows(
    files: list[str], tmp_path: Path, exact: list[str], kind: str
) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    run_command(["index", *files, "--output", str(tmp_path / "all.faiss"), *exact])
    index = faiss.read_index(str(tmp_path / "all.faiss"))
    assert type(index).__name__.startswith(kind)
    assert (index.ntotal, index.metric_type) == (400, faiss.METRIC_INNER_PRODUCT)
    scores, rows = index.search(unit(20, 1), 5)
    assert np.array_equal(rows, expected(unit(20, 1))[1])
    assert np.allclose(scores, expected(unit(20, 1))[0], atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--output", "{}/all.usearch", "--exact"],
            "--exact: is for a .faiss file; lit-clip search .* is exact without",
        ),
        (["--output", "{}/all.npz"], "--output .*all.npz: must be a .usearch or .faiss file"),
        (["--output", "{}/gone/all.faiss"], "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(files: list[str], tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_command(["index", *files, *(word.format(tmp_path) for word in words)])


@pytest.mark.parametrize(("package", "output"), [("usearch", "usearch"), ("faiss", "faiss")])
def test_a_package_that_is_not_installed_is_named(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, output: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("lit_clip.approximate.approximate_index.find_spec", lambda name: None)
    monkeypatch.setattr("lit_clip.approximate.faiss_files.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"needs {package}: pip install"):
        run_command(["index", *files, "--output", str(tmp_path / f"all.{output}")])
