"""Checkpoints of a configuration's runs are searched for where ModelCheckpoint puts them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_clip.cli.configurations import run_folders
from lit_clip.errors import InputError

LOGGERS = "lightning.pytorch.loggers"
KEEPER = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}


def config(logger: Any, callbacks: Any = None, root: str | None = None) -> dict[str, Any]:
    return {"trainer": {"logger": logger, "callbacks": callbacks, "default_root_dir": root}}


def folder_of(logger: Any, root: str) -> Path:
    """Return Lightning's own folder for a run with this logger."""
    trainer: Any = SimpleNamespace(loggers=[logger], default_root_dir=root)
    return Path(ModelCheckpoint()._ModelCheckpoint__resolve_ckpt_dir(trainer))  # pyright: ignore


@pytest.mark.parametrize("options", [{"save_dir": "logs"}, {"save_dir": "logs", "name": "mine"}])
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_checkpoints_lie_in_the_folder_of_a_logger_on_disk(kind: Any, options: dict[str, str]) -> None:
    (_, folder) = run_folders(config({"class_path": f"{LOGGERS}.{kind.__name__}", "init_args": options}))
    assert folder_of(kind(**options), "root").is_relative_to(folder)


@pytest.mark.parametrize("kind", ["CometLogger", "NeptuneLogger"])
def test_a_logger_with_unknown_folders_needs_a_dirpath(kind: str) -> None:
    logger = {"class_path": f"{LOGGERS}.{kind}", "init_args": {"save_dir": "logs"}}
    with pytest.raises(InputError, match=f"--ckpt_path: the folder of {kind}'s runs is not known in advance; "):
        run_folders(config(logger))
    assert run_folders(config(logger, KEEPER)) == [Path("checkpoints"), Path("kept")]
    csv = {"class_path": f"{LOGGERS}.CSVLogger", "init_args": {"save_dir": "logs"}}
    assert run_folders(config([csv, logger]))[1:] == [Path("logs/lightning_logs")]  # the first logger's folder counts


def test_runs_without_a_logger_use_the_root_and_callbacks_their_dirpath(tmp_path: Path) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    expected = [tmp_path / "checkpoints", tmp_path / "hpc_ckpt_1.ckpt"]
    assert run_folders(config(False, [KEEPER, None], str(tmp_path)))[:2] == expected
    assert run_folders(config(False, KEEPER, str(tmp_path)))[-1] == Path("kept")
    assert run_folders(config(None, None, str(tmp_path)))[-1] == tmp_path / "lightning_logs"
