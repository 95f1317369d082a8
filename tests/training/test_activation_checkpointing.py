"""Activation checkpointing: the same training in less memory, for every kind of encoder."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks import ActivationCheckpointing
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, TimmConfig, height_width
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.models.layers import TOWERS, tower_blocks
from lit_clip.module import LitCLIP
from lit_clip.training.activation_checkpointing import checkpoint, checkpoint_blocks, checkpoint_encoders
from tests.helpers.ranks import CONFIG, make_batch
from tests.helpers.towers import FAMILIES, shaken, text_config

TEXT = TextTransformerConfig(context_length=16, vocab_size=50, width=64, layers=2, heads=1)
RESNET = CLIPConfig(16, ResNetConfig(layers=(2, 1, 1, 1), width=16, image_size=32), TEXT)
TIMM: dict[str, dict[str, Any]] = {
    "test_vit": {},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
}


def timm_config(name: str) -> CLIPConfig:
    size = 224 if name.startswith("swin") else 64
    options = {"drop_path_rate": 0.3, **TIMM[name]}
    return CLIPConfig(16, TimmConfig(name, image_size=size, options=options), TEXT)


def step_loss(module: LitCLIP) -> Tensor:
    """Return the contrastive loss of four pairs, with the encoders' dropout."""
    batch = make_batch(slice(0, 4))
    images = F.interpolate(batch.images.double() / 255, height_width(module.preprocessing.image_size))
    module.model.normalize = lambda _: images
    image, text = module(batch)
    logits = module.model.logit_scale.exp() * image @ text.T
    return F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))


def three_steps(config: CLIPConfig, share: float, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return losses, weights and running statistics of three optimiser steps in float64."""
    torch.manual_seed(0)
    module = shaken(LitCLIP(config, **options)).double()
    if share:
        checkpoint_encoders(module.model, share)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = step_loss(module)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, module.model.state_dict()


def assert_same_training(config: CLIPConfig, **options: Any) -> None:
    losses, weights = three_steps(config, 0.0, **options)
    our_losses, our_weights = three_steps(config, 1.0, **options)
    torch.testing.assert_close(our_losses, losses, rtol=1e-10, atol=1e-12)
    assert list(our_weights) == list(weights)
    torch.testing.assert_close(our_weights, weights, rtol=1e-10, atol=1e-12)


def test_the_papers_towers_train_to_the_same_weights() -> None:
    assert_same_training(CONFIG)


def test_batch_norm_in_the_modified_resnet_updates_its_statistics_once() -> None:
    assert_same_training(RESNET)


@pytest.mark.parametrize("name", TIMM)
def test_timm_towers_with_stochastic_depth_train_to_the_same_weights(name: str) -> None:
    assert_same_training(timm_config(name))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[pytest.mark.slow] * (family in ("bart", "distilbert", "mt5", "roberta")))
        for family in FAMILIES
    ],
)
def test_hugging_face_towers_with_dropout_train_to_the_same_weights(family: str, folders: dict[str, Path]) -> None:
    assert_same_training(text_config(folders[family], 16))


def test_partly_frozen_towers_train_to_the_same_weights() -> None:
    assert_same_training(CONFIG, freeze=Freeze(image="all", text=UnlockLast(1)))


def block_calls(config: CLIPConfig, share: float = 1.0, **options: Any) -> dict[str, float]:
    """Return how often a block of each tower runs in one training step, on average."""
    module = LitCLIP(config, **options).double()
    checkpoint_encoders(module.model, share)
    calls: list[str] = []
    blocks = {tower: tower_blocks(module.model, tower) for tower in TOWERS}
    for tower in TOWERS:
        for block in blocks[tower]:
            first = next(layer for layer in block.modules() if not list(layer.children()))
            first.register_forward_hook(lambda *_, tower=tower: calls.append(tower))
    step_loss(module).backward()
    return {tower: calls.count(tower) / len(blocks[tower]) for tower in TOWERS}


@pytest.mark.parametrize(("share", "runs"), [(0.0, 1), (0.5, 1.5), (0.25, 1.25), (1.0, 2)])
def test_a_share_of_the_blocks_runs_twice(share: float, runs: float) -> None:
    deep = replace(CONFIG, image=replace(CONFIG.image, layers=4), text=replace(CONFIG.text, layers=4))  # type: ignore
    assert block_calls(deep, share) == {"image": runs, "text": runs}


def test_a_share_is_not_rounded_up_because_of_floating_point() -> None:
    """0.28 of 25 blocks are 7; in floating point the product is slightly above 7."""
    text = replace(CONFIG.text, layers=25)  # type: ignore
    assert block_calls(replace(CONFIG, text=text), 0.28)["text"] == 1 + 7 / 25


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.5])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"ActivationCheckpointing\.share: .* must be above 0 and at most 1"):
        ActivationCheckpointing(share)


@pytest.mark.parametrize("name", TIMM)
def test_every_block_of_a_timm_tower_runs_twice(name: str) -> None:
    assert block_calls(timm_config(name)) == {"image": 2, "text": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_a_hugging_face_tower_runs_twice(family: str, folders: dict[str, Path]) -> None:
    assert block_calls(text_config(folders[family], 16)) == {"image": 2, "text": 2}


def test_only_trainable_blocks_run_twice() -> None:
    assert block_calls(RESNET) == {"image": 2, "text": 2}
    assert block_calls(CONFIG, freeze=Freeze(image="all", text=UnlockLast(1))) == {"image": 1, "text": 1.5}
    assert block_calls(CONFIG, freeze=Freeze(text="all")) == {"image": 2, "text": 1}


def test_nothing_is_recomputed_without_gradients_or_in_evaluation() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    calls = []
    block[0].register_forward_hook(lambda *_: calls.append(1))
    checkpoint_blocks([block])
    block.eval()(torch.ones(1, 3)).sum().backward()
    with torch.no_grad():
        block.train()(torch.ones(1, 3))
    assert len(calls) == 2
    block(torch.ones(1, 3)).sum().backward()
    assert len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.load(saved(model), weights_only=False)])
def test_a_copied_model_uses_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    """EMA deep-copies the model, and a model may be pickled for another process."""
    module = LitCLIP(CONFIG)
    checkpoint_encoders(module.model)
    twin = copied(module.model)
    before = twin.encode_image(torch.ones(1, 3, 32, 32))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    after = twin.encode_image(torch.ones(1, 3, 32, 32))
    assert after.abs().sum() > 0
    torch.testing.assert_close(after, before)
    after.sum().backward()
    assert twin.visual.proj.grad is not None
    assert module.model.visual.proj.grad is None


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nested_checkpointing_updates_batch_norm_once(momentum: float | None) -> None:
    """A micro-batch is a checkpointed segment whose blocks may be checkpointed too."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=momentum), nn.Dropout(0.5), nn.Linear(3, 3))
        return nn.Sequential(block, nn.BatchNorm1d(3, momentum=momentum)).double()

    x = torch.randn(8, 3, dtype=torch.double)
    plain, nested = make(), make()
    checkpoint_blocks([nested[0]])
    torch.manual_seed(1)
    expected = torch.cat([plain(part) for part in x.split(4)])
    torch.manual_seed(1)
    result = torch.cat([checkpoint(nested, part, inside=nested) for part in x.split(4)])
    torch.testing.assert_close(result, expected)
    for loss in (expected, result):
        (loss**3).sum().backward()
    torch.testing.assert_close(nested.state_dict(), plain.state_dict())
    assert nested[1].num_batches_tracked == 2
    assert nested[1].momentum == momentum
    for a, b in zip(nested.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
