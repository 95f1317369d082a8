"""Patch dropout (FLIP): training steps use part of the patches, everything else whole images."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import PatchDropout
from lit_clip import LitCLIP
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.finetuning import Freeze
from lit_clip.models.flops import training_flops
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.training.activation_checkpointing import checkpoint_encoders

TEXT = TextTransformerConfig(context_length=8, vocab_size=50, width=16, layers=1, heads=1)
CONFIG = CLIPConfig(16, VisionTransformerConfig(image_size=32, patch_size=8, width=16, layers=2, heads=1), TEXT)


def lit_clip(share: float, **options: Any) -> LitCLIP:
    module = LitCLIP(CONFIG, **options)
    PatchDropout(share).setup(Trainer(logger=False), module, "fit")
    return module


@pytest.fixture
def block_inputs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Inputs of the blocks, ``[B, L, W]``; with :func:`placed`, 100 x the position in every channel."""
    found: list[torch.Tensor] = []
    from lit_clip.models.transformer import Transformer

    forward = Transformer.forward

    def spy(self: Transformer, x: torch.Tensor, layout: Any, *more: Any) -> torch.Tensor:
        ((count, length),) = layout.runs
        found.append(x.detach().view(count, length, -1).clone())
        return forward(self, x, layout, *more)

    monkeypatch.setattr(Transformer, "forward", spy)
    return found


def placed(module: LitCLIP) -> LitCLIP:
    """Make each token of an image 100 x its position; the first patch has position 1."""
    visual: Any = module.model.visual
    with torch.no_grad():
        visual.conv1.weight.zero_()
        visual.class_embedding.zero_()
        visual.positional_embedding.copy_(100.0 * torch.arange(17)[:, None].expand(-1, 16))
        visual.ln_pre = torch.nn.Identity()
    return module


def test_each_image_keeps_its_class_token_and_draws_new_patches_each_time(block_inputs: list[torch.Tensor]) -> None:
    visual = placed(lit_clip(0.75)).model.visual
    images = torch.zeros(64, 3, 32, 32)
    torch.manual_seed(0)
    visual(images), visual(images)
    first, second = ((x[:, :, 0] / 100).round().long() for x in block_inputs)
    assert first.shape == (64, 1 + 4)
    assert (first[:, 0] == 0).all()
    for row in first[:, 1:].tolist():
        assert len(set(row)) == 4
        assert min(row) >= 1
    assert len({tuple(sorted(row)) for row in first[:, 1:].tolist()}) > 32
    assert not torch.equal(first, second)
    draws = torch.cat([first, second])[:, 1:].flatten().bincount(minlength=17)[1:]
    assert draws.min() > 10  # 32 are expected for each of 16 patches


def test_evaluation_uses_all_patches(block_inputs: list[torch.Tensor]) -> None:
    module = placed(lit_clip(0.75)).eval()
    module.model.visual(torch.zeros(2, 3, 32, 32))
    assert (block_inputs[0][0, :, 0] / 100).round().tolist() == list(range(17))


def test_recomputation_uses_the_same_patches() -> None:
    """With different patches, the gradients of micro-batches and checkpointed blocks would belong to another loss."""
    tokens = torch.randint(1, 49, (6, 8), generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for size, checkpointed in ((None, False), (6, False), (None, True)):
        torch.manual_seed(0)
        module = lit_clip(0.5, micro_batch_size=size)
        module.model._tokenizer = CLIPTokenizer(8)  # only its padding id is read
        if checkpointed:
            checkpoint_encoders(module.model)
        torch.manual_seed(1)
        module.training_step(CaptionBatch(images, tokens, list("abcdef")), 0).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_dropped_patches_are_not_counted_as_flops() -> None:
    """Blocks process 5 of 17 tokens; patches are embedded before the choice."""
    whole, reduced = (training_flops(lit_clip(share).model) for share in (0.0, 0.75))
    assert whole is not None
    assert reduced is not None
    assert reduced.text == whole.text
    embedding = 2 * 2 * 16 * (3 * 8 * 8) * 16  # forward, and the gradient of the weights
    assert 0.2 < (reduced.image - embedding) / (whole.image - embedding) < 5 / 17 + 0.02


def test_a_frozen_encoder_drops_no_patches() -> None:
    frozen = [training_flops(lit_clip(share, freeze=Freeze(image="all")).model) for share in (0, 0.5)]
    assert frozen[0] == frozen[1] is not None


def test_a_model_without_patches_is_refused() -> None:
    resnet = CLIPConfig(16, ResNetConfig((1, 1, 1, 1), 16, 32), TEXT)
    with pytest.raises(InputError, match=r"callbacks\.PatchDropout: ModifiedResNet has no patches"):
        PatchDropout(0.5).setup(Trainer(logger=False), LitCLIP(resnet), "fit")
    with pytest.raises(InputError, match=r"PatchDropout\.share: 1\.0 must be at least 0 and below 1"):
        PatchDropout(1.0)
