"""Parts named on the command line and in YAML: the model, its optimiser, schedule and rule of weight decay."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_clip.cli.lightning import run
from tests.cli.test_main import ROWS, Cli, assert_user_error, words
from tests.conftest import ROOT, TINY_YAML, lit_clip_command

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


# Data of one's own, in files of the working folder: transforms, a source, a data module, an evaluation set.


FILES = {
    "own_transforms.py": """
import random
from PIL import ImageOps

class Posterise:
    def __init__(self, bits: int = 4):
        self.bits = bits

    def __call__(self, image):
        return ImageOps.posterize(image, random.randint(1, self.bits))

def grey(image):
    return ImageOps.grayscale(image)
""",
    "own_source.py": """
from PIL import Image
from datamodules import CustomPairs

class Colours(CustomPairs):
    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def image(self, row):
        return Image.new("RGB", (40, 30), (row, 100, 255 - row))

    def captions(self, row):
        return [f"colour {row}"]
""",
    "own_data.py": """
from datamodules import CaptionDataModule
from own_source import Colours

class Data(CaptionDataModule):
    def __init__(self, count: int, batch_size: int = 8, num_workers: int = 0):
        super().__init__(batch_size, num_workers)
        self.count = count

    def sources(self, fit):
        return Colours(self.count), Colours(10)
""",
    "own_loaders.py": """
import torch
from lightning.pytorch import LightningDataModule
from lit_clip.batch import CaptionBatch

class Loaders(LightningDataModule):
    def val_dataloader(self):
        tokens = self.trainer.lightning_module.tokenize(["a", "b"])
        batch = CaptionBatch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tokens, ["0", "1"])
        return torch.utils.data.DataLoader([batch], batch_size=None)
""",
    "own_set.py": """
from PIL import Image
from lit_clip.evaluation.data import LabelledImages

class Squares(LabelledImages):
    class_names = ["red square", "blue square"]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40), ["red", "blue"][index % 2]), index % 2

    def labels(self):
        return [index % 2 for index in range(6)]

    def stamp(self):
        return "version 1"
""",
}
CONFIG = f"""
model: {{architecture: {TINY_YAML}}}
data:
  class_path: datamodules.Captions
  init_args:
    train: {{class_path: own_source.Colours, init_args: {{count: 20}}}}
    batch_size: 4
    num_workers: 0
    augmentation:
      - {{class_path: torchvision.transforms.v2.RandomResizedCrop, init_args: {{size: 32}}}}
      - {{class_path: own_transforms.Posterise, init_args: {{bits: 3}}}}
      - {{class_path: torchvision.transforms.v2.RandomRotation, init_args: {{degrees: 15}}}}
      - class_path: torchvision.transforms.v2.RandomApply
        init_args: {{transforms: [torchvision.transforms.v2.RandAugment], p: 0.5}}
      - own_transforms.grey
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: runs}}}}
  callbacks:
    - class_path: callbacks.ZeroShot
      init_args: {{sets: {{squares: {{images: {{class_path: own_set.Squares}}}}}}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with :data:`FILES` and a configuration; its modules are forgotten after the test."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    forget_modules()
    yield tmp_path
    forget_modules()


def forget_modules() -> None:
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def test_parts_of_the_working_folder_are_trained_with_and_evaluated(folder: Path) -> None:
    done = lit_clip_command(folder, "fit", "--config", "config.yaml")
    assert done.returncode == 0, done.stderr
    assert "zero_shot/squares/top1" in done.stdout
    saved = yaml.safe_load(next(folder.glob("runs/*/*/fit_config.yaml")).read_text())
    assert [
        part if isinstance(part, str) else part["class_path"] for part in saved["data"]["init_args"]["augmentation"]
    ] == [
        "torchvision.transforms.v2.RandomResizedCrop",
        "own_transforms.Posterise",
        "torchvision.transforms.v2.RandomRotation",
        "torchvision.transforms.v2.RandomApply",
        "own_transforms.grey",
    ]


@pytest.mark.usefixtures("folder")
def test_the_printed_configuration_can_be_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    """With the numbers of torchvision's transforms."""
    printed = []
    for config in ("config.yaml", "again.yaml"):
        with pytest.raises(SystemExit):
            run(args=["--config", config, "--print_config"], execute=False)
        printed.append(capsys.readouterr().out)
        Path("again.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    assert "RandomRotation" in printed[0]


@pytest.mark.parametrize(
    ("data", "pairs"), [(["own_data.Data", "--data.count", "9"], 10), (["own_loaders.Loaders"], 2)]
)
@pytest.mark.usefixtures("folder")
def test_a_data_module_of_ones_own_is_named_on_the_command_line(data: list[str], pairs: int) -> None:
    options = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    command = run(args=["--data", *data, "--model.architecture", TINY_YAML, *options], execute=False)
    predictions: Any = []
    command.model.on_validation_batch_end = lambda outputs, *_: predictions.append(len(outputs["keys"]))
    (metrics,) = command.trainer.validate(command.model, command.datamodule, verbose=False)
    assert sum(predictions) == pairs
    assert "val/loss" in metrics


@pytest.mark.parametrize("row", [row for row in ROWS if "parts" in row], ids=lambda row: row["parts"])
def test_mistakes_in_own_parts_are_one_line(row: Mapping[str, Any], folder: Path, in_process: Cli) -> None:
    failed = in_process("fit", "--config", "config.yaml", row["parts"], folder=folder)
    assert_user_error(failed, *([row["line"]] if isinstance(row["line"], str) else row["line"]))
