"""An index that is damaged, or belongs to other samples, is made again: the pairs are those of the tar."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datamodules.shards.index import INDEX_SUFFIX
from datamodules.shards.pairs import ShardOptions, TarPairs
from tests.helpers.tar_shards import numbered, shade_of, write_tar

SAMPLES = 12
Damage = Callable[[Path], object]


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


def scattered(seed: int) -> Damage:
    def damage(path: Path) -> None:
        rng, content = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(bytes(content))

    return damage


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


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
