"""The training monitor logs gradient norms and warns of a loss that stays at its baseline."""

import csv
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from callbacks import TrainingMonitor
from callbacks.monitor import gradient_norms
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Sigmoid
from lit_clip.losses.contrastive import sigmoid_loss
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.test_module import data_for, trainer


def run(module: LitCLIP, table: Path, folder: Path, monitor: TrainingMonitor, **options: Any) -> list[str]:
    """Fit, logging every step, and return the monitor's warnings."""
    settings: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0, "log_every_n_steps": 1, **options}
    callbacks = [*settings.pop("callbacks", []), monitor]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, logger=CSVLogger(folder), callbacks=callbacks, **settings).fit(module, data_for(module, table))
    return [str(warning.message) for warning in caught if "learned nothing" in str(warning.message)]


def logged(folder: Path, name: str) -> list[float]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_gradient_norms_are_those_of_each_encoder(tiny_config: CLIPConfig) -> None:
    model = LitCLIP(tiny_config).model
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 2.0 if name.startswith("visual.") else 3.0)
    norms = gradient_norms(model)
    image = sum(p.numel() for p in model.visual.parameters())
    text = sum(p.numel() for p in model.parameters()) - image - 1  # without logit_scale
    assert norms["image"].item() == pytest.approx(2 * image**0.5, rel=1e-5)
    assert norms["text"].item() == pytest.approx(3 * text**0.5, rel=1e-5)


def test_a_frozen_encoder_has_no_norm(tiny_config: CLIPConfig) -> None:
    model = LitCLIP(tiny_config).model
    model.visual.requires_grad_(False)
    assert gradient_norms(model).keys() == {"text"}


def test_the_norm_of_sharded_gradients_is_that_of_the_whole_gradient(ranks: Callable[..., None]) -> None:
    """Each rank asserts for itself; the fixture fails unless all of them succeed."""
    ranks("norms_of_shards", 2, script="ranks_stability.py")


class Norms(Callback):
    """Record the norm of the text encoder's gradient after the backward pass, before it is unscaled and clipped."""

    def __init__(self) -> None:
        self.text: list[float] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.text.append(float(gradient_norms(module.model)["text"]))


@pytest.mark.parametrize("scale", [1, 2**10])
def test_logged_norms_are_before_clipping_and_without_the_scale_of_16_mixed(
    scale: int, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "gradient_clip_val": 0.01}
    if scale > 1:  # as on a GPU; from the name alone Lightning would choose bf16-mixed on a CPU
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
    norms = Norms()
    run(
        LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=1)),
        caption_table,
        tmp_path,
        TrainingMonitor(),
        callbacks=[norms],
        **options,
    )
    assert logged(tmp_path, "train/text_gradient_norm") == pytest.approx([norm / scale for norm in norms.text])
    assert min(norms.text) / scale > 0.1
    assert len(logged(tmp_path, "train/image_gradient_norm")) == 4


@pytest.mark.parametrize("pairs", [2, 16, 100])
def test_the_uninformed_loss_is_the_lowest_that_equal_features_reach(pairs: int) -> None:
    features = F.normalize(torch.ones(pairs, 4, dtype=torch.float64), dim=-1)
    target = torch.arange(pairs)
    softmax = F.cross_entropy(5 * features @ features.T, target)
    assert Contrastive().chance_loss(pairs) == pytest.approx(float(softmax))
    scale = torch.tensor(0.0, dtype=torch.float64)  # only the bias matters
    biases = torch.linspace(-8, 2, 300, dtype=torch.float64)
    least = min(float(sigmoid_loss(features, features, scale, bias)) for bias in biases)
    assert Sigmoid().chance_loss(pairs) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize(
    ("bias", "baseline"), [(None, math.log(16)), (-math.log(15), math.log(16) + 15 * math.log(16 / 15))]
)
def test_a_run_that_does_not_learn_warns_once_of_its_losss_baseline(
    bias: float | None, baseline: float, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(
        replace(tiny_config, logit_bias=bias is not None),
        optimizer=partial(PaperAdamW, lr=0.0),
        lr_scheduler=partial(WarmupCosine, warmup_steps=2),
    )
    with torch.no_grad():
        module.model.visual.proj.fill_(0.0)  # all images look alike
        if module.model.logit_bias is not None:
            module.model.logit_bias.fill_(bias)  # the value that is learnt when nothing else can be
    (message,) = run(module, caption_table, tmp_path, TrainingMonitor(stuck_steps=4))
    assert f"in the last 6 of 6 steps, and its baseline is {baseline:.3f}" in message
    assert "learning rate" in message
    assert logged(tmp_path, "train/loss") == pytest.approx([baseline] * 12)


def test_a_trained_model_and_one_in_warm_up_do_not_warn(
    overfitted: tuple[Path, Path], tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    checkpoint, table = overfitted
    learnt = LitCLIP.load_from_checkpoint(
        checkpoint, optimizer=partial(PaperAdamW, lr=1e-5), lr_scheduler=partial(WarmupCosine, warmup_steps=0)
    )
    assert run(learnt, table, tmp_path / "learnt", TrainingMonitor(stuck_steps=4)) == []
    assert max(logged(tmp_path / "learnt", "train/loss")) < 0.9 * math.log(16)
    warming = LitCLIP(
        tiny_config, optimizer=partial(PaperAdamW, lr=0.0), lr_scheduler=partial(WarmupCosine, warmup_steps=12)
    )
    messages = run(warming, caption_table, tmp_path / "warming", TrainingMonitor(stuck_steps=1))
    assert all("of 12 steps" in message for message in messages)  # at the end alone


def test_a_loss_that_is_not_finite_does_not_silence_the_warning() -> None:
    monitor, chance = TrainingMonitor(), math.log(16)
    monitor._last.extend((torch.tensor(loss), chance) for loss in (chance, math.nan))
    with pytest.warns(UserWarning, match="learned nothing"):
        monitor.on_train_end(cast(Any, SimpleNamespace(global_step=2)), LightningModule())


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(InputError, match="TrainingMonitor.stuck_steps: "):
        TrainingMonitor(stuck_steps=0)
