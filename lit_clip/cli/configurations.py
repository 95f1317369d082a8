"""Find runs with the same configuration and their folders: ``--ckpt_path last`` may use their checkpoints."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from omegaconf import OmegaConf

from lit_clip.errors import InputError
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import read_yaml
from lit_clip.training.lightning.checkpoint_io import newest_checkpoint, passed_over
from lit_clip.training.lightning.run_folder import CONFIG

Configuration = dict[str, list[str]]
"""Digests of settings, by name; a resumed run has those of the run that it goes on from, too."""
# Settings that a run may be resumed with; of the optimiser only the class has to stay.
MAY_DIFFER = {"model.lr_scheduler", "model.decay", "model.rates", "model.micro_batch_size"} | {
    f"data.{name}"
    for name in ("batch_size", "global_batch_size", "num_workers", "bad_samples", "val", "test", "predict")
}
UNSET = ""
OWN = ("data", "model.loss")  # what a resumed run may have changed; the rest stays, however it is written


def configuration(settings: Mapping[str, Any]) -> Configuration:
    """Return the settings that define a configuration: model, loss, class of the optimiser, and data.

    Data have two digests, or one if they are equal: as written, and with whole paths.
    """
    found = {}
    for section in ("model", "data"):
        value = settings.get(section)
        arguments = (value.get("init_args", value) if isinstance(value, Mapping) else None) or {}
        named = {section: _class_of(value)}
        named |= {f"{section}.{name}": each for name, each in arguments.items() if name != "class_path"}
        for name, each in named.items():
            if name not in MAY_DIFFER:
                written = _class_of(each) if name == "model.optimizer" else each
                forms = (written, _whole_paths(written)) if name.startswith("data.") else (written,)
                found[name] = [*dict.fromkeys(map(_digest, forms))]
    return found


def _class_of(part: Any) -> Any:
    return _short(part).get("class_path") if isinstance(part, Mapping) else part


def _whole_paths(value: Any) -> Any:
    """Return texts as paths below the working folder, a list of one as its element; different texts stay different."""
    if isinstance(value, list) and len(value) == 1:
        return _whole_paths(value[0])
    if isinstance(value, Mapping):
        return {name: each if name == "class_path" else _whole_paths(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole_paths(each) for each in value]
    return os.path.realpath(value) if isinstance(value, str) and "://" not in value and "\0" not in value else value


def evaluated(ours: Configuration) -> Configuration:
    """Return the model settings that a command without training sets; the data may differ."""
    counts = {name for name in ours if name.startswith("model") and name not in ("model.loss", "model.optimizer")}
    return {name: digests for name, digests in ours.items() if name in counts and digests != [UNSET]}


def _digest(value: Any) -> str:
    return UNSET if value is None else hex_digest([json.dumps(_short(value), sort_keys=True, default=str)])


def _short(value: Any) -> Any:
    """Return settings with classes named without their package, because classes have several paths."""
    if isinstance(value, Mapping):
        last = {"class_path": str(value["class_path"]).rpartition(".")[2]} if "class_path" in value else {}
        return {name: _short(each) for name, each in value.items()} | last
    return [_short(each) for each in value] if isinstance(value, list) else value


def joined(own: Configuration, before: Any) -> Configuration:
    """Return the configuration of a run that continues another; ``before`` is the one in its checkpoint."""
    if not isinstance(before, Mapping):
        return own
    kept = {name: _known(before, name) for name in own if not name.startswith(OWN)}
    return {name: [*dict.fromkeys([*kept.get(name, ()), *digests])] for name, digests in own.items()}


def newest_of_configuration(ours: Configuration, folders: Sequence[Path], option: str, may_begin: bool) -> Path | None:
    """Return the newest checkpoint of a configuration; None if none exists and ``auto`` may start a new run."""
    unknown: set[Path] = set()
    others: dict[Path, list[str]] = {}

    def differing(file: Path, checkpoint: Mapping[str, Any]) -> list[str]:
        saved = checkpoint.get("configuration")
        if saved is None:
            unknown.add(file)
        elif names := differences(ours, saved):
            others[file] = names
        return others.get(file, [])

    found = newest_checkpoint(folders, differing)
    problem = f"--ckpt_path {option}: no complete checkpoint below {', '.join(map(str, folders))}"
    if found in unknown and ours:
        rank_zero_info(f"{found}: its configuration is not recorded; it is resumed with this command's")
    elif found is None and others:
        raise InputError(
            f"{problem} has this configuration; {passed_over(others)}. Give a checkpoint's path to --ckpt_path (with "
            "the same optimiser and loss), set another save_dir or name of trainer.logger to begin anew, or begin "
            f"anew from its weights with --model.pretrained {max(others, key=os.path.getmtime)}"
        )
    elif found is None and not (option == "auto" and may_begin):
        instead = "; --ckpt_path auto starts from the beginning in that case" if may_begin else ""
        raise InputError(f"{problem}{instead}")
    return found


def differences(ours: Configuration, saved: Any) -> list[str]:
    """Return the names of the settings that differ from a checkpoint's configuration."""
    if ours and not isinstance(saved, Mapping):
        return ["not of this command"]
    return [name for name in ours if name in saved and not {*ours[name]} & {*_known(saved, name)}]


def _known(saved: Mapping[Any, Any], name: str) -> list[str]:
    digests = saved.get(name)
    return [each for each in digests if isinstance(each, str)] if isinstance(digests, list) else []


# Loggers whose runs lie in save_dir/name/version_N.
ON_DISK = ("CSVLogger", "TensorBoardLogger")
LOCAL_STORE = "file:"  # begins the address of MLflow's store of files


def run_folders(config: Any) -> list[Path]:
    """Return the folders and single checkpoint files in which to search for a configuration's checkpoints.

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
    """Return the folders of an MLflow experiment's runs, by the experiment's name in saved configurations.

    MLflow's folders are called after the ids of experiment and run, which only its store knows.
    """
    address = str(named.get("tracking_uri") or f"{LOCAL_STORE}{named.get('save_dir') or './mlruns'}")
    store = Path(address.removeprefix(LOCAL_STORE)) if address.startswith(LOCAL_STORE) else root
    folders = set()
    for config in store.glob(f"*/*/{CONFIG}*.yaml"):
        saved = read_yaml(config)
        kind, other = _first_logger(saved["trainer"])
        experiment = OmegaConf.create([other.get("experiment_name")])[0]  # which may be a reference
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
