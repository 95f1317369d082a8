"""Folders in which the runs of a configuration keep their checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError

# Loggers whose runs lie in save_dir/name/version_N. Others name their folders when a run starts, after numbers or ids.
ON_DISK = ("CSVLogger", "TensorBoardLogger")


def run_folders(config: Any) -> list[Path]:
    """Return the folders, and single checkpoint files, to search for a configuration's checkpoints.

    ``ModelCheckpoint`` keeps them in its ``dirpath``, or else in the folder of the first logger's run.

    Args:
        config: of one of LightningCLI's commands.

    Raises:
        InputError: neither is known before the run.
    """
    trainer = config["trainer"]
    root = Path(trainer["default_root_dir"] or ".")
    folders = [root / "checkpoints", *root.glob("hpc_ckpt_*.ckpt")]  # runs without a logger, and requeued SLURM jobs
    options = [(callback or {}).get("init_args", {}) for callback in _listed(trainer["callbacks"])]
    dirpaths = [Path(each["dirpath"]) for each in options if each.get("dirpath")]
    logger = _listed(trainer["logger"])[0]
    kind = str(logger["class_path"]).rpartition(".")[2] if isinstance(logger, Mapping) else ON_DISK[0]
    if kind in ON_DISK:
        named: Mapping[str, Any] = (logger.get("init_args") if isinstance(logger, Mapping) else None) or {}
        folders.append(Path(named.get("save_dir") or root) / (named.get("name") or "lightning_logs"))
    elif not dirpaths:
        raise InputError(
            f"--ckpt_path: the folder of {kind}'s runs is not known in advance; set ModelCheckpoint's dirpath "
            "or give the checkpoint's path"
        )
    return folders + dirpaths


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
