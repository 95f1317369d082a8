"""``trainer.sync_batchnorm`` keeps the network, what is frozen in it, and its checkpoints."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, TimmConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.training.lightning.strategies import SyncBatchNorm, synchronise_batch_norm

IMAGES: dict[str, Any] = {
    "openai": ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8),
    "efficientnet": TimmConfig(timm="test_efficientnet", image_size=32),
    "efficientnet_lite": TimmConfig(timm="tf_efficientnet_lite0", image_size=32),
    "resnet": TimmConfig(timm="test_resnet", image_size=32),
}


def module_with(image: str, **options: Any) -> LitCLIP:
    text = TextTransformerConfig(context_length=8, width=16, layers=1, heads=1, vocab_size=49408)
    return LitCLIP(CLIPConfig(embed_dim=16, image=IMAGES[image], text=text), **options)


@pytest.mark.parametrize("image", IMAGES)
def test_the_network_is_the_same_while_batch_norm_is_synchronised_and_afterwards(image: str) -> None:
    module = module_with(image).eval()
    for name, buffer in module.named_buffers():  # as if it had been trained
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = module.model.visual(images)
    kinds = {name: type(layer) for name, layer in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    plugin = SyncBatchNorm()
    assert plugin.apply(module) is module
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules())
    with torch.no_grad():
        assert torch.equal(module.model.visual(images), expected)
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
    for layer in module.modules():  # trained, and moved to another device
        if isinstance(layer, nn.SyncBatchNorm) and layer.running_mean is not None:
            layer.running_mean = layer.running_mean + 0.25
            layer.weight.data = layer.weight.data * 1.5
    with torch.no_grad():
        trained = module.model.visual(images)
    assert not torch.equal(trained, expected)
    assert plugin.revert(module) is module
    assert {name: type(layer) for name, layer in module.named_modules()} == kinds
    with torch.no_grad():
        assert torch.equal(module.model.visual(images), trained)


def test_torchs_converter_would_leave_out_activations() -> None:
    module = module_with("efficientnet_lite").eval()
    with torch.no_grad():
        expected = module.model.visual(torch.ones(1, 3, 32, 32))
        TorchSyncBatchNorm().apply(module)
        assert not torch.allclose(module.model.visual(torch.ones(1, 3, 32, 32)), expected, atol=1e-3)


@pytest.mark.parametrize("image", ["openai", "efficientnet", "resnet"])
def test_frozen_batch_norm_stays_in_evaluation_mode(image: str) -> None:
    module = module_with(image, freeze=Freeze(image=UnlockLast(1)))
    before = {name: layer.training for name, layer in module.named_modules()}
    plugin = SyncBatchNorm()
    plugin.apply(module)
    module.eval()
    module.train()
    assert {name: layer.training for name, layer in module.named_modules()} == before
    modes = {layer.training for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)}
    assert modes == {True, False}
    plugin.revert(module)
    module.train()
    assert {name: layer.training for name, layer in module.named_modules()} == before


def test_it_replaces_lightnings_own_and_is_refused_where_torch_has_none() -> None:
    on_cpu = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2)
    synchronise_batch_norm(on_cpu)  # not asked for
    synchronise_batch_norm(SingleDeviceStrategy("cpu"))  # nothing to synchronise
    on_cpu._layer_sync = TorchSyncBatchNorm()
    with pytest.raises(InputError, match="^trainer.sync_batchnorm: torch has no synchronised BatchNorm for cpu; leave"):
        synchronise_batch_norm(on_cpu)
    on_gpu = DDPStrategy(parallel_devices=[torch.device("cuda", 0)] * 2)
    on_gpu._layer_sync = TorchSyncBatchNorm()
    synchronise_batch_norm(on_gpu)
    assert isinstance(on_gpu._layer_sync, SyncBatchNorm)
