"""The folder of a run's own files, with any logger, and the places of its curves."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lit_clip.training.lightning.strategies import mlflow_address

CONFIG = "fit_config"


def run_folder(trainer: Trainer) -> Path | None:
    """Return the folder of this run's files on every rank; None without a logger. A collective.

    It is the first logger's own folder of the run if it has one (TensorBoard, CSV), or else the folder in which
    ``ModelCheckpoint`` makes ``checkpoints``: the logger's ``save_dir/name/version``.
    """
    folder = None
    if trainer.loggers and trainer.is_global_zero:
        folder = _folder(trainer.loggers[0], trainer.default_root_dir)
    return trainer.strategy.broadcast(folder)


def _folder(logger: Logger, root: str) -> Path:
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or root, str(logger.name), version)


def newest_config(folder: Path | None) -> Path | None:
    """Return the configuration that ``fit`` last wrote into a run's folder; None if there is none."""
    found = folder.glob(f"{CONFIG}*.yaml") if folder else ()
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def curves(loggers: Sequence[Logger], resumed_from: str | Path | None = None) -> list[str]:
    """Return commands, files and addresses that show a run's curves, on the first rank; none for unknown loggers."""
    return [place for logger in loggers if (place := _curves(logger, resumed_from))]


def _curves(logger: Any, resumed_from: str | Path | None) -> str | None:
    if isinstance(logger, TensorBoardLogger):
        own, runs = Path(logger.log_dir).resolve(), Path(logger.root_dir).resolve()
        before = Path(resumed_from).resolve().parents if resumed_from else ()
        folder = runs if runs in before and own not in before else own  # with the beginning of a resumed run
        return shlex.join(["tensorboard", "--logdir", str(shown(folder))])
    if isinstance(logger, CSVLogger):
        return str(shown(Path(logger.log_dir, "metrics.csv")))
    if isinstance(logger, WandbLogger):
        run: Any = logger.experiment
        if not getattr(run, "dir", None):  # mode: disabled
            return None
        folder = Path(run.dir).parent  # of run.dir, which is its `files`
        return shlex.join(["wandb", "sync", str(shown(folder))]) if run.offline else run.url
    if isinstance(logger, MLFlowLogger):
        address = mlflow_address(logger)
        if address.startswith("http"):
            return f"{address}/#/experiments/{logger.experiment_id}/runs/{logger.run_id}"
        return shlex.join(["mlflow", "ui", "--backend-store-uri", address])
    return None


def shown(path: Path) -> Path:
    """Return a path for messages: relative to the working folder if it is below that."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
