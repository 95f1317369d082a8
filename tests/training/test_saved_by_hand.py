"""A checkpoint of a run that max_steps ends resumes at its next batch, whoever saved it."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import callbacks
from datamodules import Captions
from lit_clip import LitCLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.training.schedules import WarmupCosine


class Seen(Callback):
    """Keeps the epoch, the batch's number and its keys of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, list[str]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((trainer.current_epoch, batch_idx, list(batch.keys)))


def test_a_run_that_max_steps_ended_goes_on_at_its_next_batch(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    def fit(steps: int, resumed: Path | None = None, *savers: Callback) -> tuple[Trainer, list[Any]]:
        seen = Seen()
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=bool(savers),
            enable_model_summary=False,
            callbacks=[*callbacks.defaults(), seen, *savers],
        )
        trainer.fit(LitCLIP(tiny_config), Captions(str(caption_table), batch_size=12, num_workers=0), ckpt_path=resumed)
        return trainer, seen.steps

    whole = fit(10)[1]
    assert whole[3][:2] == (0, 3)
    assert whole[4][:2] == (1, 0)
    for steps in (2, 4):  # within an epoch, and at its end
        fit(steps)[0].save_checkpoint(tmp_path / "by_hand.ckpt")
        assert fit(10, tmp_path / "by_hand.ckpt")[1] == whole[steps:]
        fit(steps, None, ModelCheckpoint(tmp_path, f"saved_{steps}", save_on_train_epoch_end=True))
        assert fit(10, tmp_path / f"saved_{steps}.ckpt")[1] == whole[steps:]


def test_a_run_resumed_with_another_batch_ends_when_its_rate_does(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    def fit(
        batch_size: int, resumed: Path | None = None, savers: Sequence[Callback] = (), **limits: int
    ) -> tuple[Trainer, list[float]]:
        rates = Rates()
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=bool(savers),
            enable_model_summary=False,
            callbacks=[*callbacks.defaults(), rates, *savers],
            **limits,
        )
        module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=0))
        trainer.fit(module, Captions(str(caption_table), batch_size=batch_size, num_workers=0), ckpt_path=resumed)
        return trainer, rates.seen

    file = tmp_path / "saved.ckpt"
    fit(12, None, [ModelCheckpoint(tmp_path, "validated")], max_epochs=1)[0].save_checkpoint(file)
    steps = 4 + 2 * 9  # 58 pairs in batches of 12 and of 6
    expected = [5e-4 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(4, steps)]
    assert fit(6, file, max_epochs=3)[1] == pytest.approx(expected)
    assert fit(6, tmp_path / "validated.ckpt", max_epochs=3)[1] == pytest.approx(expected)
    fit(6, file, max_epochs=3, max_steps=7)[0].save_checkpoint(file)  # within an epoch of smaller batches
    assert fit(6, file, max_epochs=3)[1] == pytest.approx(expected[3:])
