"""An approximate index of files of features: what it finds, how it grows, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lit_clip.approximate import add_to_index, open_index
from lit_clip.approximate.approximate_index import in_view
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.feature_files import read_features, write_features
from lit_clip.errors import InputError

pytest.importorskip("usearch", reason="the extra index is not installed")
N, D = 700, 16
MODEL = {"model": "m.ckpt", "model_sha256": "its fingerprint"}


def unit(rows: int, seed: int, width: int = D) -> np.ndarray:
    features = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def write(path: Path, rows: int = N, seed: int = 0, width: int = D, **metadata: str) -> Path:
    keys = [f"{path.stem}{row}.png" for row in range(rows)]
    write_features(path, keys, unit(rows, seed, width), {**MODEL, **metadata})
    return path


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of one file, ``a.npy``."""
    add_to_index(tmp_path / "all.usearch", [write(tmp_path / "a.npy")])
    return tmp_path / "all.usearch"


def test_rows_of_all_files_are_found_with_their_cosines_as_by_a_plain_loop_in_float64(index: Path) -> None:
    before = open_index(index)
    add_to_index(index, [index.with_name("a.npy"), write(index.with_name("b.parquet"), 100, 1)])
    add_to_index(index, [write(index.with_name("c.npy"), 50, 2)])
    queries = unit(300, 3)  # more than are answered at once
    features = np.concatenate([unit(N, 0), unit(100, 1), unit(50, 2)])
    cosines = queries.astype(np.float64) @ features.T.astype(np.float64)
    found = open_index(index)
    assert (len(before), len(found)) == (N, N + 150)
    scores, rows = found.nearest(queries, 10)
    assert np.allclose(scores, np.take_along_axis(cosines, rows, axis=1), atol=1e-6)
    assert (np.diff(scores) <= 0).all()
    expected = np.argsort(-cosines, axis=1)[:, :10]
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows, expected, strict=True)])
    assert recall > 0.98
    assert found.recall(queries, 10) == pytest.approx(recall)
    assert np.array_equal(found.nearest(queries[:1], 10)[1][0], rows[0])


def test_more_than_a_million_rows_are_searched_more_widely() -> None:
    assert [in_view(rows) for rows in (10, 1_000_000, 2_000_000, 4_000_000, 10**9)] == [128, 128, 256, 512, 512]


@pytest.mark.parametrize(("rows", "k"), [(1, 3), (5, 5), (300, 1000)])
def test_as_many_rows_are_found_as_are_asked_for_also_among_copies_of_one_image(
    tmp_path: Path, rows: int, k: int
) -> None:
    features = np.concatenate([unit(1, 0).repeat(rows, axis=0), unit(rows, 1)])
    write_features(tmp_path / "a.npy", [f"{row}.png" for row in range(2 * rows)], features, MODEL)
    _, found = add_to_index(tmp_path / "all.usearch", [tmp_path / "a.npy"]).nearest(unit(2, 2), k)
    assert [len({*each}) for each in found] == [min(k, 2 * rows)] * 2


def test_a_copied_index_is_opened_and_one_of_changed_features_is_not(index: Path) -> None:
    copies = shutil.copytree(index.parent, index.parent / "copies", copy_function=shutil.copyfile)  # other times
    assert len(open_index(copies / index.name)) == N
    write(index.with_name("a.npy"), seed=5)
    with pytest.raises(InputError, match=r"all\.usearch: is not of the features in .*a\.npy, which has changed; wait"):
        open_index(index)
    with pytest.raises(InputError, match=r"all\.usearch: is not of"):
        add_to_index(index, [write(index.with_name("b.npy"))])
    index.with_name("a.keys.json").unlink()
    with pytest.raises(InputError, match=r"all\.usearch: a\.keys\.json with features that it has is gone; .* build"):
        open_index(index)
    with pytest.raises(InputError, match=r"c\.npy: there is no such file"):
        add_to_index(index.with_name("other.usearch"), [index.with_name("c.npy")])


def test_features_that_changed_unseen_are_an_error_when_they_are_found(index: Path) -> None:
    path = index.with_name("a.npy")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    np.save(path, unit(N, 5))
    os.utime(path, ns=times)
    with pytest.raises(InputError, match=r"usearch: is not of the features beside it \(a\.npy, \.\.\.\)"):
        open_index(index).nearest(unit(1, 3), 3)


@pytest.mark.parametrize("other", [{"width": 8}, {"model_sha256": "of another"}, {"rows": 0}])
def test_features_of_another_model_are_not_added(index: Path, other: dict[str, int | str]) -> None:
    before = index.read_bytes()
    with pytest.raises(InputError, match=r"b\.npy: (features of another model than .*a\.npy|no features in it)"):
        add_to_index(index, [write(index.with_name("b.npy"), **other)])  # pyright: ignore[reportArgumentType]
    assert index.read_bytes() == before


def test_an_index_of_files_in_another_folder_is_refused(index: Path) -> None:
    index.with_name("deep").mkdir()
    with pytest.raises(InputError, match=r"--output .*all\.usearch: must be in the folder of .*b\.npy"):
        add_to_index(index, [write(index.parent / "deep" / "b.npy")])


def test_the_features_are_not_read_before_they_are_needed(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_clip.tools.hashing.file_digest", None)
    path = index.with_name("a.npy")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    np.save(path, 0 * unit(N, 0))
    os.utime(path, ns=times)
    assert isinstance(open_index(index).tables[0].features, np.memmap)
    with pytest.raises(InputError, match=r"a\.npy: row 0 .*: its features have length 0, not 1"):
        read_features(path)


def test_a_graph_that_is_cut_off_or_of_other_rows_is_one_line_that_says_what_to_do(index: Path) -> None:
    whole = index.read_bytes()
    for content in (b"", b"no index", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        index.unlink()
        index.write_bytes(content)
        with pytest.raises(InputError, match=r"all\.usearch: .*; wait if .* or else build another index"):
            open_index(index)
    add_to_index(index.with_name("few.usearch"), [write(index.with_name("b.npy"), 20)])
    index.unlink()
    index.with_name("few.usearch").rename(index)
    with pytest.raises(InputError, match=rf"all\.usearch: is not of {N} rows of {D} numbers"):
        open_index(index)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({"name": name}, "a file beside the index") for name in ("../a.npy", "/etc/a.npy", "", ".", "..", "\0.npy")),
        ({"name": 700}, r"str.*files\[0\]\.name.*build another"),
        ({"stamps": [[0.5]]}, r"int.*files\[0\]\.stamps"),
        ({"sha256": None, "stamps": None}, "array.*files"),
    ],
)
def test_a_list_of_files_is_not_trusted(index: Path, values: dict[str, object], message: str) -> None:
    facts = index.with_name("all.usearch.json")
    listed = json.loads(facts.read_text())
    listed["files"][0] |= values
    facts.write_text(json.dumps(listed))
    with pytest.raises(InputError, match=rf"all\.usearch\.json: .*{message}"):
        open_index(index)


def test_an_index_without_its_list_of_files_or_of_another_version_is_refused(index: Path) -> None:
    facts = index.with_name("all.usearch.json")
    facts.write_text(json.dumps({"format": "lit-clip index 9", "files": [{}]}))
    with pytest.raises(InputError, match=r"all\.usearch\.json: .*lit-clip index 9.* build another"):
        open_index(index)
    facts.unlink()
    with pytest.raises(InputError, match=r"all\.usearch\.json: there is no such file"):
        open_index(index)


# The files are those of usearch and faiss: both libraries open them and find the same rows.


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
        (["--output", "{}/all.usearch", "--exact"], "--exact: is for a .faiss file"),
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
    with pytest.raises(InputError, match=f"needs {package}: pip install"):
        run_command(["index", *files, "--output", str(tmp_path / f"all.{output}")])
