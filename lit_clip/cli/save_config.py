"""Save the settings of a run into its folder."""

import os
from collections.abc import Iterable
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_clip.cli.configurations import Configuration, configuration, differences, joined
from lit_clip.cli.hparams import log_settings
from lit_clip.errors import require
from lit_clip.tools.atomic import replacing
from lit_clip.training.lightning.run_folder import run_folder

JOB = "slurm_job_id"  # in a checkpoint
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
            save_text(folder / self.config_filename, self._text)
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
    def _text(self) -> str:
        return self.parser.written(self.config)

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
