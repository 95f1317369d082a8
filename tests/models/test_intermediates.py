"""Outputs of image blocks have open_clip's names, shapes and values for the same weights."""

import dataclasses
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, TimmConfig, VisionTransformerConfig
from lit_clip.models.external_config import CustomImageConfig
from tests.helpers.own_encoders import Image
from tests.helpers.towers import D, photos, shaken

VIT = VisionTransformerConfig(32, 8, 64, 3, 1)
TEXT = TextTransformerConfig(16, 99, 64, 2, 1)
ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (VIT, {"layers": 3, "width": 64, "patch_size": 8, "image_size": 32}),
    "mean": (
        dataclasses.replace(VIT, pool="mean", ln_pre=False),
        {"layers": 3, "width": 64, "patch_size": 8, "image_size": 32, "pool_type": "avg", "no_ln_pre": True}
        | {"final_ln_after_pool": True},
    ),
    "resnet": (ResNetConfig((1, 2, 1, 1), 8, 64), {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64}),
    "timm": (
        TimmConfig("test_vit", image_size=160, pool="token"),
        {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160},
    ),
    "convolutions": (
        TimmConfig("test_convnext", image_size=64),
        {"timm_model_name": "test_convnext", "timm_pool": "", "image_size": 64},
    ),
}


def pair(kind: str) -> tuple[CLIP, Any, Tensor, Tensor]:
    """Return a model of ours and open_clip's of the same weights, images and tokens."""
    image, vision = ENCODERS[kind]
    torch.manual_seed(0)
    ours = shaken(CLIP(CLIPConfig(D, image, TEXT))).eval()
    text = {"context_length": 16, "vocab_size": 99, "width": 64, "layers": 2, "heads": 1}
    theirs: Any = open_clip.CLIP(D, vision, text).eval()  # type: ignore[arg-type]  # a dict is as well
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert all("attn_mask" in name for name in missing)
    tokens = torch.randint(1, 97, (2, 16), generator=torch.Generator().manual_seed(3))
    tokens[:, 9] = 98
    return ours, theirs, photos(image.image_size), tokens


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"image_indices": 2}, {"image_indices": [0, -1]}])
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.usefixtures("quiet_open_clip")
def test_names_and_values_are_open_clips(kind: str, options: dict[str, Any]) -> None:
    ours, theirs, images, tokens = pair(kind)
    with torch.no_grad():
        found = ours.forward_intermediates(images, tokens, **options)
        expected = theirs.forward_intermediates(images, tokens, **options)
    assert expected.pop("text_intermediates")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(found[name], value)
    assert_same(found["image_features"], ours.encode_image(images, options.get("normalize", True)))


@pytest.mark.parametrize("kind", ["vit", "timm"])
@pytest.mark.usefixtures("quiet_open_clip")
def test_tokens_norms_and_early_ends_are_open_clips(kind: str) -> None:
    ours, theirs, images, _ = pair(kind)
    options: dict[str, Any] = {"normalize_intermediates": True, "image_output_extra_tokens": True}
    options |= {"image_output_fmt": "NLC", "intermediates_only": True, "stop_early": True, "image_indices": [1]}
    visual: Any = ours.visual
    (blocks,) = [module for name, module in visual.named_modules() if name in ("transformer.resblocks", "trunk.blocks")]
    blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("a block that nothing reads was computed"))
    with torch.no_grad():
        found, expected = (model.forward_intermediates(images, **options) for model in (ours, theirs))
    assert found.keys() == expected.keys() == {"image_intermediates", "image_intermediates_prefix"}
    for name, value in expected.items():
        assert_same(found[name], value)


def test_a_gradient_reaches_the_blocks_before_an_output_alone() -> None:
    ours, _, images, _ = pair("vit")
    found = ours.forward_intermediates(images, image_indices=[1], intermediates_only=True)
    found["image_intermediates"][0].square().sum().backward()
    blocks: Any = ours.visual.get_submodule("transformer.resblocks")
    reached = [any(p.grad is not None for p in block.parameters()) for block in blocks]
    assert reached == [True, True, False]


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (VIT, {"stop_early": True}, "features need all blocks; set intermediates_only"),
        (VIT, {"image_indices": 4}, "image_indices: 4 must be between 1 and 3"),
        (VIT, {"image_indices": [0, 3]}, r"image_indices: \[3\] are not among the 3 blocks"),
        (ENCODERS["resnet"][0], {"image_output_fmt": "NLC"}, "a ResNet has maps; choose NCHW"),
        (ENCODERS["convolutions"][0], {"image_output_fmt": "NLC"}, "timm's ConvNeXt: Output shape must be NCHW"),
        (
            dataclasses.replace(VIT, pool="attention", pool_queries=3, pool_heads=2),
            {"normalize_intermediates": True},
            "this model's last norm follows its pooling",
        ),
        (CustomImageConfig(Image), {}, "the blocks of Image are unknown"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(image: Any, options: dict[str, Any], message: str) -> None:
    model = CLIP(CLIPConfig(D, image, TEXT))
    visual: Any = model.visual
    with pytest.raises(InputError, match=message) as refusal:
        model.forward_intermediates(photos(visual.image_size), **options)
    assert "\n" not in str(refusal.value)
