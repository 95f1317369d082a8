"""The folders searched for a configuration's checkpoints are those ModelCheckpoint writes to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lit_clip.cli.run_folders import run_folders

LOGGERS = "lightning.pytorch.loggers"


def config(logger: Any, callbacks: Any = None, root: str | None = None) -> dict[str, Any]:
    return {"trainer": {"logger": logger, "callbacks": callbacks, "default_root_dir": root}}


def folder_of(logger: Any, root: str) -> Path:
    """Return the folder that ModelCheckpoint chooses with this logger."""
    trainer: Any = SimpleNamespace(loggers=[logger], default_root_dir=root)
    return Path(ModelCheckpoint()._ModelCheckpoint__resolve_ckpt_dir(trainer))  # pyright: ignore


@pytest.mark.parametrize("options", [{"save_dir": "logs"}, {"save_dir": "logs", "name": "mine"}])
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_folder_of_a_local_logger(kind: Any, options: dict[str, str]) -> None:
    (_, folder) = run_folders(config({"class_path": f"{LOGGERS}.{kind.__name__}", "init_args": options}))
    assert folder_of(kind(**options), "root").is_relative_to(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "shown", "save_dir": "logs"},
        {"project": "birds", "dir": "here", "save_dir": "there", "name": "shown"},
    ],
)
def test_folder_of_weights_and_biases_is_the_projects(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LOGGERS}.wandb._WANDB_AVAILABLE", True)
    logger = WandbLogger(**options, version="a1b2")  # starts no run before something is logged
    (_, folder) = run_folders(config({"class_path": f"{LOGGERS}.WandbLogger", "init_args": options}))
    assert folder_of(logger, "root") == folder / "a1b2/checkpoints"
    assert folder.name == options.get("project", "lightning_logs")


def test_folder_of_comet_is_the_projects() -> None:
    options = {"project": "birds", "offline_directory": "here"}
    assert run_folders(config({"class_path": f"{LOGGERS}.CometLogger", "init_args": options}))[1] == Path("here/birds")


def test_folder_of_mlflow_is_the_experiments_number(tmp_path: Path) -> None:
    for number, name in ((11, "birds"), (12, "fish")):
        (tmp_path / f"mlruns/{number}").mkdir(parents=True)
        (tmp_path / f"mlruns/{number}/meta.yaml").write_text(f"experiment_id: '{number}'\nname: {name}\n")
    for place in ({"save_dir": f"{tmp_path}/mlruns"}, {"tracking_uri": f"file:{tmp_path}/mlruns"}):
        logger = {"class_path": f"{LOGGERS}.MLFlowLogger", "init_args": {"experiment_name": "fish", **place}}
        assert run_folders(config(logger))[1:] == [tmp_path / "mlruns/12"]
    logger["init_args"]["tracking_uri"] = "http://127.0.0.1"
    assert run_folders(config(logger))[1:] == []


def test_without_a_logger_it_is_the_root_and_model_checkpoints_add_their_own(tmp_path: Path) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    expected = [tmp_path / "checkpoints", tmp_path / "hpc_ckpt_1.ckpt"]
    assert run_folders(config(False, [saver, None], str(tmp_path)))[:2] == expected
    assert run_folders(config(False, saver, str(tmp_path)))[-1] == Path("kept")
    assert run_folders(config(None, None, str(tmp_path)))[-1] == tmp_path / "lightning_logs"
