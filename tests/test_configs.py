"""Every shipped configuration parses against the code it names, and says what it costs."""

from pathlib import Path

import pytest

from lit_clip.cli import CLI, run
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"quickstart", "finetune_table", "pretrain_vit_b32", "zero_shot_imagenet"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses_and_its_classes_and_options_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)  # its data may not be here
    for name in ("IMAGENET", "CLASSES", "HELD_OUT"):
        monkeypatch.setenv(name, name.lower())
    command = run(args=["--config", str(path)], execute=False)
    assert command.config.model.architecture is not None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command_cost_and_result(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("# ")]
    for word in ("command:", "cost:", "result:"):
        assert any(line.startswith(f"# {word}") for line in head), f"{path.name} does not say its {word}"
