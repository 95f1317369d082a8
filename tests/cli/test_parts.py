"""Parts named on the command line and in YAML: the model, its optimiser, schedule and rule of weight decay."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.test_main import Cli, assert_user_error, words
from tests.conftest import ROOT, TINY_YAML

PARTS = """
import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_clip import LitCLIP

class Own(torch.optim.SGD):
    def __init__(self, params, lr: float = 0.5, nesterov: bool = False):
        super().__init__(params, lr=lr, momentum=0.9, nesterov=nesterov)

class Halves(LambdaLR):
    def __init__(self, optimizer, steps: int):
        self.steps = steps
        super().__init__(optimizer, self.factor)

    def factor(self, step):
        return 0.5 ** (step // self.steps)

class NothingDecays:
    def __call__(self, name, parameter):
        return False

class MyCLIP(LitCLIP):
    def __init__(self, scale: float = 1.0, **options):
        super().__init__(**options)
        self.scale = scale

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/scaled", self.scale * loss)
        return loss
"""


def checkpoint(folder: Path, version: int = 0) -> dict:  # pyright: ignore[reportMissingTypeArgument]
    (path,) = (folder / f"lightning_logs/version_{version}/checkpoints").glob("*.ckpt")
    return torch.load(path, weights_only=True)


def test_own_parts_of_the_working_folder_train_and_resume(
    caption_table: Path, tmp_path: Path, cli: Cli, in_process: Cli
) -> None:
    (tmp_path / "my_parts.py").write_text(PARTS)
    (tmp_path / "parts.yaml").write_text(
        f"model:\n  class_path: my_parts.MyCLIP\n  init_args:\n    scale: 3.0\n    architecture: {TINY_YAML}\n"
        "    optimizer: {class_path: my_parts.Own, init_args: {lr: 0.25}}\n"
        "    lr_scheduler: {class_path: my_parts.Halves, init_args: {steps: 2}}\n"
        "    decay: my_parts.NothingDecays\n"
    )
    command = [*words("fit", caption_table, architecture=False), "--config", "parts.yaml"]
    command += ["--trainer.log_every_n_steps", "1", "--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
    command += ["--trainer.logger.save_dir", "."]
    result = cli(*command)
    assert result.returncode == 0, result.stderr
    saved = checkpoint(tmp_path)
    parts = saved["parts"]
    assert parts["optimizer"] == {"class_path": "my_parts.Own", "init_args": {"lr": 0.25, "nesterov": False}}
    assert parts["lr_scheduler"] == {"class_path": "my_parts.Halves", "init_args": {"steps": 2}}
    assert [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]] == [0.25 / 4]
    table = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    rows = [dict(zip(table[0].split(","), row.split(","), strict=True)) for row in table[1:]]
    logged = [row for row in rows if row["train/loss"]]
    assert [float(row["train/scaled"]) for row in logged] == [
        pytest.approx(3 * float(row["train/loss"]), rel=1e-4) for row in logged
    ]
    (path,) = (tmp_path / "lightning_logs/version_0/checkpoints").glob("*.ckpt")
    resume = ["--ckpt_path", str(path), "--trainer.max_steps", "6", "--model.optimizer.lr", "0.125"]
    resumed = cli(*command, *resume)
    assert resumed.returncode == 0, resumed.stderr
    assert [group["lr"] for group in checkpoint(tmp_path, 1)["optimizer_states"][0]["param_groups"]] == [0.125 / 8]
    validated = cli(*words("validate", caption_table, architecture=False), "--ckpt_path", str(path))
    assert validated.returncode == 0, validated.stderr  # a validation needs none of the parts
    unnamed = in_process(*words("fit", caption_table, architecture=False), "--ckpt_path", str(path))
    config = "lightning_logs/version_0/fit_config.yaml"
    assert_user_error(unnamed, "was trained with model.optimizer my_parts.Own", f"resume with --config {config}")
    resume = ["--ckpt_path", str(path), "--model.optimizer", "my_parts.Own"]
    unnamed = in_process(*words("fit", caption_table, architecture=False), *resume)
    assert_user_error(
        unnamed, "resume with the model.freeze, parts of model.rates, lora and decay of the run that wrote it"
    )
    assert cli("fit", "--config", config, "--ckpt_path", str(path), "--trainer.max_steps", "6").returncode == 0


def test_a_class_that_is_named_later_replaces_the_settings_of_the_default_one(
    caption_table: Path, in_process: Cli
) -> None:
    """A configuration sets the warm-up of the cosine; another names a schedule without one."""
    step = "{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 7}}"
    command = [*words("fit", caption_table), "--config", str(ROOT / "configs/table.yaml")]
    printed = in_process(*command, "--model.lr_scheduler", step, "--print_config")
    assert printed.returncode == 0, printed.stderr
    schedule = yaml.safe_load(printed.stdout)["model"]["lr_scheduler"]
    assert schedule["class_path"] == "torch.optim.lr_scheduler.StepLR"
    assert schedule["init_args"]["step_size"] == 7


def test_print_config_shows_the_exchanged_parts_and_is_a_config(
    caption_table: Path, tmp_path: Path, in_process: Cli
) -> None:
    parts = ["--model.optimizer", "timm.optim.Lion", "--model.optimizer.lr", "1e-4"]
    parts += ["--model.lr_scheduler", "lit_clip.training.schedules.WarmupStableDecay"]
    parts += ["--model.lr_scheduler.cooldown_steps", "2", "--model.pretrained", "null"]
    printed = in_process(*words("fit", caption_table), *parts, "--print_config")
    assert printed.returncode == 0, printed.stderr
    model = yaml.safe_load(printed.stdout)["model"]
    assert model["pretrained"] is None  # and no file named "None"
    assert model["optimizer"]["class_path"] == "timm.optim.Lion"
    assert model["optimizer"]["init_args"]["lr"] == 1e-4
    assert model["optimizer"]["init_args"]["weight_decay"] == 0.0  # Lion's default, not AdamW's 0.2
    assert model["lr_scheduler"]["init_args"]["cooldown_steps"] == 2
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    again = in_process("fit", "--config", "printed.yaml", "--print_config")
    assert yaml.safe_load(again.stdout) == yaml.safe_load(printed.stdout)


def test_the_plan_shows_the_exchanged_parts(caption_table: Path, in_process: Cli) -> None:
    parts = ["--model.optimizer", "timm.optim.Muon", "--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR"]
    parts += ["--model.lr_scheduler.step_size", "3", "--model.loss", "lit_clip.losses.Matryoshka"]
    parts += ["--model.loss.loss", "lit_clip.losses.Contrastive", "--model.loss.dims", "[8, 16]"]
    result = in_process(*words("fit", caption_table), *parts, "--print_plan")
    assert result.returncode == 0, result.stderr
    assert "Muon: " in result.stdout
    assert "lr 0.02" in result.stdout
    assert "StepLR: gamma 0.1, step_size 3" in result.stdout
    assert "Matryoshka: dims 8, 16, loss Contrastive" in result.stdout


def test_a_schedule_that_demands_the_number_of_steps_is_told_that_it_gets_it(
    caption_table: Path, in_process: Cli, tmp_path: Path
) -> None:
    (tmp_path / "my_schedule.py").write_text(
        "from torch.optim.lr_scheduler import LambdaLR\n"
        "class Own(LambdaLR):\n    def __init__(self, optimizer, total_steps: int): ...\n"
    )
    result = in_process(*words("fit", caption_table), "--model.lr_scheduler", "my_schedule.Own")
    assert_user_error(result, "model.lr_scheduler", "give total_steps the default None")
