"""Every shipped configuration parses against the code it names, and says what it costs."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_clip.cli import CLI, run
from lit_clip.registry import resolve_architecture
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"quickstart", "finetune_table", "pretrain_vit_b32", "zero_shot_imagenet"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses_and_its_classes_and_options_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)  # its data may not be here
    for name in ("IMAGENET", "CLASSES", "HELD_OUT", "IMAGE_WEIGHTS", "TEXT_ENCODER"):
        monkeypatch.setenv(name, name.lower())
    command = run(args=["--config", str(path)], execute=False)
    architecture = command.config.model.architecture  # None: that of the checkpoint that is given
    assert not isinstance(architecture, str) or resolve_architecture(architecture)  # sizes have been checked by parsing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command_cost_and_result(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("# ")]
    for word in ("command:", "cost:", "result:"):
        assert any(line.startswith(f"# {word}") for line in head), f"{path.name} does not say its {word}"


@pytest.mark.parametrize("name", ["finetune_table", "quickstart"])
def test_last_ckpt_is_the_last_epoch_however_bad_it_is(name: str) -> None:
    """Lightning's ``save_last`` beside a ``monitor`` copies the best: the table at the end was of another model."""
    trainer = run(args=["--config", str(ROOT / f"configs/{name}.yaml")], execute=False).trainer
    saving = trainer.checkpoint_callback
    assert isinstance(saving, ModelCheckpoint)
    assert (saving.filename, saving.monitor, saving._enable_version_counter) == ("last", None, False)
