"""Runs with W&B and MLflow (extra ``loggers``), in their real offline modes, and with CSV."""

import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from callbacks.log_image import log_image
from lit_clip.cli.save_config import save_text
from lit_clip.training.lightning.run_folder import curves, newest_config
from tests.conftest import TINY_YAML

Fit = Callable[..., CompletedProcess[str]]
METRICS = {"train/loss", "train/learning_rate", "val/loss"}


@pytest.fixture
def fit(cli: Fit, caption_table: Path) -> Fit:
    """Run ``lit-clip fit`` for an epoch of four steps; all must succeed."""
    words = ("--data.train", str(caption_table), "--data.batch_size", "14", "--data.num_workers", "0")
    words = (*words, "--model.architecture", TINY_YAML, "--trainer.log_every_n_steps", "1")
    words = (*words, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")

    def run(*options: str, **others: Any) -> CompletedProcess[str]:
        done = cli("fit", *words, "--trainer.max_epochs", "1", *options, timeout=240, **others)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def saved_steps(folders: list[Path]) -> list[int]:
    paths = [folder / "checkpoints/last.ckpt" for folder in folders]
    return [torch.load(path, weights_only=True)["global_step"] for path in paths]


def test_wandb_gets_metrics_and_images_and_each_run_has_its_own_folder(fit: Fit, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = ("--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true", "--trainer.logger.project", "mine")
    # In new interpreters: forks would share, and delete, W&B's folder of images.
    fresh: dict[str, Any] = {"environment": {"WANDB_CONSOLE": "off"}, "new": True}
    first = fit(*logger, **fresh)
    (folder,) = (tmp_path / "runs/mine").iterdir()
    (run,) = (tmp_path / "runs/wandb").glob(f"offline-run-*-{folder.name}")
    records = next(run.glob("*.wandb")).read_bytes()  # protocol buffers, in which names are plain text
    assert all(name.encode() in records for name in METRICS)
    (image,) = run.glob("files/media/images/val/similarity_*.png")
    assert Image.open(image).width > 200
    assert f"curves: wandb sync {run.relative_to(tmp_path)}" in first.stdout.splitlines()  # W&B's own lines follow
    (suggestion,) = re.findall(r"--config (\S+) --ckpt_path", first.stdout)
    before = (tmp_path / suggestion).read_text()
    assert yaml.safe_load(before)["data"]["class_path"] == "lit_clip.datamodules.Captions"
    fit(*logger, "--trainer.max_epochs", "2", "--ckpt_path", "last", **fresh)
    (second,) = set((tmp_path / "runs/mine").iterdir()) - {folder}
    assert saved_steps([folder, second]) == [4, 8]
    assert (tmp_path / suggestion).read_text() == before
    assert newest_config(second) == second / "fit_config.yaml"


def test_mlflow_gets_metrics_and_images_and_each_run_has_its_own_folder(fit: Fit, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    address = f"sqlite:///{tmp_path}/runs.db"
    logger = ("--trainer.logger", "MLFlowLogger", "--trainer.logger.tracking_uri", address)
    first = fit(*logger, "--trainer.logger.experiment_name", "mine")
    client = mlflow.MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.data.metrics.keys() >= METRICS
    images = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    assert any(path.startswith("images/val~similarity") and path.endswith(".png") for path in images)
    assert "MLFlow only allows" not in first.stderr
    assert f"curves: mlflow ui --backend-store-uri {address}" in first.stdout.splitlines()
    folder = tmp_path / "runs" / run.info.experiment_id / run.info.run_id
    assert newest_config(folder) == folder / "fit_config.yaml"
    fit(*logger, "--trainer.logger.experiment_name", "another")
    fit(*logger, "--trainer.logger.experiment_name", "mine", "--trainer.max_epochs", "3", "--ckpt_path", "last")
    newest = client.search_runs([run.info.experiment_id], order_by=["attributes.start_time DESC"])[0]
    assert saved_steps([folder, folder.with_name(newest.info.run_id)]) == [4, 12]


@pytest.mark.slow
def test_several_loggers_each_have_a_line_and_csv_gets_no_image(fit: Fit, tmp_path: Path) -> None:
    kinds = ("TensorBoardLogger", "CSVLogger")
    each = [
        f"{{class_path: lightning.pytorch.loggers.{kind}, init_args: {{save_dir: {kind}, name: mine}}}}"
        for kind in kinds
    ]
    done = fit("--trainer.logger", f"[{', '.join(each)}]")
    assert [line for line in done.stdout.splitlines() if line.startswith("curves: ")] == [
        "curves: tensorboard --logdir TensorBoardLogger/mine/version_0",
        "curves: CSVLogger/mine/version_0/metrics.csv",
    ]
    assert (tmp_path / "CSVLogger/mine/version_0/metrics.csv").is_file()
    assert (tmp_path / "TensorBoardLogger/mine/version_0/fit_config.yaml").is_file()
    csv: Any = SimpleNamespace(loggers=[CSVLogger(tmp_path)], global_step=1)
    log_image(csv, "an/image", Image.new("RGB", (8, 8)))
    assert not any(path.suffix == ".png" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("error", ["RuntimeError('no store')", "ModuleNotFoundError('no store')"])
def test_a_logger_that_cannot_be_created_is_one_line(
    error: str, in_process: Callable[..., CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    """Lightning's own loggers raise the latter if their packages are not installed."""
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\nclass Refusing(CSVLogger):\n"
        f"    def __init__(self, save_dir: str = '.'):\n        raise {error}\n"
    )
    done = in_process("fit", "--data.train", str(caption_table), "--trainer.logger", "mine.Refusing")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "lit-clip: error: mine.Refusing: no store"
    assert "Traceback" not in done.stderr


def test_a_saved_configuration_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "run/fit_config.yaml"
    assert [save_text(file, text).name for text in ("a", "b", "a", "c", "b")] == [
        *("fit_config.yaml", "fit_config-v1.yaml", "fit_config.yaml", "fit_config-v2.yaml", "fit_config-v1.yaml")
    ]
    assert [path.read_text() for path in sorted(file.parent.iterdir())] == ["b", "c", "a"]
    assert newest_config(file.parent) == file.with_stem("fit_config-v1")


def test_an_unknown_logger_has_no_line_of_curves(tmp_path: Path) -> None:
    unknown: Any = SimpleNamespace()
    assert curves([unknown, TensorBoardLogger(tmp_path, name="a")]) == [f"tensorboard --logdir {tmp_path}/a/version_0"]
