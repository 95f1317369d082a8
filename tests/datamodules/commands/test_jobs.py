"""Several processes, jobs with a ``--share`` and resumed runs leave what one process writes, byte for byte."""

import csv
import os
import shlex
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.reading import EncoderBatch
from lit_clip.errors import InputError
from lit_clip.tools.atomic import Share
from tests.conftest import lit_clip_command
from tests.helpers import forks
from tests.helpers.encoding import watch_encoding
from tests.helpers.fork_ranks import command_of_ranks

MODEL = "--batch_size 2 --num_workers 0 --accelerator cpu --model"
COMMANDS = {
    "embed": f"embed captions.csv {MODEL} tiny.ckpt --output {{}}.parquet",
    "score": f"score captions.csv {MODEL} tiny.ckpt --output {{}}.parquet --fraction 0.5 --on_error skip",
    "inspect": "inspect captions.csv --num_workers 0 --output {}.html",
    "shard": "shard captions.csv {} --shard_size 2 --num_workers 0 --on_error skip",
}
ENCODING = {
    "embed": COMMANDS["embed"],
    "captions": f"embed captions.csv --fields caption {MODEL} tiny.ckpt --output {{}}.npy",
    "things": f"embed captions.csv --fields image,caption {MODEL} tiny.ckpt --output {{}}.parquet",
    "score": COMMANDS["score"],
    "mine": f"mine captions.csv {MODEL} tiny.ckpt --output {{}}.jsonl",
}
BROKEN = 5  # a row; not of the data that embed reads, whose skipped images have a file of their own

# Ends the process as a lost machine does: after its first finished part, in the middle of the second.
KILLED = """
import os, signal, sys
from lit_clip.cli.main import main
from lit_clip.datamodules.inspection import scan
from lit_clip.datamodules.shards import writing
from lit_clip.embedding import parts

def last_word(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def first_part(self, *arguments):
    add(self, *arguments)
    parts.Parts.add = last_word

add, parts.SECONDS_BETWEEN_PARTS, scan.CHUNK = parts.Parts.add, -1, 2
parts.Parts.add = first_part
write = writing.ShardWriter._write
writing.ShardWriter._write = lambda self, path, number, sizes: (
    write(self, path, number, sizes) if number < 2 else last_word(write(self, path, number, sizes))
)
main()
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a table of 13 noise images, one of which cannot be read, and a model."""
    noise = np.random.default_rng(0)
    rows = [(f"{number}.png", f"noise, number {number}") for number in range(13)]
    for name, _ in rows:
        Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    (tmp_path / "tiny.ckpt").symlink_to(tiny_checkpoint)
    (tmp_path / "killed.py").write_text(KILLED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datamodules.inspection.scan.CHUNK", 2)
    return tmp_path


def words(command: str, output: str, *more: str) -> list[str]:
    return [*shlex.split({**COMMANDS, **ENCODING}[command].format(output)), *more]


def content(command: str, output: str) -> dict[str, bytes]:
    """Return the visible files that a command has written, by what follows the output's name."""
    found = [path for path in Path.cwd().rglob(f"{output}*") if path.is_file()] + [*Path(output).glob("[!.]*")]
    times = ".tar.index"  # an index names the time of its shard
    return {
        str(path).rpartition(output)[2]: path.read_bytes().replace(output.encode(), b"NAME")
        for path in found
        if times not in path.name
    }


def program(command: list[str], function: str = "killed.py", **environment: str) -> forks.Program:
    return forks.Program(forks.script, [function, *command], Path.cwd(), {**os.environ, **environment})


@pytest.mark.parametrize("command", ENCODING)
def test_an_interrupted_run_resumes_with_what_is_not_encoded(
    command: str, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command(words(command, "whole"))
    every = list(encoded)
    encoded.clear()

    def stopped(task: EncodingTask, batch: EncoderBatch) -> None:
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.extend(batch.rows)

    watch_encoding(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        run_command(words(command, "jobs"))
    assert not content(command, "jobs")
    watch_encoding(monkeypatch, lambda task, batch: encoded.extend(batch.rows))
    run_command(words(command, "jobs"))
    assert encoded == every
    assert content(command, "jobs") == content(command, "whole")
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("command", "batch_size"),
    [("embed", 2), ("captions", 64), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("score", "mine"))],
)  # several batches for two ranks, or a single one
def test_two_ranks_leave_the_bytes_of_one(command: str, batch_size: int, folder: Path) -> None:
    more = ["--batch_size", str(batch_size)]
    run_command(words(command, "whole", *more))
    two = words(command, "jobs", *more, "--devices", "2", "--num_workers", "1")
    result = lit_clip_command(folder, *two, function=partial(command_of_ranks, 2, forks.command_with_progress))
    assert result.returncode == 0, result.stderr
    assert batch_size == 64 or "process 1 of 2" in result.stderr  # a single batch is done before there is progress
    assert result.stdout == ""
    assert content(command, "jobs") == content(command, "whole")
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_job_and_its_successor_leave_the_bytes_of_one_process(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command != "embed":
        (folder / f"{BROKEN}.png").write_text("junk")
    run_command(words(command, "whole"))
    second = words(command, "jobs", "--share", "2/2")
    (killed,) = forks.run([program(second)], 60)
    assert killed.returncode == -9
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".npz", ".tar")}
    assert any("jobs" in str(path) for path in before)
    for share in ("1/2", "2/2"):
        run_command(words(command, "jobs", "--share", share))
        assert f"share {share} is finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was finished is kept
    run_command(words(command, "jobs"))
    assert content(command, "jobs") == content(command, "whole")
    assert len(content(command, "jobs")) >= 1
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_a_job_that_is_never_started_again_is_made_up_for(folder: Path) -> None:
    run_command(words("score", "whole"))
    (killed, other) = forks.run([program(words("score", "jobs", "--share", f"{job}/3")) for job in (1, 2)], 60)
    assert (killed.returncode, other.returncode) == (-9, -9)
    run_command(words("score", "jobs"))
    assert content("score", "jobs") == content("score", "whole")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are encoded from here on."""
    rows: list[int] = []
    watch_encoding(monkeypatch, lambda task, batch: rows.extend(batch.rows))
    return rows


def test_each_batch_is_in_one_share(folder: Path, encoded: list[int]) -> None:
    of_jobs = []
    for job in (1, 2, 3):
        run_command(words("score", "jobs", "--share", f"{job}/3"))
        of_jobs.append(list(encoded))
        encoded.clear()
    assert of_jobs == [[0, 1, 6, 7, 12], [2, 3, 8, 9], [4, 5, 10, 11]]
    run_command(words("score", "jobs"))
    assert encoded == []


@pytest.mark.parametrize(
    "finished", [pytest.param(1, marks=pytest.mark.slow), 2]
)  # of two shares; the other is scored by both machines
def test_the_processes_of_two_machines_join_what_jobs_have_left(folder: Path, finished: int) -> None:
    """With the variables that ``torchrun --nnodes 2 --nproc_per_node 1`` sets."""
    run_command(words("score", "whole"))
    for job in range(finished):
        run_command(words("score", "jobs", "--share", f"{job + 1}/2"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "test"}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}
    first = 'import os\nimport time\nos.environ["LOCAL_RANK"] = "0"\n'  # of its machine's processes
    late = 'time.sleep(2 * int(os.environ["RANK"]))\n'  # the first could write and remove the parts meanwhile
    (folder / "command.py").write_text(f"{first}{late}from lit_clip.cli.main import main\nmain()\n")
    run = partial(program, words("score", "jobs"), "command.py")
    done = forks.run([run(**place, RANK=rank, GROUP_RANK=rank) for rank in "01"], 100)
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert ["13 pairs" in each.stderr for each in done] == [True, False]  # the first alone writes
    assert content("score", "jobs") == content("score", "whole")


@pytest.mark.parametrize("share", ["3", "0/2", "3/2", "-1/2", "a/b", "1/0"])
def test_a_share_that_is_none_is_one_line(share: str) -> None:
    with pytest.raises(InputError, match=rf"--share {share}: must be i/n with i from 1 to n"):
        Share.typed(share)


def test_joining_waits_for_no_job_that_still_runs(folder: Path) -> None:
    """What runs as one would remove is refused while another process writes a share."""
    from filelock import FileLock

    for command, lock in (("score", ".jobs.parquet-1-of-2.lock"), ("shard", ".jobs-1-of-2.lock")):
        run_command(words(command, "jobs", "--share", "2/2"))
        with FileLock(lock), pytest.raises(InputError, match="another process writes there"):
            run_command(words(command, "jobs"))
