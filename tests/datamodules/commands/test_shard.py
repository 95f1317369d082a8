"""``lit-clip shard``: images are copied byte for byte, and complete shards are kept."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.commands.shard import shard
from datamodules.open_source import open_source
from datamodules.shards.index import INDEX_SUFFIX
from datamodules.shards.pairs import TarPairs
from lit_clip.errors import InputError
from tests.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_table_becomes_shards_of_the_same_bytes_and_captions(cli: Run, tmp_path: Path, caption_table: Path) -> None:
    result = cli("shard", str(caption_table), "out", "--shard_size", "20", "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert "out: 64 pairs in 4 shards" in result.stderr
    assert result.stdout == ""
    with caption_table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number in range(4):
        with tarfile.open(tmp_path / f"out/{number:05d}.tar") as tar:
            names = tar.getnames()
            assert names[:3] == [f"{number:05d}0000.{extension}" for extension in ("png", "txt", "json")]
            files = {name: extracted.read() for name in names if (extracted := tar.extractfile(name))}
        for index, row in enumerate(rows[20 * number : 20 * number + 20]):
            key = f"{number:05d}{index:04d}"
            assert files[f"{key}.png"] == (caption_table.parent / row["image"]).read_bytes()
            assert files[f"{key}.txt"].decode() == row["caption"]
            assert json.loads(files[f"{key}.json"]) == {"key": key, "caption": row["caption"], "source": row["image"]}
    shards, table = TarPairs(str(tmp_path / "out")), open_source(str(caption_table))
    assert [shards.captions(index) for index in range(64)] == [table.captions(index) for index in range(64)]
    assert len(list((tmp_path / "out").glob(f"*.tar{INDEX_SUFFIX}"))) == 4


def test_webdataset_reads_the_written_shards(tmp_path: Path, caption_table: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shard(str(caption_table), str(tmp_path / "out"), shard_size=40, workers=0)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    table = open_source(str(caption_table))
    assert [caption for _, caption, _ in samples] == [table.captions(index)[0] for index in range(64)]
    assert samples[63][0].size == table.load(63, None).image.size


def test_complete_shards_are_kept_and_missing_ones_written(tmp_path: Path, caption_table: Path) -> None:
    out = tmp_path / "out"
    shard(str(caption_table), str(out), shard_size=10, workers=0)
    whole = digests(out)
    assert len(whole) == 7
    for number in (1, 4):
        (out / f"{number:05d}.tar").unlink()
    (out / f"00005.tar{INDEX_SUFFIX}").unlink()
    (out / ".00004.tar.part").write_bytes(b"of a killed run")
    before = (out / "00002.tar").stat().st_mtime_ns
    shard(str(caption_table), str(out), shard_size=10, workers=0)
    assert digests(out) == whole
    assert (out / "00002.tar").stat().st_mtime_ns == before
    assert (out / f"00005.tar{INDEX_SUFFIX}").exists()
    assert not list(out.glob(".*.part"))


def test_killed_run_leaves_only_complete_shards_and_continues(tmp_path: Path, caption_table: Path) -> None:
    with caption_table.open(encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    table = tmp_path / "many.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([caption_table.parent / image, caption] for _ in range(40) for image, caption in rows)
    out = tmp_path / "out"
    words = [sys.executable, "-m", "lit_clip", "shard", str(table), str(out), "--shard_size", "100", "--workers", "2"]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(digests(out)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    written = digests(out)
    assert len(written) >= 2
    for name in written:
        with tarfile.open(out / name) as tar:
            assert len(tar.getnames()) == 300
    shard(str(table), str(out), shard_size=100, workers=0)
    assert len(digests(out)) == 26
    assert written.items() <= digests(out).items()
    assert len(TarPairs(str(out))) == 2560


def test_several_captions_and_groups_are_kept(tmp_path: Path, caption_table: Path) -> None:
    with caption_table.open(encoding="utf-8") as file:
        images = [str(caption_table.parent / row["image"]) for row in csv.DictReader(file)][:3]
    records = [
        {"image": images[0], "caption": ["a tiger", "a big cat"], "product": "x"},
        {"image": images[1], "caption": "a pizza\nin two lines", "product": None},
        {"image": images[2], "caption": ["a b\u00edcycle"], "product": 5},
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    shard(str(table), str(tmp_path / "out"), workers=0, group_column="product")
    source = TarPairs(str(tmp_path / "out"), group_column="group")
    assert [source.captions(index) for index in range(3)] == [
        ["a tiger", "a big cat"],
        ["a pizza\nin two lines"],
        ["a b\u00edcycle"],
    ]
    assert [source.read(index).group for index in range(3)] == ["x", "", "5"]


def test_unreadable_pairs_end_the_run_or_are_listed(tmp_path: Path, caption_table: Path) -> None:
    with caption_table.open(encoding="utf-8") as file:
        images = [str(caption_table.parent / row["image"]) for row in csv.DictReader(file)][:5]
    (tmp_path / "cut.png").write_bytes(Path(images[0]).read_bytes()[:-400])
    images[3] = "cut.png"
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"{image},image {i}\n" for i, image in enumerate(images)))
    with pytest.raises(InputError, match=r"table\.csv row 5: cannot read"):
        shard(str(table), str(tmp_path / "out"), shard_size=2, workers=0)
    assert list(digests(tmp_path / "out")) == ["00000.tar"]
    shard(str(table), str(tmp_path / "out"), shard_size=2, workers=0, on_error="skip")
    source = TarPairs(str(tmp_path / "out"))
    assert [source.captions(index)[0] for index in range(4)] == ["image 0", "image 1", "image 2", "image 4"]
    listed = json.loads((tmp_path / "out/00001.skipped.jsonl").read_text())
    assert listed["where"].endswith("table.csv row 5")
    assert [path.name for path in (tmp_path / "out").glob("*.skipped.jsonl")] == ["00001.skipped.jsonl"]


def test_folder_with_other_content_is_refused(tmp_path: Path, caption_table: Path) -> None:
    out = tmp_path / "out"
    shard(str(caption_table), str(out), shard_size=40, workers=0)
    with pytest.raises(
        InputError, match=r"begun with other data \(shard_size 40 then and 50 now\); give an empty folder"
    ):
        shard(str(caption_table), str(out), shard_size=50, workers=0)
    (tmp_path / "others").mkdir()
    (tmp_path / "others/00000.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000\.tar was not written by lit-clip shard"):
        shard(str(caption_table), str(tmp_path / "others"), workers=0)
    with pytest.raises(InputError, match="00000.tar: is a file; give a folder"):
        shard(str(caption_table), str(out / "00000.tar"), workers=0)
    with pytest.raises(InputError, match="--shard_size 0"):
        shard(str(caption_table), str(out), shard_size=0)
