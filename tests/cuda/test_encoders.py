"""Features and gradients on a GPU equal those of the CPU in float64: texts packed and padded, compiled, ResNets."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks.compile import compile_blocks
from lit_clip.losses.contrastive import contrastive_loss
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    ResNetConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    height_width,
)
from lit_clip.weights.load import create_model
from tests.cuda.devices import DEVICES, OTHERS, REAL
from tests.helpers.towers import FAMILIES, TEXTS

LENGTHS = [5, 9, 3, 14, 9, 6, 11, 4]
CONTEXT = 77
TEXT = TextTransformerConfig(context_length=CONTEXT, vocab_size=50, width=64, layers=2, heads=1)
VIT = CLIPConfig(16, VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1), TEXT)
RESNET = CLIPConfig(16, ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32), TEXT)


def inputs() -> tuple[Tensor, Tensor]:
    """Return images as floats and texts of ``LENGTHS``, padded to the whole context."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(LENGTHS), CONTEXT, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        tokens[row, : length - 1] = torch.randint(1, 49, (length - 1,), generator=generator)
        tokens[row, length - 1] = 49
    return torch.randn(len(LENGTHS), 3, 32, 32, generator=generator), tokens


def gradients(model: CLIP, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Return the features, and the gradients of the loss as defined."""
    model.zero_grad()
    contrastive_loss(image, text, image, text, model.logit_scale.exp()).backward()
    found = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"image": image.detach().cpu(), "text": text.detach().cpu(), **found}


def expected(model: CLIP) -> dict[str, Tensor]:
    """Return the same in float64 on the CPU, one unpadded text at a time."""
    exact, (images, tokens) = copy.deepcopy(model).double(), inputs()
    texts = [exact.encode_text(row[None, :length]) for row, length in zip(tokens, LENGTHS, strict=True)]
    text = torch.nn.functional.normalize(torch.cat(texts))
    return gradients(exact, exact.encode_image(images.double(), normalize=True), text)


def computed(model: CLIP, device: str, lengths: Sequence[int] | None) -> dict[str, Tensor]:
    model, (images, tokens) = model.to(device), inputs()
    image = model.encode_image(images.to(device), normalize=True)
    return gradients(model, image, model.encode_text(tokens.to(device), normalize=True, lengths=lengths))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        assert (ours[name].double() - exact).norm() <= tolerance * exact.norm() + 1e-6, (
            name
        )  # the gradient of keys' bias is zero


@pytest.mark.parametrize("device", DEVICES)
def test_packed_texts_have_the_features_and_gradients_of_single_ones(device: str) -> None:
    model, rows = CLIP(VIT), []
    model.transformer.resblocks[0].register_forward_pre_hook(
        lambda _, args: rows.append(args[0].numel() // args[0].shape[-1])
    )
    assert_close(computed(model, device, LENGTHS), expected(model.cpu()))
    assert rows[0] <= len(LENGTHS) * CONTEXT / 4  # else the padding is computed


@pytest.mark.parametrize("device", DEVICES)
def test_padded_texts_have_the_features_and_gradients_of_single_ones(device: str) -> None:
    model = CLIP(VIT)
    assert_close(computed(model, device, None), expected(model.cpu()))


@pytest.mark.parametrize(
    # tests/callbacks/test_compile.py compares the gradients of the same on a CPU
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), *REAL[1:]],
)
def test_compiled_blocks_compute_the_same(device: str) -> None:
    model = CLIP(VIT)
    exact, compiled = expected(model), copy.deepcopy(model)
    compile_blocks(compiled, "inductor" if device == "cuda" else "eager")  # inductor takes half a minute on a CPU
    assert_close(computed(compiled, device, LENGTHS), exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_resnet_computes_the_same_in_any_layout(device: str, layout: torch.memory_format) -> None:
    model = CLIP(RESNET).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):  # otherwise most gradients are zero
            torch.nn.init.ones_(parameter)
    exact = expected(model)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_close(computed(model.to(memory_format=layout), device, LENGTHS), exact, 1e-3)  # BatchNorm of 8 values


@pytest.mark.parametrize("device", OTHERS)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[pytest.mark.slow] * (family in ("bart", "distilbert", "mt5", "roberta")))
        for family in FAMILIES
    ],
)
def test_encoders_of_other_libraries_compute_the_same(family: str, device: str, folders: dict[str, Path]) -> None:
    """A text encoder of transformers beside an image encoder of timm."""
    text = HuggingFaceTextConfig(str(folders[family]), context_length=32)
    model = create_model(CLIPConfig(16, TimmConfig("test_efficientnet"), text))
    tokens, images = model.tokenize(TEXTS), torch.randn(len(TEXTS), 3, *height_width(model.preprocessing.image_size))
    model.eval()

    def features(device: str) -> dict[str, Tensor]:
        model.to(device).zero_grad()
        lengths = model.tokenizer.lengths(tokens).tolist()
        image = model.encode_image(images.to(device), normalize=True)
        return gradients(model, image, model.encode_text(tokens.to(device), normalize=True, lengths=lengths))

    exact = features("cpu")
    torch.testing.assert_close(features(device), exact, rtol=1e-3, atol=1e-4)
