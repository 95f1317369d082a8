"""Micro-batches: gradients of the whole batch, also with dropout and BatchNorm in the encoders."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses.contrastive import contrastive_loss
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, TimmConfig
from lit_clip.module import LitCLIP
from tests.helpers.ranks import CONFIG, PAIRS, make_batch, make_module

TEXT = TextTransformerConfig(context_length=16, vocab_size=50, width=64, layers=1, heads=1)
RANDOM = TimmConfig(
    timm="vit_tiny_patch16_224",
    image_size=32,
    options={"depth": 2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.3, "patch_drop_rate": 0.5},
)
STATISTICS = ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32)


def gradients(module: LitCLIP, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}


def plain_loss(module: LitCLIP, batch: CaptionBatch, parts: int) -> Tensor:
    """Return the loss of a batch encoded in parts, in one graph that keeps all activations."""
    features = [module(part) for part in batch.split(parts)]
    image, text = (torch.cat(x) for x in zip(*features, strict=True))
    return contrastive_loss(image, text, image, text, module.model.logit_scale.exp())


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm() + 1e-12, name  # some gradients are zero


@pytest.mark.parametrize("image", [RANDOM, STATISTICS], ids=["dropout and patch dropout", "BatchNorm"])
def test_random_numbers_are_replayed_and_statistics_updated_once(image: TimmConfig | ResNetConfig) -> None:
    architecture = CLIPConfig(embed_dim=16, image=image, text=TEXT)
    batch, parts = make_batch(slice(0, PAIRS)), 3
    ours, theirs = (make_module(architecture=architecture, micro_batch_size=3) for _ in range(2))
    torch.manual_seed(5)
    expected = gradients(theirs, plain_loss(theirs, batch, parts))
    torch.manual_seed(5)
    assert_equal(gradients(ours, ours.training_step(batch, 0)), expected, 1e-12)
    assert torch.rand(1) == _next_random(theirs, batch, parts), "the generator's state differs from plain encoding's"
    for (name, our), their in zip(ours.model.named_buffers(), theirs.model.buffers(), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    if image is RANDOM:  # otherwise the test would also pass without dropout
        torch.manual_seed(6)
        other = gradients(theirs, plain_loss(theirs, batch, parts))
        assert any((other[name] - expected[name]).norm() > 0.01 * expected[name].norm() for name in expected)
    else:
        assert any(isinstance(m, nn.BatchNorm2d) and m.num_batches_tracked == parts for m in ours.modules())


def _next_random(module: LitCLIP, batch: CaptionBatch, parts: int) -> Tensor:
    """Return the next random number after plain encoding, and restore the module's statistics."""
    before = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    torch.manual_seed(5)
    plain_loss(module, batch, parts)
    number = torch.rand(1)
    for name, buffer in module.model.named_buffers():
        buffer.copy_(before[name])
    return number


@pytest.mark.parametrize("options", [{}, {"checkpointed": True}, {"freeze": {"text": "all", "image": None}}])
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_any_micro_batch_size_gives_the_gradient_of_the_whole_batch(size: int, options: dict[str, Any]) -> None:
    batch = make_batch(slice(0, PAIRS))
    whole, split = make_module(**options), make_module(**options, micro_batch_size=size)
    expected = gradients(whole, whole.training_step(batch, 0))
    assert_equal(gradients(split, split.training_step(batch, 0)), expected, 1e-12)


def test_gradients_of_bfloat16_micro_batches_are_summed_in_float32() -> None:
    """If micro-batches shared one bfloat16 copy of the weights, their gradients would be summed in bfloat16."""
    batch = make_batch(slice(0, PAIRS))

    def error(**options: Any) -> float:
        module = make_module(**options).float()
        module.model.normalize = lambda images: images.float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(batch, 0)
        ours = gradients(module, loss)
        return float(torch.stack([(ours[n] - exact[n]).norm() / exact[n].norm() for n in exact]).mean())

    module = make_module()
    exact = gradients(module, module.training_step(batch, 0))
    whole, split = error(), error(micro_batch_size=1)
    assert whole < 0.1
    assert split < 1.5 * whole


def big_batch() -> CaptionBatch:
    """Return 64 pairs, all captions of full length, so that equal micro-batches cost the same."""
    batch = make_batch(slice(0, PAIRS))
    tokens = batch.tokens.clamp(max=48).repeat(8, 1)
    tokens[:, -1] = 49  # end of text
    return CaptionBatch(batch.images.repeat(8, 1, 1, 1), tokens, batch.keys * 8, list(batch.captions) * 8)


@pytest.mark.parametrize("size", [64, 32, pytest.param(8, marks=pytest.mark.slow)])
def test_every_micro_batch_but_the_last_is_computed_again(size: int) -> None:
    """Operations that torch counts, the loss apart: three forward passes, and (p - 1) / p of one more."""
    batch, module = big_batch(), make_module(micro_batch_size=size)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        module.training_step(batch, 0)
    with FlopCounterMode(display=False) as step:
        module.training_step(batch, 0).backward()
    whole, split = make_module(), make_module(micro_batch_size=size)
    with FlopCounterMode(display=False) as once:
        whole.training_step(batch, 0).backward()
    with FlopCounterMode(display=False) as encoders, torch.no_grad():
        split(batch)
    parts = len(batch.images) // size
    assert step.get_total_flops() - once.get_total_flops() == encoders.get_total_flops() * (parts - 1) // parts
    assert encoders.get_total_flops() > 0.9 * forward.get_total_flops()


def test_the_forward_pass_keeps_the_last_micro_batchs_activations_and_no_others() -> None:
    def saved_bytes(size: int | None, batch: CaptionBatch) -> int:
        module = make_module(micro_batch_size=size)
        storages: dict[int, int] = {}
        alive = []  # a freed storage's address could be reused

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module.training_step(batch, 0)
        parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in parameters)

    batch = big_batch()
    last = saved_bytes(None, batch._rows(slice(56, 64)))
    assert last <= saved_bytes(8, batch) < 1.1 * last + 8 * batch.images.nbytes  # float64 features of all, and pixels


def test_the_kept_micro_batch_and_a_recomputed_one_do_not_coexist() -> None:
    """The last one is kept: the backward pass begins with it, and then computes the others again, one after another."""
    module, seen = make_module(micro_batch_size=2), list[float]()
    normalize = module.model.normalize
    module.model.normalize = lambda images: seen.append(float(images.sum())) or normalize(images)
    module.training_step(make_batch(slice(0, PAIRS)), 0).backward()
    assert len(set(seen[:4])) == 4
    assert seen[4:] == seen[2::-1]


def test_accumulated_gradients_are_refused_in_favour_of_micro_batches() -> None:
    module = LitCLIP(CONFIG)
    module._trainer = type("Trainer", (), {"accumulate_grad_batches": 4, "precision": "32-true", "callbacks": ()})()  # pyright: ignore
    advice = r"set data.batch_size to 4 times its value and model.micro_batch_size"
    with pytest.raises(InputError, match=rf"accumulate_grad_batches: 4 adds no negatives.*; {advice}"):
        module.on_fit_start()
    with pytest.raises(InputError, match="micro_batch_size: 0 must be at least 1"):
        LitCLIP(CONFIG, micro_batch_size=0)
