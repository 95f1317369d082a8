"""Indexes of tar shards: keys, truncated and damaged tars and indexes, and when an index is used or made again."""

import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datamodules.pairs.source import ShardOptions
from datamodules.shards.index import INDEX_SUFFIX, split_name
from datamodules.shards.pairs import TarPairs
from lit_clip.errors import BadSample, InputError
from tests.helpers.damage import Damage, pipe, scattered
from tests.helpers.tar_shards import numbered, shade_of, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for fetched shards and cached indexes, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lit-clip" / "shards"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000.jpg", ("000", "jpg")),
        ("./a/000.JPG", ("a/000", "jpg")),
        ("a.b/000.captions.json", ("a.b/000", "captions.json")),
        ("a/.hidden.jpg", ("", "")),
        ("._000.jpg", ("", "")),
        ("README", ("", "")),
    ],
)
def test_key_ends_at_the_first_dot_of_the_file_name(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize("cut", [1, 512, 1000, 1536, 2048, 5000, 7000, 9000, -10240])
def test_truncated_tar_keeps_the_samples_before_the_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(5))
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    expected = sum(end <= len(whole) for end in ends) // 2
    with pytest.raises(InputError, match=r"x\.tar: is (truncated|not a tar)"):
        TarPairs(str(path))
    if expected == 0:
        with pytest.raises(InputError, match="no usable sample"):
            TarPairs(str(path), on_error="skip")
        return
    source = TarPairs(str(path), on_error="skip")
    assert [source.captions(index) for index in range(len(source))] == [[f"number {i}"] for i in range(expected)]
    assert source.left_out.counts["damaged shard"] == 1


@pytest.mark.parametrize("cut", [-9728, -513])
def test_tar_without_all_its_padding_is_complete(tmp_path: Path, cut: int) -> None:
    write_tar(tmp_path / "x.tar", numbered(5))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:cut])
    assert len(TarPairs(str(tmp_path))) == 5


def test_overwritten_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(5))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[4].offset
    content[start : start + 512] = random.Random(0).randbytes(512)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.tar: is truncated or damaged at byte {start}"):
        TarPairs(str(path))
    assert len(TarPairs(str(path), on_error="skip")) == 2


def test_damaged_tars_only_give_input_errors_or_samples(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "x.tar"
    write_tar(path, numbered(4), tarfile.PAX_FORMAT)
    good = path.read_bytes()
    for _ in range(60):
        content = bytearray(good)
        for _ in range(rng.choice([1, 4, 64])):
            block = rng.randrange(0, len(good) // 512) * 512
            content[block + rng.randrange(160)] = rng.randrange(256)  # names, sizes and checksums of headers
        path.write_bytes(content[: rng.randrange(1, len(good) + 1)] if rng.random() < 0.3 else content)
        os.utime(path, ns=(rng.getrandbits(60),) * 2)
        try:
            source = TarPairs(str(path), on_error="skip")
        except InputError:
            continue
        for index in range(len(source)):
            try:
                assert source.load(index, None).caption
            except BadSample:
                continue


def test_indexed_shard_is_opened_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(4))
    first = TarPairs(str(path))
    assert Path(f"{path}{INDEX_SUFFIX}").exists()
    times = path.stat().st_mtime_ns
    path.write_bytes(bytes(path.stat().st_size))  # zeros, no samples
    os.utime(path, ns=(times, times))
    assert TarPairs(str(path)).sizes == first.sizes == [4]


def test_changed_shard_is_indexed_again(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(4))
    assert len(TarPairs(str(path))) == 4
    write_tar(path, numbered(6))
    assert len(TarPairs(str(path))) == 6
    Path(f"{path}{INDEX_SUFFIX}").write_bytes(b"ARROW1 no index")
    assert len(TarPairs(str(path))) == 6


def test_index_is_cached_where_the_shards_folder_is_not_writable(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.tar"
    samples = numbered(4)
    del samples[2][1]["txt"]
    write_tar(path, samples)
    Path(f"{path}{INDEX_SUFFIX}").mkdir()  # stands for a read-only folder, which root could write to
    for _ in range(2):
        source = TarPairs(str(path), on_error="skip")
        assert (len(source), source.left_out.counts) == (3, {"missing caption": 1})  # once, though written twice
        (made,) = cache.glob(f"*{INDEX_SUFFIX}")
        before = made.stat().st_mtime_ns
    assert made.stat().st_mtime_ns == before


SAMPLES = 12


def pairs(path: Path) -> dict[str, int]:
    source = TarPairs(str(path), ShardOptions(index_workers=0), on_error="skip")
    assert not source.left_out.counts
    loaded = [source.load(index, None) for index in range(len(source))]
    return {pair.caption: shade_of(pair) for pair in loaded}


def rewritten(column: str, change: Callable[[np.ndarray], object]) -> Damage:
    def damage(path: Path) -> None:
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, pa.array(change(table[column].to_numpy())))
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)

    return damage


def described(**metadata: str) -> Damage:
    def damage(path: Path) -> None:
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)

    return damage


DAMAGES = {
    "images permuted": rewritten("image_offset", lambda values: np.roll(values, 1)),
    "offsets of other files": rewritten("image_offset", lambda values: values + 512),
    "offset within the header": rewritten("image_offset", lambda values: 0 * values),
    "offset beyond the shard": rewritten("image_offset", lambda values: values + 2**60),
    "huge sizes": rewritten("image_size", lambda values: values + 2**50),
    "negative sizes": rewritten("image_size", lambda values: -values),
    "no numbers": rewritten("image_size", lambda values: [None] * len(values)),
    "fractions": rewritten("image_size", lambda values: values * 1.0),
    "more samples": described(samples="1000"),
    "fewer samples": described(samples="-1"),
    "a number of 5,000 digits": described(samples="9" * 5000),
    "problems of another type": described(problems='{"a": 5}'),
    "problems nested deeply": described(problems="[" * 100_000),
    "empty": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pipe": pipe,
    **{f"random {seed}": scattered(seed) for seed in range(40)},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_index_is_made_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(SAMPLES))
    whole = pairs(path)
    assert whole == {f"number {number}": number for number in range(SAMPLES)}
    DAMAGES[name](Path(f"{path}{INDEX_SUFFIX}"))
    assert pairs(path) == whole
    assert pairs(path) == whole
