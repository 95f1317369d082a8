"""Save the settings of a run into its folder, and for TensorBoard's HParams page, which compares runs by them."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lit_clip.cli.configurations import Configuration, configuration, differences, joined
from lit_clip.errors import require
from lit_clip.secrets import plain_without_secrets, without_secrets
from lit_clip.tools.atomic import replacing
from lit_clip.training.lightning.run_folder import run_folder
from lit_clip.training.lightning.strategies import leave_out_hp_metric

JOB = "slurm_job_id"  # in a checkpoint
# Settings of the trainer that change what is learned.
OF_TRAINER = (
    *("max_epochs", "max_steps", "limit_train_batches", "overfit_batches", "precision", "devices", "num_nodes"),
    *("gradient_clip_val", "sync_batchnorm", "callbacks"),
)
# The page shows five settings and five metrics at first.
FIRST = ("model.optimizer.lr", "data.batch_size", "trainer.max_epochs", "model.architecture", "data.train")
FIRST_METRICS = ("val/loss", "val/image_to_text_recall@1", "val/text_to_image_recall@1")
# The default of Timer.interval is one, which jsonargparse's dumper would refuse.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class SaveConfig(SaveConfigCallback):
    """Write ``<subcommand>_config.yaml`` into the run's folder, if it has one; keep an existing file.

    A run that another one continues in the same folder, with other settings, gets a number: ``fit_config-v1.yaml``.
    Checkpoints hold a digest of the settings by which ``--ckpt_path last`` knows them again, and TensorBoard's HParams
    page has the settings themselves.
    """

    parser: Any  # a Parser
    before: Any = None  # of the run that this one goes on from

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.already_saved:
            return
        folder = run_folder(trainer)
        if folder and trainer.is_global_zero:
            save_text(folder / self.config_filename, self.parser.written(self.config))
        self.already_saved = True

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._log_settings(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._log_settings(trainer, trainer.callback_metrics)

    def _log_settings(self, trainer: Trainer, metrics: Iterable[str] | None = None) -> None:
        if trainer.is_global_zero and trainer.loggers:
            log_settings(trainer.loggers, self._settings, metrics)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.before = checkpoint.get("configuration")
        requeued = Path(str(trainer.ckpt_path)).name.startswith("hpc_ckpt_") and not self.config.ckpt_path
        job = os.environ.get("SLURM_JOB_ID")  # which it keeps when it is requeued
        require(
            not requeued or checkpoint.get(JOB) == job,
            f"{trainer.ckpt_path}: saved by another SLURM job, which Lightning would resume here; resume it with "
            "--ckpt_path auto, or move the file to begin anew",
        )
        differing = differences(self._configuration, self.before) if requeued else []
        require(
            not differing,
            f"{trainer.ckpt_path}: Lightning would resume this requeued job, which had another configuration "
            f"({', '.join(differing)}); move the file, or set another trainer.default_root_dir",
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["configuration"] = joined(self._configuration, self.before)
        if job := os.environ.get("SLURM_JOB_ID"):
            checkpoint[JOB] = job

    @cached_property
    def _configuration(self) -> Configuration:
        return configuration(self._settings)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self.parser.as_typed(self.config)


def save_text(path: Path, text: str) -> Path:
    """Write a text file as the first of ``name``, ``name-v1``, ... that is free or has this text; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, version = path, 0
    while candidate.exists() and candidate.read_text(encoding="utf-8") != text:
        version += 1
        candidate = path.with_stem(f"{path.stem}-v{version}")
    with replacing(candidate) as draft:
        draft.write_text(text, encoding="utf-8")
    return candidate


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, Any], metrics: Iterable[str] | None = None) -> None:
    """Write a run's settings into the event files of its TensorBoard loggers.

    At the end of the run ``metrics`` names the curves whose last values are compared. Without that list, as of runs
    that were killed, the page offers all curves.
    """
    # Imports TensorFlow where that is installed.
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]  # generated
    from torch.utils.tensorboard.summary import hparams

    flat = flat_settings(settings)
    compared = [name for name in metrics or () if name.startswith(("val/", "zero_shot/", "linear_probe/"))]
    compared.sort(key=lambda name: (not name.endswith("/top1"), name))  # accuracies first
    ordered = dict.fromkeys([*(name for name in FIRST_METRICS if name in compared), *compared], 0.0)
    lists, beginning, end = hparams(flat, ordered)
    plugin = lists.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for setting in data.experiment.hparam_infos:
        setting.differs = setting.name in FIRST  # the page sorts these before the others
    plugin.content = data.SerializeToString()
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            leave_out_hp_metric(logger)
            writer: Any = logger.experiment._get_file_writer()
            for summary in (beginning,) if metrics is None else (lists, end):
                writer.add_summary(summary, 0)
            writer.flush()


def flat_settings(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return settings by dotted name: all of model and data, and the trainer's that affect training."""
    trainer = {name: settings.get("trainer", {}).get(name) for name in OF_TRAINER}
    callbacks = trainer.pop("callbacks") or []
    named = [_described(each) for each in (callbacks if isinstance(callbacks, list) else [callbacks])]
    chosen = {"seed_everything": settings.get("seed_everything"), "model": settings.get("model")}
    chosen |= {"data": settings.get("data"), "trainer": trainer | {"callbacks": ", ".join(sorted(named))}}
    found = ((name.removesuffix(".class_path"), value) for name, value in flat(chosen) if value is not None)
    return {
        name: value if isinstance(value, bool | int | float) else without_secrets(str(value)) for name, value in found
    }


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by dotted name, as they are typed, below the name ``above``; a class is its ``class_path``."""
    for key, value in settings.items():
        name = above if key == "init_args" else f"{above}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            yield from flat(value, name)
        else:
            yield name, value


def _described(callback: Any) -> str:
    path = callback["class_path"] if isinstance(callback, Mapping) else str(callback)
    given = callback.get("init_args") if isinstance(callback, Mapping) and not path.startswith("lightning.") else None
    settings = ", ".join(f"{name}={value}" for name, value in (given or {}).items() if value is not None)
    return path.rpartition(".")[2] + (f"({settings})" if settings else "")


def log_no_secrets(loggers: Iterable[Any]) -> None:
    """Make loggers write ``***`` instead of secrets in hyper-parameters."""
    for logger in loggers:
        logger.log_hyperparams = partial(_log_no_secrets, logger.log_hyperparams)


def _log_no_secrets(log: Callable[..., Any], params: Any, *others: Any, **options: Any) -> Any:
    return log(plain_without_secrets(params if isinstance(params, Mapping) else vars(params)), *others, **options)
