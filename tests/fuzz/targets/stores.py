"""Files that hold many samples: saved data sets, tar shards and their indexes."""

import io
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow as pa
from hypothesis import strategies as st

from datamodules.open_source import open_source
from datamodules.pairs.source import ShardOptions
from datamodules.shards.index import INDEX_SUFFIX
from lit_clip.errors import InputError
from tests.fuzz.inputs import Edit, Input, Inputs, Target, damaged, edited, edited_json, edits
from tests.fuzz.samples import CAPTIONS, shard_members, table_images, tar, whole_tables
from tests.fuzz.targets.pairs import (
    odd_tables,
    on_error,
    read_file_of_pairs,
    read_pairs,
    whole_parquet,
    write_table_images,
)

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
