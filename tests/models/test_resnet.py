"""The paper's ResNet in channels-last, the memory format that its weights have on CUDA."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR

import callbacks
from lit_clip.models import resnet
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig
from lit_clip.models.resnet import ModifiedResNet
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from tests.test_module import data_for, trainer

CONFIG = CLIPConfig(
    embed_dim=16,
    image=ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32),
    text=TextTransformerConfig(context_length=16, width=32, layers=1, heads=1),
)
LAST, FIRST = torch.channels_last, torch.contiguous_format


def network() -> ModifiedResNet:
    torch.manual_seed(0)
    made = ModifiedResNet(ResNetConfig(layers=(2, 1, 1, 1), width=16, image_size=64), 16).double()
    for name, parameter in made.named_parameters():
        if name.endswith("bn3.weight"):  # otherwise most gradients are zero
            nn.init.ones_(parameter)
    return made


def in_format(module: Any, form: torch.memory_format) -> Any:
    """Change the memory format of a module's convolutions, as a user would; typed, unlike torch's method."""
    return module.to(memory_format=form)


def formats(module: nn.Module) -> set[torch.memory_format]:
    """Return the memory formats of the weights of all convolutions of more than one pixel."""
    weights = [each.weight for each in module.modules() if isinstance(each, nn.Conv2d) and each.kernel_size[0] > 1]
    return {LAST if weight.is_contiguous(memory_format=LAST) else FIRST for weight in weights}


def test_weights_get_the_format_of_the_device_that_they_are_moved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resnet.weight_format(torch.device("cuda", 1)) == LAST
    assert resnet.weight_format(torch.device("cpu")) == FIRST
    monkeypatch.setattr(resnet, "weight_format", lambda device: LAST if device.type == "cpu" else FIRST)
    with torch.device("meta"):
        model = CLIP(CONFIG)
    assert formats(model) == {FIRST}
    model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    assert formats(model) == {LAST}
    model.load_state_dict(CLIP(CONFIG).state_dict())
    model.half().float().train()
    assert formats(model) == {LAST}
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())  # an optimiser's too
    assert formats(model.to("meta")) == {FIRST}


def test_moves_on_one_device_leave_the_format_that_a_user_has_chosen() -> None:
    assert formats(CLIP(CONFIG).to("cpu").double()) == {FIRST}
    assert formats(in_format(CLIP(CONFIG), LAST).to("cpu").double()) == {LAST}


def test_features_gradients_and_state_are_those_of_channels_first() -> None:
    plain = network()
    last = in_format(copy.deepcopy(plain), LAST)
    assert formats(last) == {LAST}
    images = torch.randn(4, 3, 64, 64, dtype=torch.double)
    features = [model(images) for model in (plain, last)]
    torch.testing.assert_close(features[1], features[0], rtol=0, atol=1e-12)
    for found in features:
        found.square().sum().backward()
    for (name, ours), theirs in zip(last.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.stride() == ours.stride(), name  # so nothing converts it, and fused kernels take it
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    state = last.state_dict()
    for name, value in plain.state_dict().items():  # of BatchNorm too
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)
    third = network()
    third.load_state_dict(state)
    assert formats(third) == {FIRST}


def copies(model: ModifiedResNet, images: Tensor) -> Counter[str]:
    """Count the operators of a forward and backward pass under autocast that copy or convert."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            features = model(images)
        features.float().sum().backward()

    step()
    model.zero_grad()
    with torch.profiler.profile(acc_events=True) as profile:
        step()
    return Counter({event.key: event.count for event in profile.key_averages()})


def test_no_weight_and_no_gradient_of_a_convolution_is_converted_in_a_step() -> None:
    model, images = network().float(), torch.randn(2, 3, 64, 64)
    plain, last = copies(model, images), copies(in_format(model, LAST), images)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    assert plain["aten::copy_"] - last["aten::copy_"] >= convolutions
    assert plain["aten::contiguous"] > convolutions / 2
    assert last["aten::contiguous"] == 1  # the images


def fit(
    folder: Path, table: Path, form: torch.memory_format, steps: int, *used: Any, start: Path | None = None
) -> Path:
    """Train in float64 with the fused AdamW and weights of a format, and return the checkpoint at the end."""
    torch.manual_seed(0)
    settings = {"optimizer": partial(PaperAdamW, lr=1e-3), "lr_scheduler": partial(ConstantLR, factor=1.0)}
    module = in_format(LitCLIP(CONFIG, **settings), form)
    options: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False, "precision": "64-true"}
    fitting = trainer(folder, max_steps=steps, callbacks=callbacks.defaults(*used), **options)
    fitting.fit(module, data_for(module, table), ckpt_path=start, weights_only=True)
    assert formats(module) == {form}
    (optimizer,) = fitting.optimizers
    assert all(group["fused"] for group in optimizer.param_groups)
    path = folder / f"{form}_{steps}_{start and start.stem}.ckpt"
    fitting.save_checkpoint(path)
    return path


def assert_same(path: Path, expected: Path) -> None:
    ours, theirs = (torch.load(each, weights_only=True) for each in (path, expected))
    for state in {"state_dict", "current_model_state"} & theirs.keys():
        for name, value in theirs[state].items():
            torch.testing.assert_close(ours[state][name], value, rtol=0, atol=1e-9, msg=f"{state} {name}")


@pytest.mark.slow
def test_training_and_resuming_do_not_depend_on_the_format(caption_table: Path, tmp_path: Path) -> None:
    """A run of four steps, two of them in another format: moments are read in the strides of the weights."""
    run = partial(fit, tmp_path, caption_table)
    expected = run(FIRST, 4)
    assert_same(run(LAST, 4), expected)
    for first, second in ((FIRST, LAST), (LAST, FIRST)):
        assert_same(run(second, 4, start=run(first, 2)), expected)


def test_averaged_weights_do_not_depend_on_the_format(caption_table: Path, tmp_path: Path) -> None:
    expected, found = (fit(tmp_path, caption_table, form, 3, callbacks.EMA(0.5)) for form in (FIRST, LAST))
    assert_same(found, expected)
