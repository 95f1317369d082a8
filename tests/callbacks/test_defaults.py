"""Default callbacks: which there are, their order, and that no run goes without them unnoticed."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

import callbacks
from callbacks import (
    EMA,
    ExpectedTime,
    NonFiniteSteps,
    PatchDropout,
    Preemption,
    PrintPlan,
    PrintResults,
    ProgressLines,
    RandomStates,
    SkippedSamples,
    Throughput,
    Without,
)
from datamodules.loading.bad_samples import BadSamples
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from tests.conftest import TINY_YAML
from tests.test_module import data_for, trainer

MIDDLE = (PrintPlan, ExpectedTime, ProgressLines, PrintResults, SkippedSamples, NonFiniteSteps)


def kinds_of(*given: Callback) -> list[type]:
    return [type(callback) for callback in callbacks.defaults(*given) if not isinstance(callback, Without)]


def test_given_callbacks_go_after_preemption_before_the_others() -> None:
    assert kinds_of() == [Preemption, *MIDDLE, RandomStates]
    assert kinds_of(EMA(0.5)) == [Preemption, EMA, *MIDDLE, RandomStates]
    assert kinds_of(Throughput(), PatchDropout())[1:3] == [PatchDropout, Throughput]  # first what changes the model


def test_callbacks_are_left_out_by_name_and_others_of_the_name_stay() -> None:
    kinds = kinds_of(Without(["PrintPlan", "NonFiniteSteps"]), NonFiniteSteps("skip"))
    assert kinds == [Preemption, NonFiniteSteps, *MIDDLE[1:-1], RandomStates]
    with pytest.raises(InputError, match="Preemption stays"):
        callbacks.defaults(Without(["Preemption"]))
    with pytest.raises(InputError, match="Without: EMA is none of the callbacks"):
        callbacks.defaults(Without(["EMA"]))


class QuietPlan(PrintPlan):
    """A user's own version of a default callback."""


@pytest.mark.parametrize("given", [NonFiniteSteps("skip"), QuietPlan()], ids=["its class", "a subclass"])
def test_a_given_callback_replaces_the_default_of_its_class(given: Callback) -> None:
    ema = EMA(0.5)
    result = callbacks.defaults(ema, given)
    assert [type(result[0]), type(result[-1])] == [Preemption, RandomStates]
    assert result[1:3] == [ema, given]
    remaining = [kind for kind in MIDDLE if not isinstance(given, kind)]
    assert [type(callback) for callback in result[3:-1]] == remaining


def test_a_given_preemption_replaces_the_first_default() -> None:
    preemption = Preemption()
    assert [callback for callback in callbacks.defaults(preemption) if isinstance(callback, Preemption)] == [preemption]


def test_fit_adds_the_default_callbacks(
    cli: Callable[..., subprocess.CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    table = str(caption_table)
    options = ["--model.architecture", TINY_YAML, "--data.batch_size", "16", "--data.num_workers", "0"]
    options += ["--data.bad_samples.on_error", "skip", "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.accelerator", "cpu"]
    data = ["--data", "datamodules.Captions", "--data.train", table, "--data.val", table]
    result = cli("fit", *data, *options, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")
    assert result.returncode == 0, result.stderr
    assert "pairs per step" in result.stdout  # PrintPlan
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["validation_due"] is False  # Preemption
    assert checkpoint["skipped_samples"] == {"drawn": 16, "counts": {}}  # SkippedSamples
    assert checkpoint["callbacks"]["NonFiniteSteps"] == {"steps": 0}
    assert len(checkpoint["random_states"]) == 1  # RandomStates


def test_skipping_samples_without_counting_them_is_refused(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(tiny_config)
    data = data_for(module, caption_table, bad_samples=BadSamples("skip"))
    message = r"data\.bad_samples\.on_error: skip needs the callback that counts and limits .*; pass Trainer\(callbacks"
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, max_steps=1, callbacks=[NonFiniteSteps()]).fit(module, data)
    with pytest.raises(InputError, match=message):
        trainer(tmp_path).validate(module, data)
    trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[SkippedSamples()]).fit(module, data)


def test_fit_without_the_defaults_warns(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> None:
    module = LitCLIP(tiny_config)
    with pytest.warns(UserWarning, match=r"nothing stops this run when its loss is not finite.*callbacks\.defaults"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data_for(module, caption_table))
