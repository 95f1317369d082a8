"""The folder of a run's own files, with any logger; no other run writes there; and the places of its curves."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from lit_clip.errors import InputError
from lit_clip.tools.atomic import claim, not_written

CONFIG = "fit_config"
RUN = "version"
OnDisk = TensorBoardLogger | CSVLogger  # their run's folder is save_dir/name/version_N
_unnumbered: WeakSet[Any] = WeakSet()
_kinds: WeakKeyDictionary[Logger, str] = WeakKeyDictionary()  # names of folders other than RUN


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
    if isinstance(logger, OnDisk):
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
        return shlex.join(["tensorboard", "--logdir", str(shown_path(folder))])
    if isinstance(logger, CSVLogger):
        return str(shown_path(Path(logger.log_dir, "metrics.csv")))
    if isinstance(logger, WandbLogger):
        run: Any = logger.experiment
        if not getattr(run, "dir", None):  # mode: disabled
            return None
        folder = Path(run.dir).parent  # of run.dir, which is its `files`
        return shlex.join(["wandb", "sync", str(shown_path(folder))]) if run.offline else run.url
    if isinstance(logger, MLFlowLogger):
        address = str(logger._tracking_uri)  # of the store that it writes to
        if address.startswith("http"):
            return f"{address}/#/experiments/{logger.experiment_id}/runs/{logger.run_id}"
        return shlex.join(["mlflow", "ui", "--backend-store-uri", address])
    return None


def shown_path(path: Path) -> Path:
    """Return a path for messages: relative to the working folder if it is below that."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def note_unnumbered(trainer: Trainer) -> None:
    """Record the loggers that will number their run's folder themselves, but have not done so yet."""
    for logger in trainer.loggers:
        if isinstance(logger, OnDisk) and logger._version is None and "://" not in str(logger.root_dir):
            _unnumbered.add(logger)


def name_folders(trainer: Trainer, kind: str) -> None:
    """Make self-numbering loggers call their folder ``kind_N``, because it is not a run's folder.

    Args:
        trainer: of the loggers.
        kind: such as ``validate``.
    """
    _kinds.update(dict.fromkeys(trainer.loggers, kind))


def claim_folders(trainer: Trainer) -> None:
    """Give a run folders that no other run writes to; called on every rank before loggers open files.

    A version that the logger numbers itself is a new folder, which two runs that start at once cannot both make. A
    folder that the user names is refused while another process's run writes there. A run that has ended, however it
    ended, holds no folder, and one process may use its folders again.
    """
    if not trainer.is_global_zero:
        return
    profiler: Any = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]  # set by a connector
    for logger in [each for each in _unnumbered if each in trainer.loggers]:
        _unnumbered.remove(logger)
        asked = logger.log_dir
        kind = _kinds.get(logger, RUN)
        first = logger._get_next_version() if kind == RUN else 0
        number = _new_version(Path(logger.root_dir), kind, first)
        logger._version = number if kind == RUN else f"{kind}_{number}"  # loggers take a text for the whole name
        if getattr(profiler, "_log_dir", None) == asked:  # it has asked already
            profiler._log_dir = logger.log_dir
    if trainer.state.fn != TrainerFn.FITTING:
        return
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    folders = [each.log_dir for each in trainer.loggers if isinstance(each, OnDisk)]
    folders += [each.dirpath for each in savers if each.dirpath]
    if not trainer.loggers and any(not each.dirpath for each in savers):
        folders.append(os.path.join(trainer.default_root_dir, "checkpoints"))
    for folder in (str(each) for each in folders):
        holder = "" if "://" in folder else claim(Path(folder))
        if holder:
            raise InputError(
                f"{folder}: another run writes there ({holder}); wait for its end, or give this run another logger "
                "version or ModelCheckpoint.dirpath"
            )


def _new_version(root: Path, kind: str, version: int) -> int:
    """Make the first free folder of ``kind_N``, ``kind_N+1``, ... and return its number."""
    while True:
        folder = root / f"{kind}_{version}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            version += 1
        except OSError as error:
            raise not_written(folder, error, "; set trainer.default_root_dir or the logger's save_dir") from error
        else:
            return version
