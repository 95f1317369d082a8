"""Encoders in a file of the working folder: training, resuming, using; and files that name what they may not."""

import copy
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Photo

from lit_clip.cli.main import command_words
from lit_clip.errors import InputError
from tests.cli.test_main import ROWS
from tests.conftest import lit_clip_command

Completed = subprocess.CompletedProcess[str]

ENCODERS = """
import torch
from torch import nn


class Image(nn.Module):
    image_size = 32

    def __init__(self, embed_dim, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.out = nn.Linear(16 * width, embed_dim)

    def forward(self, images):
        return self.out(self.stem(images).relu().flatten(1))


class Text(nn.Module):
    context_length = 16

    def __init__(self, embed_dim):
        super().__init__()
        self.words = nn.Embedding(49408, embed_dim)

    def forward(self, tokens):
        return self.words(tokens).mean(dim=1)
"""
YAML = """
model:
  architecture:
    embed_dim: 8
    image: {class_path: my_encoder.Image, init_args: {width: 6}}
    text: {class_path: my_encoder.Text}
trainer:
  callbacks:
    - {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {every_n_train_steps: 2, save_top_k: -1}}
"""
HOSTILE = 'open("RAN", "w").close()\nimport torch\n\n\nclass X(torch.nn.Module):\n    pass\n'


def fit_words(table: Path, *words: str) -> list[str]:
    data = ["--data", "datamodules.Captions", "--data.train", str(table), "--data.batch_size", "16"]
    quick = ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return ["fit", *words, *data, *quick, "--trainer.max_steps", "4"]


@pytest.fixture(scope="module")
def trained(caption_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoders, a configuration, a run of four steps, and a module that shows if it is imported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_encoder.py").write_text(ENCODERS, encoding="utf-8")
    (folder / "hostile.py").write_text(HOSTILE, encoding="utf-8")
    (folder / "own.yaml").write_text(YAML, encoding="utf-8")
    (folder / "photos").mkdir()
    for i in range(3):
        Photo.new("RGB", (40, 40), (80 * i, 200, 0)).save(folder / f"photos/{i}.png")
    done = lit_clip_command(folder, *fit_words(caption_table, "--config", "own.yaml"))
    assert done.returncode == 0, done.stderr
    return folder


def checkpoint_of(folder: Path, step: int = 4) -> Path:
    (path,) = (folder / "lightning_logs/version_0/checkpoints").glob(f"*step={step}.ckpt")
    return path


def test_a_run_resumes_from_its_saved_configuration_to_the_weights_of_an_uninterrupted_one(
    trained: Path, caption_table: Path, tmp_path: Path
) -> None:
    saved = trained / "lightning_logs/version_0/fit_config.yaml"
    (tmp_path / "my_encoder.py").write_text(ENCODERS, encoding="utf-8")
    half = str(checkpoint_of(trained, step=2))
    words = fit_words(caption_table, "--config", str(saved), "--ckpt_path", half)
    resumed = lit_clip_command(tmp_path, *words)
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(checkpoint_of(folder), weights_only=True) for folder in (tmp_path, trained))
    assert a["global_step"] == b["global_step"] == 4
    assert a["hyper_parameters"]["architecture"]["image"] == {
        "class_path": "my_encoder.Image",
        "init_args": {"width": 6},
        "image_size": 32,
    }
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name


def test_other_commands_open_the_checkpoint_once_the_module_is_named(trained: Path) -> None:
    model = str(checkpoint_of(trained))
    classify = ["classify", "photos", "--model", model, "--classes", "dog", "cat"]
    refused = lit_clip_command(trained, *classify)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        f"lit-clip: error: {model}: its image encoder is my_encoder.Image; import my_encoder first (in Python), "
        "or name it: lit-clip --import my_encoder COMMAND ..."
    )
    done = lit_clip_command(trained, "--import", "my_encoder", *classify)
    assert (done.returncode, "dog" in done.stdout) == (0, True), done.stderr
    files = []
    for devices in ("1", "2"):  # the second process is started with the same words
        files.append(trained / f"features{devices}.parquet")
        embed = ["embed", "photos", "--model", model, "--output", str(files[-1]), "--devices", devices]
        done = lit_clip_command(trained, "--import=my_encoder", *embed, "--accelerator", "cpu", "--num-workers", "0")
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()


TIMM = {"timm": "resnet18", "options": {"drop_rate": {"class_path": "hostile.X"}}}
IMPORT = "encoder is hostile.X; import hostile first (in Python), or name it: lit-clip --import hostile COMMAND"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("architecture.image.class_path", "hostile.X", f"its image {IMPORT}"),
        ("architecture.text.class_path", "hostile.X", f"its text {IMPORT}"),
        # Importing the module would change nothing for these, which are plain values.
        ("architecture.image", TIMM, "architecture.image: options.drop_rate: may not name a class ('hostile.X')"),
        ("freeze", {"class_path": "hostile.X"}, "freeze: has no setting 'class_path'; there are image, text"),
    ],
)
def test_a_module_that_a_checkpoint_names_is_not_imported(
    key: str, value: Any, line: str, trained: Path, caption_table: Path, in_process: Callable[..., Completed]
) -> None:
    checkpoint = copy.deepcopy(torch.load(checkpoint_of(trained), weights_only=True))
    *path, last = key.split(".")
    settings = checkpoint["hyper_parameters"]
    for name in path:
        settings = settings[name]
    settings[last] = value
    torch.save(checkpoint, trained / "hostile.ckpt")
    words = fit_words(caption_table, "--config", "own.yaml", "--ckpt_path", "hostile.ckpt", "--print_plan")
    done = in_process(*words, folder=trained)
    assert not (trained / "RAN").exists()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("lit-clip: error: hostile.ckpt: ")
    assert line in done.stderr
    if "class_path" in key:
        words = ["classify", "photos", "--model", "hostile.ckpt", "--classes", "dog"]
        done = in_process("--import", "my_encoder", *words, folder=trained)
        assert done.returncode == 2
        assert not (trained / "RAN").exists()


@pytest.mark.parametrize("row", [row for row in ROWS if "encoders" in row], ids=lambda row: row["encoders"])
def test_a_mistake_is_one_line(
    row: Mapping[str, str], trained: Path, caption_table: Path, in_process: Callable[..., Completed]
) -> None:
    (trained / "typo.yaml").write_text(YAML.replace("init_args: {width: 6}", "width: 6"), encoding="utf-8")
    (trained / "wrong.yaml").write_text(YAML.replace("width", "widht"), encoding="utf-8")
    words = shlex.split(row["encoders"])
    done = in_process(*(fit_words(caption_table, *words[1:]) if words[0] == "fit" else words), folder=trained)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("lit-clip: error: ") and row["line"] in line]
    assert "Traceback" not in done.stderr


def test_modules_to_import_stand_before_the_command() -> None:
    assert command_words(["--import", "a.b", "--import=c", "fit", "--import"]) == (["a.b", "c"], ["fit", "--import"])
    for words in (["--import"], ["--import="], ["--import", "--help"]):
        with pytest.raises(InputError, match="no module is named"):
            command_words(words)
