"""States that a trainer restores from somebody's checkpoint: right, or one line before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import NonFiniteSteps
from callbacks.random_states import RandomStates
from lit_clip.errors import InputError
from lit_clip.training.lightning.checkpoint_io import load_the_same_checkpoint

NUMPYS = ("MT19937", torch.zeros(624, dtype=torch.int64), 10**6, 0, 0.0)


class Line(LightningModule):
    """The smallest run; what LitCLIP does with a checkpoint's states is in its setup."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def setup(self, stage: str) -> None:
        load_the_same_checkpoint(self.trainer)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, steps: int, checkpoint: str | None = None) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1)
    callbacks = [saves, NonFiniteSteps(), RandomStates()]
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=callbacks, **quiet)
    eight: Any = torch.ones(8, 1)
    trainer.fit(Line(), DataLoader(eight), ckpt_path=checkpoint)
    return trainer


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, 1)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    return torch.load(path, weights_only=True)


def state_of(checkpoint: dict[str, Any], callback: str) -> dict[str, Any]:
    return next(state for name, state in checkpoint["callbacks"].items() if name.startswith(callback))


def resume(checkpoint: dict[str, Any], folder: Path) -> Trainer:
    torch.save(checkpoint, "hostile.ckpt")
    return fit(folder, 3, "hostile.ckpt")


def test_an_untouched_checkpoint_resumes_with_torchs_schedule_and_replaces_its_own_files(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    assert any(type(value) is bool for value in saved["lr_schedulers"][0].values())
    assert resume(saved, tmp_path).global_step == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=3.ckpt"]


@pytest.mark.parametrize("key", ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"])
@pytest.mark.parametrize("form", ["{run}/../victim", "{run}/a/../../victim", "memory://victim", "{run}/notes.txt"])
@pytest.mark.parametrize("folder_known", [True, False])
def test_no_file_that_a_checkpoint_names_is_deleted(
    key: str, form: str, folder_known: bool, saved: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/important").touch()
    (tmp_path / "checkpoints/notes.txt").touch()
    state, path = state_of(saved, "ModelCheckpoint"), form.format(run=tmp_path / "checkpoints")
    state[key] = {path: torch.tensor(1.0)} if key == "best_k_models" else path
    if not folder_known:
        del state["dirpath"]  # Lightning takes that for the run's own
    with pytest.raises(InputError, match=r"hostile.ckpt: callbacks.*is no checkpoint in the folder of this run"):
        resume(saved, tmp_path)
    assert (tmp_path / "victim/important").exists()
    assert (tmp_path / "checkpoints/notes.txt").exists()


def test_a_run_in_another_folder_leaves_the_checkpoints_of_the_one_before(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    assert resume(saved, tmp_path / "other").global_step == 3
    assert (tmp_path / "checkpoints/step=1.ckpt").exists()


def _set(*at: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(checkpoint: dict[str, Any]) -> None:
        inner: Any = checkpoint
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = value

    return change


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_set("loops", value=[]), "loops: .* must be a mapping"),
        (_set("loops", "fit_loop", "epoch_progress", value={}), "loops.fit_loop.epoch_progress: lacks total"),
        (_set("loops", "validate_loop", "batch_progress", "total", "ready", value="x"), "must be a whole number"),
        (_set("callbacks", value=LOOP), "nested too deeply"),
        (_set("callbacks", "NonFiniteSteps", value={"a": 1}), "cannot be restored .*steps.* is missing"),
        (_set("callbacks", "NonFiniteSteps", value={"steps": "many"}), "NonFiniteSteps.steps: 'many' must be a whole"),
        (_set("optimizer_states", 0, "state", value=-1), "cannot be restored"),
        (_set("optimizer_states", 0, "state", 0, "exp_avg", value=torch.zeros(3)), r"exp_avg of shape \[3\] there"),
        (_set("optimizer_states", 0, "state", 0, "exp_avg", value=torch.zeros(1, 1, device="meta")), "on the meta"),
        (_set("optimizer_states", 0, "state", 0, "step", value="x"), "cannot be restored"),
        (_set("random_states", 0, "python", value=(3, (1, 2), None)), "cannot be restored"),
        (_set("random_states", 0, "numpy", value=NUMPYS), "numpy's position 1000000 must be within its 624 keys"),
        (_set("random_states", value=3), "random_states: 3 must be a list"),
        (_set("epoch", value="x"), "epoch: 'x' must be a whole number"),
    ],
)
def test_a_damaged_state_is_one_line_before_the_first_step(
    change: Callable[[dict[str, Any]], None], line: str, saved: dict[str, Any], tmp_path: Path
) -> None:
    change(saved)
    with pytest.raises(InputError, match=rf"^hostile.ckpt: .*{line}"):
        resume(saved, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=1.ckpt"]
