"""The model equals open_clip's and transformers' up to rounding, and is initialised as in the paper's code."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.registry import list_models
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.weights.load import create_model

SOT, EOT = 97, 98  # ids in the small models


def small_config(**changes: Any) -> CLIPConfig:
    return CLIPConfig(
        **{
            "embed_dim": 24,
            "image": VisionTransformerConfig(image_size=32, patch_size=8, width=64, layers=2, heads=2),
            "text": TextTransformerConfig(context_length=16, vocab_size=99, width=48, layers=3, heads=4),
            **changes,
        }
    )


def small_model(seed: int = 0, **changes: Any) -> CLIP:
    """Randomise all weights, including gains and biases."""
    torch.manual_seed(seed)
    model = CLIP(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def small_batch(lengths: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Create images ``[B, 3, 32, 32]`` and token ids ``[B, 16]`` with the end of text at the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(lengths), 3, 32, 32, generator=generator)
    tokens = torch.zeros(len(lengths), 16, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, SOT, (length,), generator=generator)
        row[0], row[length - 1] = SOT, EOT
    return images, tokens


pytestmark = pytest.mark.usefixtures("quiet_open_clip")


def test_padding_changes_neither_text_features_nor_gradients() -> None:
    model = small_model().double()
    _, tokens = small_batch((2, 7, 5))
    trimmed = CLIPTokenizer().trim(tokens)
    assert trimmed.shape == (3, 7)
    weights = torch.randn(3, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    text_parameters = [p for name, p in model.named_parameters() if not name.startswith("visual.")][:-1]
    results = []
    for texts in (tokens, trimmed):
        features = model.encode_text(texts, normalize=True)
        gradients = torch.autograd.grad((features * weights).sum(), text_parameters, allow_unused=True)
        results.append([features, *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1]) > 30
    for padded, short in zip(*results, strict=True):
        torch.testing.assert_close(padded, short, rtol=1e-12, atol=1e-13)
    pad_gradient = torch.autograd.grad(model.encode_text(tokens).sum(), model.token_embedding.weight)[0][0]
    assert (pad_gradient == 0).all()  # id 0 occurs only as padding here


def test_tokens_after_the_end_of_text_change_nothing_and_those_before_do() -> None:
    model = small_model()
    _, tokens = small_batch((7,))
    with torch.no_grad():
        features = model.encode_text(tokens)
        for position in range(16):
            changed = tokens.clone()
            changed[0, position] = 50 if tokens[0, position] != 50 else 51
            if position == 6:
                continue  # the end of text itself
            other = model.encode_text(changed)
            if position > 6:
                assert torch.equal(other, features), position
            else:
                assert (other - features).abs().max() > 1e-3, position


def standard_deviations(config: CLIPConfig) -> dict[str, float]:
    """Map parameter names to std as in openai/CLIP's initialize_parameters; its ViT has PyTorch's defaults."""
    iw, tw, depth = config.image.width, config.text.width, config.text.layers
    patch_inputs = 3 * config.image.patch_size**2
    result = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": tw**-0.5,
        "visual.class_embedding": iw**-0.5,
        "visual.positional_embedding": iw**-0.5,
        "visual.proj": iw**-0.5,
        "visual.conv1.weight": (3 * patch_inputs) ** -0.5,  # uniform in +-inputs^-0.5
    }
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        result |= {
            f"{block}.attn.in_proj_weight": tw**-0.5,
            f"{block}.attn.out_proj.weight": tw**-0.5 * (2 * depth) ** -0.5,
            f"{block}.mlp.c_fc.weight": (2 * tw) ** -0.5,
            f"{block}.mlp.c_proj.weight": tw**-0.5 * (2 * depth) ** -0.5,
        }
    for i in range(config.image.layers):
        block = f"visual.transformer.resblocks.{i}"
        result |= {
            f"{block}.attn.in_proj_weight": (2 * iw) ** -0.5,  # Xavier: uniform, variance 2 / (iw + 3 iw)
            f"{block}.attn.out_proj.weight": (3 * iw) ** -0.5,
            f"{block}.mlp.c_fc.weight": (3 * iw) ** -0.5,
            f"{block}.mlp.c_proj.weight": (12 * iw) ** -0.5,
        }
    return result


def test_initial_weights_have_the_standard_deviations_of_the_papers_code() -> None:
    torch.manual_seed(4)
    config = CLIPConfig(
        embed_dim=128,
        image=VisionTransformerConfig(image_size=64, patch_size=8, width=384, layers=2, heads=6),
        text=TextTransformerConfig(context_length=33, vocab_size=1001, width=256, layers=3, heads=4),
    )
    parameters = dict(CLIP(config).named_parameters())
    expected = standard_deviations(config)
    assert set(expected) == {name for name, p in parameters.items() if p.ndim > 1} | {"visual.class_embedding"}
    for name, std in expected.items():
        values = parameters[name].detach()
        assert float(values.std()) == pytest.approx(std, rel=5 * (2 * values.numel()) ** -0.5), name  # 5 s.e.
        assert float(values.mean()) == pytest.approx(0, abs=5 * std * values.numel() ** -0.5), name
    for name, parameter in parameters.items():
        if "ln_" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif "attn" in name and name.endswith("bias"):
            assert (parameter == 0).all(), name


def test_logit_scale_starts_at_the_papers_value_and_is_clamped_to_1_and_100() -> None:
    model = CLIP(small_config())
    assert model.logit_scale.shape == ()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    for before, after in ((-0.5, 0.0), (0.0, 0.0), (2.5, 2.5), (4.7, math.log(100)), (50.0, math.log(100))):
        with torch.no_grad():
            model.logit_scale.fill_(before)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(after, abs=1e-6)
    assert model.logit_scale.requires_grad


def test_normalized_features_are_unit_float32_rows_under_bfloat16_autocast() -> None:
    model = small_model()
    images, tokens = small_batch((16, 2, 7))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encode_image(images).dtype == torch.bfloat16  # autocast is active
        assert model.encode_text(tokens).dtype == torch.bfloat16
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    for rows, exact in ((image, model.encode_image(images, True)), (text, model.encode_text(tokens, True))):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)
        torch.testing.assert_close(rows, exact.detach(), rtol=0, atol=0.03)  # bfloat16 has 8 significant bits


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (2, 3, 224, 224), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"the model reads \[B, 3, 32, 32\]; use model.preprocess"):
        small_model().encode_image(torch.zeros(shape))


def test_texts_longer_than_the_context_are_refused() -> None:
    with pytest.raises(InputError, match="texts have 17 tokens, the model reads 16"):
        small_model().encode_text(torch.zeros(2, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (VisionTransformerConfig, {"width": 64, "heads": 3}, "image: width 64 is not a multiple of heads 3"),
        (TextTransformerConfig, {"width": 50, "heads": 4}, "text: width 50 is not a multiple of heads 4"),
        (VisionTransformerConfig, {"image_size": 224, "patch_size": 15}, "image_size 224 .* patch_size 15"),
        (VisionTransformerConfig, {"image_size": (64, 50), "patch_size": 32}, "image_size .64, 50. .* patch_size 32"),
        (ResNetConfig, {"layers": (1, 1, 1, 1), "image_size": 100}, "image_size 100 is not a multiple of 32"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(config: Any, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**sizes)


def test_an_unknown_model_name_is_refused_with_the_nearest_or_all_names() -> None:
    with pytest.raises(InputError, match=r"'ViT-B/32'; did you mean ViT-B-32\?"):
        create_model("ViT-B/32")
    with pytest.raises(InputError, match=r"'vit-b-32'; did you mean ViT-B-32\?"):
        create_model("vit-b-32")
    with pytest.raises(InputError, match=", ".join(list_models())):
        create_model("swin")


@pytest.mark.parametrize("config", [CLIPConfig(), small_config(activation="quick_gelu")])
def test_a_config_survives_plain_values_and_json(config: CLIPConfig) -> None:
    plain = dataclasses.asdict(config)
    assert CLIPConfig.from_dict(plain) == config
    assert CLIPConfig.from_dict(json.loads(json.dumps(plain))) == config
