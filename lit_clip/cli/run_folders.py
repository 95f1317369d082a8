"""Folders in which the runs of a configuration keep their checkpoints."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


def run_folders(config: Any) -> list[Path]:
    """Return the folders to search for a configuration's checkpoints; files among them are checkpoints themselves.

    Args:
        config: of one of LightningCLI's commands.
    """
    trainer = config["trainer"]
    root = Path(trainer["default_root_dir"] or ".")
    folders = [root / "checkpoints", *root.glob("hpc_ckpt_*.ckpt")]  # runs without a logger, and requeued SLURM jobs
    for logger in _listed(trainer["logger"]):
        folders += _logger_folders(logger if isinstance(logger, Mapping) else {}, root)
    for callback in _listed(trainer["callbacks"]):
        options = (callback or {}).get("init_args", {})
        folders += [Path(options["dirpath"])] if options.get("dirpath") else []
    return folders


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _logger_folders(logger: Mapping[str, Any], root: Path) -> list[Path]:
    """Return the folders of a logger's runs, as ``ModelCheckpoint`` derives them from the logger's folder and name."""
    options: Mapping[str, Any] = logger.get("init_args") or {}
    kind = str(logger.get("class_path", "")).rpartition(".")[2]
    if kind == "MLFlowLogger":
        return list(_mlflow_folders(options))
    if kind == "WandbLogger":  # its ``name`` is only displayed
        place = options.get("save_dir", ".") or options.get("dir") or root
        return [Path(place) / (options.get("project") or "lightning_logs")]
    if kind == "CometLogger":
        return [Path(options.get("offline_directory") or root) / str(options.get("project"))]
    return [Path(options.get("save_dir") or root) / (options.get("name") or "lightning_logs")]


def _mlflow_folders(options: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an experiment's folders, which have numbers and a file with the name; those on a server are unknown."""
    address = str(options.get("tracking_uri") or f"file:{options.get('save_dir') or './mlruns'}")
    name = options.get("experiment_name") or "lightning_logs"
    if not address.startswith("file:"):
        return
    place = Path(address.removeprefix("file:"))
    for described in place.glob("*/meta.yaml"):
        found = yaml.safe_load(described.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("name") == name:
            yield described.parent
