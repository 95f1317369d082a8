"""Runs that are started at once, or into a folder in use, never write to the same folder."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import callbacks
from datamodules import Captions
from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.tools import atomic
from lit_clip.training.lightning.checkpoint_io import WholeCheckpointIO
from tests.conftest import TINY_YAML, without_packaged_defaults
from tests.helpers import forks

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


@pytest.mark.parametrize("logger", ["CSVLogger", pytest.param("TensorBoardLogger", marks=pytest.mark.slow)])
def test_four_fits_that_start_at_once_have_four_folders_with_their_own_weights(
    caption_table: Path, tmp_path: Path, logger: str
) -> None:
    words = [
        *("fit", "--data", "datamodules.Captions"),
        *("--data.train", str(caption_table), "--data.batch_size", "32", "--data.num_workers", "0"),
        *("--model.architecture", TINY_YAML, "--model.lr_scheduler.warmup_steps", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"),
        f"--trainer.logger={{class_path: lightning.pytorch.loggers.{logger}, init_args: {{save_dir: runs, name: a}}}}",
    ]
    words = ["lit-clip", *without_packaged_defaults(words)]
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    seeded = [[*words, "--seed_everything", str(seed)] for seed in range(4)]
    for done in forks.run([forks.Program(forks.command, each, tmp_path, environment) for each in seeded], 120):
        assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "runs/a").iterdir())  # and no lock file is left
    assert [folder.name for folder in folders] == [f"version_{number}" for number in range(4)]
    assert all(len(list(folder.glob("fit_config*.yaml"))) == 1 for folder in folders)
    checkpoints = [torch.load(file, weights_only=True) for file in (tmp_path / "runs/a").rglob("*.ckpt")]
    assert len({float(each["state_dict"]["visual.proj"].sum()) for each in checkpoints}) == 4


def _hold(folder: str) -> None:
    assert atomic.claim(Path(folder)) == ""
    Path(folder, "held").touch()
    time.sleep(60)


@pytest.fixture
def hold() -> Iterator[Callable[[Path], Any]]:
    """Start a process that claims a folder, as a run does."""
    processes = []

    def start(folder: Path) -> Any:
        folder.mkdir(parents=True)
        process = multiprocessing.get_context("forkserver").Process(target=_hold, args=(str(folder),))
        process.start()
        processes.append(process)
        for _ in range(600):
            if (folder / "held").exists():
                return process
            time.sleep(0.05)
        raise AssertionError("the process has not started")

    yield start
    for process in processes:
        process.kill()
        process.join()


def fit(config: CLIPConfig, table: Path, folder: Path, *others: Any, **options: Any) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks.defaults(), *others],
        plugins=[WholeCheckpointIO()],
        **QUIET,
        **options,
    )
    trainer.fit(LitCLIP(config), Captions(str(table), batch_size=32, num_workers=0))
    return trainer


@pytest.mark.parametrize(
    "kind", ["no logger", "version", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dirpath", "name"))]
)
def test_a_folder_is_refused_while_a_run_writes_there_and_is_free_when_it_is_killed(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path, hold: Callable[[Path], Any], kind: str
) -> None:
    folder, logger, savers = {
        "dirpath": (tmp_path / "kept", False, [ModelCheckpoint(tmp_path / "kept")]),
        "no logger": (tmp_path / "checkpoints", False, []),
        "version": (tmp_path / "a/version_3", CSVLogger(tmp_path, "a", 3), []),
        "name": (tmp_path / "a/mine", TensorBoardLogger(tmp_path, "a", "mine"), []),
    }[kind]
    holder = hold(folder)
    message = f"{folder}: another run writes there \\(process {holder.pid} on .*\\); wait for its end"
    with pytest.raises(InputError, match=message):
        fit(tiny_config, caption_table, tmp_path, *savers, logger=logger)
    assert [path.name for path in folder.iterdir()] == ["held"]  # nothing was written
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    fit(tiny_config, caption_table, tmp_path, *savers, logger=logger)
    fit(tiny_config, caption_table, tmp_path, *savers, logger=logger)  # its own process may go on there
    assert not list(tmp_path.rglob("*.lock"))


def test_a_run_numbers_its_folder_after_whatever_has_the_number(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/version_0").write_text("a file, which Lightning does not count")
    trainer = fit(tiny_config, caption_table, tmp_path, logger=CSVLogger(tmp_path, "a"))
    assert trainer.log_dir == str(tmp_path / "a/version_1")
    assert (tmp_path / "a/version_1/metrics.csv").exists()


def test_a_loggers_folder_that_cannot_be_made_is_one_line(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(InputError, match=r"a/version_0: cannot be written \(.*\); set trainer.default_root_dir or"):
        fit(tiny_config, caption_table, tmp_path, logger=CSVLogger(tmp_path, "a"))


def test_what_a_killed_run_left_is_removed_beside_a_checkpoint_unless_a_run_writes_there(
    tmp_path: Path, hold: Callable[[Path], Any]
) -> None:
    run, live = tmp_path / "version_0", tmp_path / "version_1"
    hold(live)
    for folder in (run, live):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints/.last.ckpt.0a1b2c3d.tmp").write_text("half")
        (folder / "checkpoints/.step=2.ckpt.0a1b2c3d.tmp").mkdir()  # of a checkpoint in shards
        (folder / "checkpoints/.step=2.ckpt.0a1b2c3d.tmp/rank_0.safetensors").write_text("half")
        (folder / "checkpoints/last.ckpt").write_text("whole")
        atomic.remove_leftovers(folder / "checkpoints/last.ckpt")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert len(list((live / "checkpoints").iterdir())) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"version_0", "version_1", ".version_1.lock"}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    checkpoint, elsewhere = tmp_path / "run/checkpoints/last.ckpt", tmp_path / "elsewhere.txt"
    checkpoint.parent.mkdir(parents=True)
    (checkpoint.parent / ".last.ckpt.0a1b2c3d.tmp").write_text("half")
    elsewhere.write_text("precious")
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        folder.with_name(f".{folder.name}.lock").symlink_to(elsewhere)
    atomic.remove_leftovers(checkpoint)
    assert elsewhere.read_text() == "precious"


def test_resuming_writes_nothing_beside_a_folder_in_which_no_run_was_killed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "runs/last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("whole")
    before = [folder.stat().st_mtime_ns for folder in (tmp_path, checkpoint.parent)]
    time.sleep(0.02)  # longer than the clock of a file system takes
    atomic.remove_leftovers(checkpoint)
    assert [folder.stat().st_mtime_ns for folder in (tmp_path, checkpoint.parent)] == before
