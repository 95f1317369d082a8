"""Commands whose surroundings are at fault work, or end in one line; the table is in docs/evidence/faults.md."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from benchmarks.faults import surroundings
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from lit_clip.tools.messages import user_error
from lit_clip.training.lightning.strategies import watch_started_ranks
from tests.conftest import ROOT, lit_clip_command
from tests.helpers import forks
from tests.helpers.disks import mounted, why_no_disk

EMBED = ["embed", "images", "--model", "tiny.ckpt", "--output", "f.npy", "--num_workers", "0", "--accelerator", "cpu"]
FIT = [
    *["fit", "--data.train", "pairs.csv", "--data.val", "pairs.csv", "--data.batch_size", "4"],
    *["--data.num_workers", "0", "--model.pretrained", "tiny.ckpt", "--trainer.max_steps", "1"],
    *["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"],
]
# One process without the stream runs several commands, each in a fork, because its imports take seconds.
FROM_THE_START = """
import json, os, sys
from lit_clip.cli.main import main
commands = json.loads(sys.argv[1])
for module in ("lit_clip.embedding.encode", "lightning", *["lit_clip.cli.lightning"] * (commands[0][0] == "fit")):
    __import__(module)
sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # transformers has opened the null device
for number, words in enumerate(commands):
    if os.fork() == 0:
        sys.argv = ["lit-clip", *words]
        if sys.stdout is not None:
            file = os.open(f"out_{number}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.close(file)
        sys.exit(main())
    with open(f"code_{number}", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""
EXPORT_UNTIL_IT_FITS = """
import os, subprocess, sys
from lit_clip.cli.subcommands import run_command
from lit_clip.tools.messages import user_error
from tests.helpers.disks import enter
holder, disk, model, format, step = sys.argv[1:]
enter(int(holder))
size = 4
while True:
    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
    try:
        run_command(["export", model, "--format", format, "--output", f"{disk}/out"])
    except Exception as error:
        line = user_error(error)
        assert line is not None, f"{size}k: {type(error).__name__}: {error}"
        assert str(line).startswith(f"{disk}/out: cannot be written ("), line
        assert not os.listdir(disk), os.listdir(disk)
        size += int(step)
    else:
        break
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Path:
    """A working folder with eight images, a table of them and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(f"images/{number}.png")
    Path("pairs.csv").write_text("image,caption\n" + "".join(f"images/{n}.png,number {n}\n" for n in range(8)))
    Path("tiny.ckpt").symlink_to(tiny_checkpoint)
    return tmp_path


def test_a_command_without_a_stream_of_errors_works_and_prints_its_error_elsewhere(folder: Path) -> None:
    """In a fork, which closes the stream itself; the next test starts without it."""
    run = partial(lit_clip_command, folder, *EMBED, function=forks.command_without_errors)
    assert run().returncode == 0
    assert Path("f.npy").exists()
    done = run("--batch_size", "0")
    assert done.returncode == 2
    assert done.stdout == "lit-clip: error: --batch_size 0 must be at least 1\n"


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "first"), [("2>&-", []), ("2>&-", [FIT]), (">&-", [FIT])])
def test_a_command_works_without_a_stream(closed: str, first: list[list[str]], folder: Path) -> None:
    commands = [*first, EMBED, [*EMBED, "--batch_size", "0"]]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", FROM_THE_START, json.dumps(commands)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(shell, env=environment, capture_output=True, timeout=240, check=True)
    codes = [Path(f"code_{number}").read_text() for number in range(len(commands))]
    assert codes == ["0"] * (len(commands) - 1) + ["2"]
    assert Path("f.npy").exists()
    assert bool(list(folder.rglob("last.ckpt"))) == bool(first)
    if closed == "2>&-":
        line = "lit-clip: error: --batch_size 0 must be at least 1\n"
        assert Path(f"out_{len(first) + 1}").read_text() == line


@pytest.mark.parametrize("words", [["--help"], ["embed", "--help"], ["export", "nowhere.ckpt"]], ids=" ".join)
def test_what_starts_no_workers_needs_few_open_files(words: list[str], tmp_path: Path) -> None:
    done = lit_clip_command(tmp_path, *words, function=partial(forks.command_with_few_files, 100))
    assert done.returncode == (2 if "export" in words else 0)
    assert "open files" not in done.stderr


@pytest.mark.parametrize("words", [FIT, EMBED], ids=["fit", "embed"])
def test_few_open_files_are_one_line_that_names_the_limit(words: list[str], folder: Path) -> None:
    done = lit_clip_command(folder, *words, function=partial(forks.command_with_few_files, 24))
    line = "too many open files: a process may open 24, and needs 128 or more; raise the limit: ulimit -n 4096"
    assert (done.returncode, done.stderr) == (2, f"lit-clip: error: {line}\n")


def test_files_that_run_out_later_are_the_same_line() -> None:
    line = f"a process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}, and needs"
    ours = InputError("a.csv: cannot be written (Too many open files)")
    ours.__cause__ = OSError(errno.EMFILE, "Too many open files", "a.csv")
    for error in (ours.__cause__, ours, RuntimeError("received 0 items of ancdata")):
        assert line in str(user_error(error))


HOLD = """
import sys, time
from pathlib import Path
from lit_clip.tools.atomic import claim
claim(Path(sys.argv[1]))
Path(f".{sys.argv[1]}.parts").mkdir()
Path("held").touch()
time.sleep(120)
"""


@pytest.mark.parametrize("output", ["f.npy", "s.parquet"])
def test_an_output_that_another_run_writes_is_refused_at_once(output: str, folder: Path) -> None:
    words = EMBED if output == "f.npy" else ["score", "pairs.csv", *EMBED[2:4], "--output", output, *EMBED[6:]]
    (folder / "hold.py").write_text(HOLD, encoding="utf-8")
    program = forks.Program(forks.script, [str(folder / "hold.py"), output], folder, {**os.environ})
    with forks.running(program, folder / "out", folder / "err") as other:
        while not Path("held").exists():
            assert other.is_alive(), Path("err").read_text(encoding="utf-8")
            time.sleep(0.02)
        kept = Path(f".{output}.parts", "part.npz")
        kept.write_bytes(b"")
        with pytest.raises(
            InputError, match=rf"^{output}: another process writes there \(process {other.pid} on .*\); wait"
        ):
            run_command(words)
        assert kept.exists()
    run_command(words)
    assert Path(output).exists()
    assert not [path.name for path in folder.glob(".*")]


@pytest.mark.parametrize("name", ["notes.txt", "00000.tar", "photos"])
def test_a_folder_with_other_files_is_not_filled_with_shards(name: str, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / name).mkdir() if name == "photos" else (folder / "out" / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"^out: {name} was not written by lit-clip shard; give an empty folder$"):
        run_command(["shard", "pairs.csv", "out", "--num_workers", "0"])
    assert [path.name for path in Path("out").iterdir() if path.name != ".lock"] == [name]


def test_a_folder_that_shards_were_written_to_is_resumed_and_gets_no_other_files(folder: Path) -> None:
    words = ["shard", "pairs.csv", "out", "--num_workers", "0", "--shard_size", "3"]
    run_command(words)
    whole = Path("out/00001.tar").read_bytes()
    Path("out/00001.tar").unlink()
    run_command(words)
    assert Path("out/00001.tar").read_bytes() == whole
    Path("out/more.tar").touch()
    with pytest.raises(InputError, match="more.tar was not written by lit-clip shard"):
        run_command(words)


@pytest.mark.skipif(bool(why_no_disk()), reason=why_no_disk())
@pytest.mark.parametrize("format", ["hugging_face", "open_clip"])
def test_a_full_disk_ends_an_export_in_one_line_and_leaves_nothing(
    format: str, folder: Path, tiny_checkpoint: Path
) -> None:
    (folder / "disk").mkdir()
    step = str(tiny_checkpoint.stat().st_size // 1024 // 8 + 400)
    (folder / "export.py").write_text(EXPORT_UNTIL_IT_FITS, encoding="utf-8")
    with mounted(folder / "disk") as disk:
        words = [str(folder / "export.py"), str(disk.holder), str(disk.folder), "tiny.ckpt", format, step]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        (done,) = forks.run([forks.Program(forks.script, words, folder, environment)], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_slurm_tasks_that_lightning_refuses_are_one_line(folder: Path) -> None:
    done = lit_clip_command(folder, *EMBED, environment={"SLURM_NTASKS": "2"})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("lit-clip: error: devices or accelerator: You set `--ntasks=2` in your SLURM bash script")


@pytest.mark.parametrize(
    "tasks",
    [
        {"NTASKS": "2", "NTASKS_PER_NODE": "2"},  # in a script without srun
        {"NTASKS": "2", "NTASKS_PER_NODE": "2", "STEP_NUM_TASKS": "1"},  # in the shell of an interactive step
        {"NTASKS": "1", "STEP_NUM_TASKS": "1"},
    ],
    ids=str,
)
def test_tasks_that_slurm_has_not_started_are_neither_waited_for_nor_done_without(
    tasks: dict[str, str], folder: Path
) -> None:
    for words in (EMBED, FIT):
        done = lit_clip_command(folder, *words, *two_devices(words), environment=slurm_task(**tasks))
        assert done.returncode == 2
        line = "SLURM starts 1 of the 2 processes (2 devices x 1 nodes): give the job --nodes=1 --ntasks-per-node=2"
        assert done.stderr.splitlines()[-1].startswith(f"lit-clip: error: {line} and write srun before lit-clip")


def test_more_tasks_than_processes_are_explained_by_lightning(folder: Path) -> None:
    tasks = slurm_task(NTASKS="4", NTASKS_PER_NODE="2", NNODES="2", STEP_NUM_TASKS="4")
    done = lit_clip_command(folder, *FIT, *two_devices(FIT), environment=tasks)
    assert done.returncode == 2
    assert "Set `num_nodes=2`" in done.stderr.splitlines()[-1]


def two_devices(words: list[str]) -> list[str]:
    return ["--devices" if words is EMBED else "--trainer.devices", "2"]


def slurm_task(**more: str) -> dict[str, str]:
    """Return SLURM's variables of a job's first task."""
    names = {"JOB_ID": "1", "JOB_NAME": "a", "PROCID": "0", "NODEID": "0", "LOCALID": "0", "NODELIST": "a", **more}
    return {f"SLURM_{name}": value for name, value in names.items()}


def test_a_requeued_jobs_checkpoint_in_the_working_folder_is_not_taken_for_the_encoders(folder: Path) -> None:
    shutil.copyfile("tiny.ckpt", "hpc_ckpt_1.ckpt")
    done = lit_clip_command(folder, *EMBED, environment=slurm_task(NTASKS="1"))
    assert done.returncode == 0, done.stderr
    assert len(np.load("f.npy")) == 8


def test_machines_that_nobody_starts_are_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    planned = lit_clip_command(folder, *FIT, "--trainer.num_nodes", "2", "--print_plan")  # on the machine at hand
    assert planned.returncode == 0, planned.stderr
    done = lit_clip_command(folder, *FIT, "--trainer.num_nodes", "2")
    assert done.returncode == 2
    line = "trainer.num_nodes 2: nothing starts the processes of the other machines: run this by srun, or on each"
    assert done.stderr.splitlines()[-1].startswith(f"lit-clip: error: {line}")
    monkeypatch.setenv("NODE_RANK", "0")  # its second process is started by hand
    watch_started_ranks(Trainer(accelerator="cpu", devices=1, num_nodes=2, logger=False, enable_checkpointing=False))


def test_the_page_has_every_fault_and_every_fault_a_test() -> None:
    assert surroundings.tables() in (ROOT / "docs/evidence/faults.md").read_text(encoding="utf-8")
    assert all(each.test in globals() for each in surroundings.SURROUNDINGS)
    for each in surroundings.RESUMED:
        file, _, test = each.test.partition("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8")
