"""The moving average of the weights: how it is computed, evaluated, saved, resumed and loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lit_clip
from callbacks import EMA
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig
from lit_clip.module import LitCLIP
from lit_clip.tools.guarded_output import silence
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.test_module import data_for, trainer

DECAY = 0.6


class Recorder(Callback):
    """Record one parameter after each step and in each validation."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(pl_module.model.visual.proj.detach().clone())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(pl_module.model.visual.proj.detach().clone())


def plain_average(weights: list[Tensor], start: int = 0) -> Tensor:
    average = weights[start]
    for weight in weights[start + 1 :]:
        average = DECAY * average + (1 - DECAY) * weight
    return average


Fit = Callable[..., tuple[LitCLIP, Recorder, Any]]


@pytest.fixture
def fit(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> Fit:
    """Fit a tiny model for two epochs of 4 steps."""

    def run(*callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> tuple[LitCLIP, Recorder, Any]:
        torch.manual_seed(0)
        rates: Any = {"optimizer": partial(PaperAdamW, lr=0.01), "lr_scheduler": partial(WarmupCosine, warmup_steps=1)}
        module, recorder = LitCLIP(tiny_config, **rates), Recorder()
        settings = {"max_epochs": 2, "limit_val_batches": 1, "limit_test_batches": 1, **options}
        # The recorder comes after EMA in the list, where Lightning's own callback would show it the current weights.
        fitting = trainer(tmp_path, callbacks=[*callbacks, recorder], **settings)
        fitting.fit(module, data_for(module, caption_table), ckpt_path=ckpt_path)
        return module, recorder, fitting

    return run


@pytest.mark.parametrize("start", [0, 2])
def test_the_average_is_that_of_a_plain_loop_and_training_continues_from_the_weights(start: int, fit: Fit) -> None:
    _, without, _ = fit()
    module, recorder, _ = fit(EMA(DECAY, start))
    for ours, expected in zip(recorder.steps, without.steps, strict=True):
        assert torch.equal(ours, expected)
    average = plain_average(recorder.steps, start)
    torch.testing.assert_close(module.model.visual.proj, average, rtol=0, atol=1e-6)
    for epoch, validated in enumerate(recorder.validated, start=1):
        expected = plain_average(recorder.steps[: 4 * epoch], start)
        torch.testing.assert_close(validated, expected, rtol=0, atol=1e-6)
        assert not torch.equal(validated, recorder.steps[4 * epoch - 1])


def test_the_average_has_the_precision_of_the_run(fit: Fit) -> None:
    """Lightning makes the weights float64 after the callback has copied them."""
    module, recorder, _ = fit(EMA(DECAY), precision="64-true")
    after: Any = module.model
    assert after.visual.proj.dtype == torch.float64
    torch.testing.assert_close(after.visual.proj, plain_average(recorder.steps), rtol=0, atol=1e-12)


class Operations(TorchDispatchMode):
    """Record operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_an_update_takes_a_few_operations_for_all_weights_and_equals_a_loop() -> None:
    resnet = ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32)
    module = LitCLIP(CLIPConfig(16, resnet, TextTransformerConfig(16, 50, 64, 1, 1))).double()
    running = SimpleNamespace(checkpoint_callbacks=[], global_step=0, precision_plugin=Precision())
    callback = EMA(DECAY)
    callback.setup(cast(Any, running), module, "fit")
    callback.on_fit_start(cast(Any, running), module)
    expected: dict[str, Tensor] = {}
    for step in range(1, 4):
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data += torch.rand_like(tensor) if tensor.is_floating_point() else step
        for name, value in module.state_dict().items():
            first = step == 1 or not value.is_floating_point()
            expected[name] = value.clone() if first else DECAY * expected[name] + (1 - DECAY) * value
        running.global_step = step
        with Operations() as seen:
            callback.on_train_batch_end(cast(Any, running), module, None, None, 0)
        assert len(expected) > 50
        assert len(seen.names) <= 8, seen.names  # of which all but two are of the count on the CPU
        assert sum("foreach" in name for name in seen.names) == (1 if step == 1 else 2)
    assert callback._average.n_averaged.device.type == "cpu"
    torch.testing.assert_close(callback._average.module.state_dict(), expected, rtol=1e-15, atol=1e-15)


def test_the_current_weights_are_evaluated_before_the_first_update(fit: Fit, tmp_path: Path) -> None:
    """Lightning's own callback evaluates the initial weights until then (footgun L15)."""
    options: dict[str, Any] = {"num_sanity_val_steps": 2}
    module, recorder, fitting = fit(EMA(DECAY, start_step=6), **options)
    assert torch.equal(recorder.validated[0], recorder.steps[3])
    torch.testing.assert_close(recorder.validated[1], plain_average(recorder.steps, 6), rtol=0, atol=1e-6)
    never, recorder, fitting = fit(EMA(DECAY, start_step=100))
    assert torch.equal(never.model.visual.proj, recorder.steps[-1])
    fitting.save_checkpoint(tmp_path / "never.ckpt")
    assert "weights" not in torch.load(tmp_path / "never.ckpt", weights_only=True)


def test_a_checkpoint_names_its_weights_as_the_average_and_loads_it(fit: Fit, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", "last")
    _, recorder, fitting = fit(EMA(DECAY), keep)
    average = plain_average(recorder.steps)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    for path in (tmp_path / "kept/last.ckpt", tmp_path / "after.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["weights"] == "exponential moving average"
        torch.testing.assert_close(checkpoint["state_dict"]["visual.proj"], average, rtol=0, atol=1e-6)
        current = checkpoint["current_model_state"]["model.visual.proj"]
        assert torch.equal(current, recorder.steps[-1])
        with pytest.warns(UserWarning, match=rf"{path.name}: the weights are the moving average"):
            loaded: Any = lit_clip.load_model(path)
        torch.testing.assert_close(loaded.visual.proj, average, rtol=0, atol=1e-6)


def test_a_resumed_run_keeps_both_copies_and_ends_like_an_uninterrupted_one(fit: Fit, tmp_path: Path) -> None:
    whole, _, _ = fit(EMA(DECAY), max_epochs=3, enable_checkpointing=False)
    keep = ModelCheckpoint(tmp_path, "middle-{step}", save_top_k=-1)
    fit(EMA(DECAY), keep, max_epochs=3)
    middle = tmp_path / "middle-step=4.ckpt"
    resumed, recorder, fitting = fit(EMA(DECAY), ckpt_path=middle, max_epochs=3, enable_checkpointing=False)
    assert len(recorder.steps) == 8
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert fitting.global_step == 12


@pytest.mark.parametrize(
    "length",
    [{"max_epochs": 2}, pytest.param({"max_epochs": -1, "max_steps": 6}, marks=pytest.mark.slow)],
    ids=["epochs", "steps"],
)
def test_a_finished_run_that_is_resumed_has_the_average_in_its_module(
    length: dict[str, Any], fit: Fit, caption_table: Path, tmp_path: Path
) -> None:
    """Lightning calls no hook of training when nothing is left to train."""
    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    finished, _, first = fit(EMA(DECAY), keep, **length)
    if "max_steps" in length:
        first.save_checkpoint(tmp_path / "last.ckpt")
    after = {name: value.clone() for name, value in finished.state_dict().items()}
    options = {"ckpt_path": tmp_path / "last.ckpt", "enable_checkpointing": False, **length}
    resumed, recorder, fitting = fit(EMA(DECAY), **options)
    assert recorder.steps == []
    data = data_for(resumed, caption_table)
    validated = [first.validate(finished, data, verbose=False)]
    for evaluate in (fitting.validate, fitting.test, partial(fitting.test, ckpt_path=tmp_path / "last.ckpt")):
        torch.testing.assert_close(resumed.state_dict(), after, rtol=0, atol=0)
        validated.append(evaluate(resumed, data, verbose=False))
    values = [{name.partition("/")[2]: value for name, value in found.items()} for (found,) in validated]
    assert values == values[:1] * 4
    torch.testing.assert_close(resumed.state_dict(), after, rtol=0, atol=0)
    fitting.save_checkpoint(tmp_path / "again.ckpt")
    saved, again = (torch.load(tmp_path / name, weights_only=True) for name in ("last.ckpt", "again.ckpt"))
    for part in ("state_dict", "current_model_state"):
        torch.testing.assert_close(again[part], saved[part], rtol=0, atol=0)


def test_a_run_resumed_without_the_average_goes_on_from_the_weights_of_the_last_step(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    _, plain, _ = fit(enable_checkpointing=False)
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    fit(EMA(DECAY), keep)
    middle = tmp_path / f"step={len(plain.steps) // 2}.ckpt"
    assert torch.load(middle, weights_only=True)["weights"] == "exponential moving average"
    silence()
    keep = ModelCheckpoint(tmp_path / "more", "{step}", save_top_k=-1)
    _, resumed, fitting = fit(keep, ckpt_path=middle)
    assert not [each for each in recwarn if "add the following callbacks" in str(each.message)]  # Lightning's advice
    assert len(resumed.steps) == len(plain.steps) // 2
    for ours, theirs in zip(resumed.steps, plain.steps[len(resumed.steps) :], strict=True):
        assert torch.equal(ours, theirs)
    assert f"{middle.name}: this run has no callbacks.EMA; it resumes from the weights of the last step" in caplog.text
    fitting.save_checkpoint(tmp_path / "without.ckpt")
    assert not {"weights", "current_model_state"} & torch.load(tmp_path / "without.ckpt", weights_only=True).keys()


def test_an_average_that_a_resumed_run_begins_starts_from_the_weights_after_its_first_step(
    fit: Fit, tmp_path: Path
) -> None:
    _, plain, _ = fit(enable_checkpointing=False)
    fit(ModelCheckpoint(tmp_path, "{step}", save_top_k=-1))
    middle = tmp_path / f"step={len(plain.steps) // 2}.ckpt"
    options: dict[str, Any] = {"ckpt_path": middle, "enable_checkpointing": False}
    module, resumed, _ = fit(EMA(DECAY), **options)
    after: Any = module.model
    assert torch.equal(resumed.steps[-1], plain.steps[-1])
    torch.testing.assert_close(after.visual.proj, plain_average(resumed.steps), rtol=0, atol=1e-6)


def test_after_an_error_the_module_has_the_current_weights(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    class Fails(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                raise RuntimeError("stop here")

    keep = ModelCheckpoint(tmp_path, "failed", save_on_exception=True, save_top_k=0)
    torch.manual_seed(0)
    module, recorder = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=1)), Recorder()
    used = [EMA(DECAY), recorder, Fails(), keep]
    fitting = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=2, callbacks=used)
    with pytest.raises(RuntimeError, match="stop here"):
        fitting.fit(module, data_for(module, caption_table))
    assert torch.equal(module.model.visual.proj, recorder.steps[-1])
    (saved,) = tmp_path.glob("failed*.ckpt")
    checkpoint = torch.load(saved, weights_only=True)
    assert torch.equal(checkpoint["current_model_state"]["model.visual.proj"], recorder.steps[-1])


def test_invalid_settings_are_refused(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"EMA.decay: 1.0"):
        EMA(1.0)
    with pytest.raises(InputError, match="save_weights_only"):
        fit(EMA(), ModelCheckpoint(tmp_path, save_weights_only=True))
