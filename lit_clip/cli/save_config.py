"""The settings of a run, saved into its folder."""

from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_clip.tools.atomic import replacing
from lit_clip.training.run_folder import run_folder

# The default of Timer.interval is one, which jsonargparse's dumper would refuse.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class SaveConfig(SaveConfigCallback):
    """Write ``<subcommand>_config.yaml`` into the run's folder, if it has one; a file that is there is kept.

    A run that another one continues in the same folder, with other settings, gets a number: ``fit_config-v1.yaml``.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.already_saved:
            return
        folder = run_folder(trainer)
        if folder and trainer.is_global_zero:
            save_text(folder / self.config_filename, self.parser.dump(self.config, skip_none=False))
        self.already_saved = True


def save_text(path: Path, text: str) -> Path:
    """Write a text file under the first of ``name``, ``name-v1``, ... that is free or has this text.

    Returns:
        the file, which is the newest of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, version = path, 0
    while candidate.exists() and candidate.read_text(encoding="utf-8") != text:
        version += 1
        candidate = path.with_stem(f"{path.stem}-v{version}")
    with replacing(candidate) as draft:
        draft.write_text(text, encoding="utf-8")
    return candidate
