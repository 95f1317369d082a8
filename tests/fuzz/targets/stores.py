"""Files that hold many samples: saved data sets, tar shards, features, their indexes, and stored rows."""

import io
import json
import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from hypothesis import strategies as st

from datamodules.open_source import open_source
from datamodules.shards.index import INDEX_SUFFIX
from datamodules.shards.pairs import ShardOptions
from lit_clip.embedding.feature_files import FeatureTable, read_features, write_features
from lit_clip.errors import InputError
from lit_clip.tools.stored_rows import StoredRows
from tests.fuzz.inputs import CANARY, Edit, Input, Inputs, damaged, edited, edited_json, edits
from tests.fuzz.samples import CAPTIONS, shard_members, table_images, tar, whole_tables
from tests.fuzz.target import Target
from tests.fuzz.targets.pairs import (
    odd_tables,
    on_error,
    read_file_of_pairs,
    read_pairs,
    to_parquet,
    whole_parquet,
    write_table_images,
)

MODEL = "a model's fingerprint"
WHEN = 1_700_000_000 * 10**9  # modification time of the shard, which its index names


def to_stream(table: pa.Table) -> bytes:
    """Return the bytes of an Arrow stream, as `datasets` writes them."""
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file.getvalue()


@cache
def whole_saved() -> dict[str, bytes]:
    """Return the files of a saved data set."""
    images = pa.array([{"bytes": data, "path": name} for name, data in table_images().items()])
    short = [text[:100] for text in CAPTIONS]
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "a", "_split": "train"}
    return {
        "data.arrow": to_stream(pa.table({"image": images, "captions": [[text, "b"] for text in short]})),
        "state.json": json.dumps({**state, "_indices_data_files": None, "_format_type": None}).encode(),
        "dataset_dict.json": json.dumps({"splits": ["train", "test"]}).encode(),
    }


def saved_inputs() -> Inputs:
    trees = {name: json.loads(data) for name, data in whole_saved().items() if name.endswith(".json")}
    odd = odd_tables().map(lambda table: Input("data.arrow", to_stream(table)))
    arrow = {"data.arrow": whole_saved()["data.arrow"], "state.json": whole_saved()["state.json"]}
    return st.one_of(damaged(lambda: arrow), damaged(lambda: arrow), odd, edited_json(lambda: trees))


def read_saved(folder: Path, given: Input) -> Iterator[str]:
    """Read a saved data set of which one file is replaced."""
    top = folder / "set"
    part = top / "train" if given.name == "dataset_dict.json" else top
    part.mkdir(parents=True)
    write_table_images(part)
    for name in ("data.arrow", "state.json"):
        (part / name).write_bytes(whole_saved()[name])
    (top / given.name).write_bytes(given.data)
    yield from read_pairs(open_source(top, on_error=on_error(given)))


@cache
def whole_tars() -> dict[str, bytes]:
    """Return a shard, as tar and compressed."""
    return {
        "t.tar": tar(shard_members()),
        "t.tar.gz": tar(shard_members()[:6], "w:gz"),
        "small.tar": tar(shard_members()[:6]),
    }


def _odd_tar(members: list[tuple[str, bytes, bytes, str]], pax: bool) -> Input:
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as archive:
        for name, data, kind, value in members:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, "00000.jpg"
            member.pax_headers = {"path": name or "x", "size": value, "GNU.sparse.size": value} if pax and value else {}
            archive.addfile(member, io.BytesIO(data))
    return Input("odd.tar", file.getvalue())


def _odd_header(number: int, field: tuple[int, int], value: bytes) -> Input:
    """Write over a field of a header, and correct the header's sum."""
    data = bytearray(whole_tars()["small.tar"])
    headers = [start for start in range(0, len(data), 512) if data[start + 257 : start + 262] == b"ustar"]
    start, (first, length) = headers[number % len(headers)], field
    data[start + first : start + first + length] = value[:length].ljust(length, b"\0")
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return Input("header.tar", bytes(data))


def tar_inputs() -> Inputs:
    contents = st.sampled_from(
        [data for _, data in shard_members()[:3]] + [b"", b"\xff\xfe", b"[", b'{"caption": 1}', b" "]
    )
    keys = st.one_of(
        st.sampled_from(("0", "a/b", "../x", "/etc/x", ".hidden", "é", "a b", "\x1b[31m", "x" * 300)),
        st.text(max_size=4),
    )
    ends = st.sampled_from(("jpg", "txt", "json", "captions.json", "png", "JPG", "cls", "a.jpg", ""))
    names = st.tuples(keys, ends).map(".".join).map(lambda name: name.replace("\0", ""))
    kinds = st.sampled_from((b"0", b"0", b"0", b"0", b"1", b"2", b"5", b"6", b"S", b"L", b"x", b"g", b"9"))
    values = st.sampled_from(("", "", "0", "-1", "99999999999999", "nan"))
    odd = st.builds(_odd_tar, st.lists(st.tuples(names, contents, kinds, values), max_size=6), st.booleans())
    fields = st.sampled_from(((0, 100), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)))
    binary = st.one_of(
        st.binary(max_size=12), st.sampled_from((b"77777777777", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12))
    )
    headers = st.builds(_odd_header, st.integers(0, 5), fields, binary)
    return st.one_of(damaged(whole_tars), odd, headers)


def read_shard(folder: Path, given: Input) -> Iterator[str]:
    """Read a tar shard."""
    path = folder / given.name
    path.write_bytes(given.data)
    options = ShardOptions(cache_folder=str(folder / "cache"), index_workers=0)
    yield from read_pairs(open_source(path, on_error=on_error(given), shards=options))


@cache
def _shard() -> bytes:
    return tar(shard_members()[:15])  # five samples, none of them blank


@cache
def _captions_of_keys() -> dict[str, str]:
    return {name.partition(".")[0]: data.decode() for name, data in shard_members() if name.endswith(".txt")}


def _write_shard(path: Path) -> None:
    path.write_bytes(_shard())
    os.utime(path, ns=(WHEN, WHEN))


@cache
def whole_index() -> bytes:
    """Return the index of the shard."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.tar")
        _write_shard(path)
        open_source(path, on_error="skip", shards=ShardOptions(cache_folder=folder, index_workers=0))
        return Path(f"{path}{INDEX_SUFFIX}").read_bytes()


def _odd_index(changes: list[Edit], order: list[int], name: str) -> Input:
    """Return an index whose columns and metadata were changed, and whose spans were put in another order."""
    table = pa.ipc.open_file(pa.BufferReader(whole_index())).read_all()
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    columns = {key: table[key].to_pylist() for key in table.column_names}
    rows = [number % table.num_rows for number in order][: table.num_rows]
    rows += list(range(len(rows), table.num_rows))
    if name in columns:
        columns[name] = [columns[name][row] for row in rows]
    tree = edited({"columns": columns, "metadata": metadata}, changes)
    try:
        made = pa.table({str(key): pa.array(values) for key, values in tree["columns"].items()})
        notes = {
            str(key): value if isinstance(value, str) else json.dumps(value) for key, value in tree["metadata"].items()
        }
        table = made.replace_schema_metadata(notes)
    except (pa.ArrowException, TypeError, KeyError, AttributeError, OverflowError, UnicodeError):  # no table at all
        pass
    file = io.BytesIO()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return Input("t.tar.index.arrow", file.getvalue())


def index_inputs() -> Inputs:
    names = st.sampled_from(("", "", "", "text_offset", "image_offset", "text_size", "key"))
    odd = st.builds(_odd_index, edits(), st.lists(st.integers(0, 20), max_size=8), names)
    return st.one_of(damaged(lambda: {"t.tar.index.arrow": whole_index()}), odd)


def read_with_index(folder: Path, given: Input) -> Iterator[str]:
    """Read a shard beside which a damaged index lies; its pairs must be those of the shard."""
    path = folder / "t.tar"
    _write_shard(path)
    Path(f"{path}{INDEX_SUFFIX}").write_bytes(given.data)
    options = ShardOptions(cache_folder=str(folder / "cache"), index_workers=0)
    try:
        source = open_source(path, shards=options)
        pairs = [source.load(index, None) for index in range(len(source))]
    except InputError as error:
        raise AssertionError(f"refused for its index: {error}") from error
    truth = _captions_of_keys()
    for pair in pairs:
        key = pair.key.rpartition("/")[2]
        assert truth.get(key) == pair.caption, f"{pair.key} has the caption {pair.caption[:50]!r}"
        yield "used"
    assert len(pairs) == 5, f"{len(pairs)} pairs"


@cache
def _features() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@cache
def whole_features() -> dict[str, bytes]:
    """Return feature files as `lit-clip embed` writes them."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metadata = {"model": "m", "model_sha256": "0" * 64, "content": "images"}
        for suffix in (".parquet", ".npy"):
            write_features(folder / f"f{suffix}", [f"{row}.png" for row in range(6)], _features(), metadata, ["a"] * 6)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _odd_features(table: pa.Table) -> Input:
    names = ["key", "feature", "caption"][: table.num_columns]
    table = table.select(list(range(len(names))))
    return Input("f.parquet", to_parquet(table.rename_columns(names)))


def feature_inputs() -> Inputs:
    keys = {"f.keys.json": json.loads(whole_features()["f.keys.json"])}
    return st.one_of(damaged(whole_features), edited_json(lambda: keys), odd_tables().map(_odd_features))


def read_feature_file(folder: Path, given: Input) -> Iterator[str]:
    """Read a feature file."""
    for name, data in whole_features().items():
        (folder / name).write_bytes(data)
    (folder / given.name).write_bytes(given.data)
    stored = read_features(folder / ("f.parquet" if given.name == "f.parquet" else "f.npy"))
    assert stored.features.dtype == np.float32
    assert stored.features.shape == (len(stored.keys), stored.features.shape[1])
    assert np.isfinite(stored.features).all(), "features that are not finite"
    assert all(isinstance(key, str) for key in stored.keys), "keys that are no texts"
    yield "used"


@cache
def whole_feature_index() -> bytes:
    """Return an index of a folder's images."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.npz")
        FeatureTable([(f"{row}.png", 100 + row, WHEN + row) for row in range(6)], _features()).save(path, MODEL)
        return path.read_bytes()


def _odd_arrays(changes: list[Edit], scale: float) -> Input:
    with np.load(io.BytesIO(whole_feature_index())) as file:
        arrays = {name: file[name] for name in file.files}
    tree: dict[str, Any] = {name: array.tolist() for name, array in arrays.items() if name != "keys"}
    tree["keys"] = json.loads(arrays["keys"].tobytes())
    tree = edited(tree, changes)
    for name, value in tree.items() if isinstance(tree, dict) else ():
        try:
            made = np.frombuffer(json.dumps(value).encode(), np.uint8) if name == "keys" else np.array(value)
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
    table = FeatureTable.load(path, MODEL)
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
def whole_stored_rows() -> dict[str, bytes]:
    """Return the files of stored rows; the last row cannot be computed, and another is absent."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        stored = StoredRows.create(Path(name, "rows"), 8, (8,), torch.float32)
        stored.write(np.arange(6), torch.from_numpy(_features()))
        stored.refuse([7])
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


@cache
def whole_sources() -> dict[str, bytes]:
    """Return a table of each format and a shard."""
    return {**whole_tables(), **whole_parquet(), **whole_tars()}


def read_source(folder: Path, given: Input) -> Iterator[str]:
    """Read a table or a shard."""
    yield from (read_shard if ".tar" in given.name else read_file_of_pairs)(folder, given)


sources = Target(lambda: damaged(whole_sources), read_source)  # for the tests of bad samples; the others have more
saved = Target(saved_inputs, read_saved)
tars = Target(tar_inputs, read_shard)
shard_index = Target(index_inputs, read_with_index)
feature_files = Target(feature_inputs, read_feature_file)
feature_index = Target(feature_index_inputs, read_feature_index)
stored_rows = Target(stored_row_inputs, read_stored_rows)
