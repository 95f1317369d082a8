"""``--print_plan`` of embed, score and shard: its numbers are those of the files that the commands then write."""

import csv
import math
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.work_plan import PlanOptions, Sample, Work, work_rows
from lit_clip.errors import InputError

MODEL = ["--batch_size", "4", "--num_workers", "0", "--accelerator", "cpu", "--model"]
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a table of 22 noise images."""
    noise = np.random.default_rng(0)
    for number in range(22):
        Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{number}.png", "noise") for number in range(22))])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, str]:
    """Return the table that a command prints instead of its work."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    run_command([*map(str, words), "--print_plan"])
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    return {name.strip(): value.strip() for name, value in lines}


def size(text: str) -> float:
    number, unit = re.match(r"([\d.]+) (\w+)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * UNITS[unit]


@pytest.mark.parametrize("command", ["embed", "score"])
def test_a_plan_of_encoding_counts_what_is_read_and_written(
    command: str, folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "captions.csv", *MODEL, tiny_checkpoint, "--output", "out.parquet"]
    plan = planned(capsys, *words)
    assert (plan["rows"], plan["batches"], plan["processes"]) == ("22", "6 of 4 rows", "1")
    assert size(plan["read"]) == pytest.approx(sum(path.stat().st_size for path in folder.glob("*.png")), rel=0.01)
    assert "measured on 18 rows" in plan["speed of a process"]  # all but the first batch
    run_command([*map(str, words), "--share", "1/1"])
    if command == "embed":
        features = pq.read_table("out.parquet")["feature"].nbytes
        assert features < size(plan["written"]) < 2 * features + 22 * 100
    else:
        assert size(plan["written"]) == pytest.approx(Path("out.parquet").stat().st_size, rel=0.6)


def test_a_plan_of_shards_has_the_bytes_of_the_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shard", "captions.csv", "shards", "--shard_size", "8", "--workers", "0"]
    plan = planned(capsys, *words)
    run_command(words)
    padded = 0
    for path in (folder / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            padded += sum(512 + 512 * math.ceil(member.size / 512) for member in tar)
    assert size(plan["written"]) == pytest.approx(padded, rel=0.01)
    assert (plan["shards"], plan["files"]) == ("3 of 8 rows", "6")


def test_a_plan_for_other_rows_and_processes_follows_from_the_sample_by_hand() -> None:
    """400 million rows of which each of 128 processes has 48,829 batches of 64, at 1,000 rows a second."""
    work = Work(500, 1, ("batches", 64), Sample(10, 5.0, 1e4, 2e3), "as parts", None, held=100, joined=1000)
    options = PlanOptions(True, plan_rows=400_000_000, plan_processes=128, plan_speed=1000)
    plan = dict(work_rows(work, options))
    assert plan["rows"] == "400,000,000, by 500 of the data"
    assert plan["processes"] == "128, each with up to 3,125,056 rows"
    assert plan["time"] == "52 minutes"
    assert plan["read"] == "4 TB, 10 kB a row"
    assert plan["written"].startswith("800 GB, 2 kB a row")
    assert plan["files"] == f"{128 * 313:,}"  # one in ten seconds of each process
    assert "about 40 GB for all rows" in plan["memory of a process"]
    assert "about 440 GB for all rows" in plan["memory of the last one"]
    measured = dict(work_rows(work, PlanOptions(True)))
    assert measured["speed of a process"].startswith("2 rows/s, measured on 10 rows")
    assert measured["time"] == "4.2 minutes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlanOptions(True, plan_rows=0), "--plan_rows 0: must be positive"),
        (PlanOptions(plan_speed=5.0), "--plan_speed: belongs to --print_plan"),
    ],
)
def test_numbers_of_no_plan_are_one_line(options: PlanOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options.check()
