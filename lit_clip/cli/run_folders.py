"""Folders in which the runs of a configuration keep their checkpoints."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clip.cli.references import with_environment
from lit_clip.errors import InputError
from lit_clip.tools.text_files import read_yaml
from lit_clip.training.lightning.run_folder import CONFIG

# Loggers whose runs lie in save_dir/name/version_N.
ON_DISK = ("CSVLogger", "TensorBoardLogger")
LOCAL_STORE = "file:"  # begins the address of MLflow's store of files


def run_folders(config: Any) -> list[Path]:
    """Return the folders, and single checkpoint files, to search for a configuration's checkpoints.

    ``ModelCheckpoint`` keeps them in its ``dirpath``, or else in the folder of the first logger's run.
    """
    trainer = config["trainer"]
    root = Path(trainer["default_root_dir"] or ".")
    folders = [root / "checkpoints", *root.glob("hpc_ckpt_*.ckpt")]  # runs without a logger, and requeued SLURM jobs
    options = [(callback or {}).get("init_args", {}) for callback in _listed(trainer["callbacks"])]
    dirpaths = [Path(each["dirpath"]) for each in options if each.get("dirpath")]
    kind, named = _first_logger(trainer)
    if kind in ON_DISK:
        folders.append(Path(named.get("save_dir") or root) / (named.get("name") or "lightning_logs"))
    elif kind == "WandbLogger":
        project = named.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
        folders.append(Path(named.get("save_dir") or named.get("dir") or ".") / project)
    elif kind == "MLFlowLogger":
        folders += _mlflow_runs(named, root)
    elif not dirpaths:
        raise InputError(
            f"--ckpt_path: the folder of {kind}'s runs is not known in advance; set ModelCheckpoint's dirpath "
            "or give the checkpoint's path"
        )
    return folders + dirpaths


def _mlflow_runs(named: Mapping[str, Any], root: Path) -> list[Path]:
    """Return the folders of an experiment's runs: those whose saved configuration names it.

    MLflow's folders are called after the ids of experiment and run, which only its store knows.
    """
    address = str(named.get("tracking_uri") or f"{LOCAL_STORE}{named.get('save_dir') or './mlruns'}")
    store = Path(address.removeprefix(LOCAL_STORE)) if address.startswith(LOCAL_STORE) else root
    folders = set()
    for config in store.glob(f"*/*/{CONFIG}*.yaml"):
        saved = read_yaml(config)
        kind, other = _first_logger(saved["trainer"])
        experiment = with_environment(other.get("experiment_name"))
        if kind == "MLFlowLogger" and experiment == named.get("experiment_name"):
            folders.add(config.parent)
    return sorted(folders)


def _first_logger(trainer: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    logger = _listed(trainer["logger"])[0]
    if not isinstance(logger, Mapping):
        return ON_DISK[0], {}
    return str(logger["class_path"]).rpartition(".")[2], logger.get("init_args") or {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
