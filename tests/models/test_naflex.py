"""NaFlex: images in their own aspect ratio, as patches; features and pixels are those of timm and transformers."""

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, TimmConfig, VisionTransformerConfig
from lit_clip.models.external_settings import with_external_settings
from lit_clip.models.finetuning import Freeze
from lit_clip.models.flops import measure, training_flops
from lit_clip.models.frozen_prefix import use_frozen_prefix
from lit_clip.models.lora import LoRA, add_lora
from lit_clip.models.open_clip_configs import from_open_clip
from lit_clip.models.patches import as_image, grid_size, unpacked
from lit_clip.models.preprocess import pixels
from lit_clip.models.rates import Rates, rated_layers
from lit_clip.models.registry import resized
from lit_clip.models.resize import resize_weights
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.plan import tower_work

SIZES = ((50, 70), (120, 30), (64, 64), (9, 300))  # heights and widths; 63, 64, 64 and 34 of 64 patches
OPTIONS = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "pos_embed_grid_size": [4, 4],
}


def config(name: str = "siglip", **options: Any) -> CLIPConfig:
    image = TimmConfig(f"naflexvit_base_patch16_{name}", image_size=64, projection="none", options=OPTIONS | options)
    text = TextTransformerConfig(context_length=8, width=32, layers=1, heads=2)
    return CLIPConfig(embed_dim=32, image=image, text=text, logit_bias=True)


def make(name: str = "siglip", **options: Any) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config(name, **options)).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> CLIP:
    return make()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def batch(model: CLIP, images: list[Image.Image]) -> Tensor:
    return torch.stack([model.preprocess(image) for image in images])


def test_grids_are_those_of_transformers() -> None:
    draw = random.Random(0).randint
    for _ in range(300):
        height, width, patch, budget = draw(1, 4000), draw(1, 4000), draw(2, 32), draw(1, 1024)
        theirs = get_image_size_for_max_num_patches(height, width, patch, budget)
        assert tuple(patch * side for side in grid_size(height, width, patch, budget)) == theirs


def test_pixels_are_those_of_transformers(model: CLIP, images: list[Image.Image]) -> None:
    theirs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64, resample=3)(images, return_tensors="pt")
    ours = unpacked(batch(model, images))
    assert torch.equal(ours.patch_coord.amax(dim=1) + 1, theirs["spatial_shapes"])
    valid = theirs["pixel_attention_mask"].bool()
    assert torch.equal(ours.patch_valid, valid)
    torch.testing.assert_close(ours.patches[valid], theirs["pixel_values"][valid], rtol=0, atol=1e-6)


def test_patches_can_be_put_together_again(model: CLIP) -> None:
    image = Image.radial_gradient("L").resize((40, 48)).convert("RGB")
    sequence = pixels(model.preprocessing)(image)
    expected = image.resize((56, 72), Image.Resampling.BICUBIC)
    assert torch.equal(as_image(sequence), pil_to_tensor(expected))
    assert torch.equal(as_image(as_image(sequence)), as_image(sequence))


@pytest.mark.parametrize("name", ["siglip", "gap", "parfac_gap"])
@torch.no_grad()
def test_features_are_timms_and_padding_never_changes_them(name: str, images: list[Image.Image]) -> None:
    ours = make(name)
    theirs: Any = timm.create_model(f"naflexvit_base_patch16_{name}", num_classes=0, **OPTIONS).eval()
    theirs.load_state_dict(ours.visual.trunk.state_dict())  # open_clip's names are timm's
    together = batch(ours, images)
    features = ours.encode_image(together)
    expected = theirs(dict(unpacked(together)._asdict()))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    for image, feature in zip(images, features, strict=True):
        torch.testing.assert_close(ours.encode_image(batch(ours, [image]))[0], feature, rtol=0, atol=1e-5)
    garbled = together.clone()
    garbled[3, 35:] = 7  # the fourth image has 34 patches
    torch.testing.assert_close(ours.encode_image(garbled), features, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_traced_graph_computes_padding_but_gives_the_same_features(model: CLIP, images: list[Image.Image]) -> None:
    together = batch(model, images[1:])
    graph = torch.export.export(model.visual, (together,)).module()
    torch.testing.assert_close(graph(together), model.encode_image(together), rtol=0, atol=1e-5)


@torch.no_grad()
def test_half_precision_keeps_the_grids(model: CLIP, images: list[Image.Image]) -> None:
    long = CLIP(resized(model.config, (8, 8 * 500), None)).eval()  # 500 patches in a row do not fit into a byte
    strip = long.preprocess(Image.new("RGB", (4000, 8)))[None]
    assert int(unpacked(strip.bfloat16()).patch_coord[..., 1].max()) == 499
    half, transform = make().bfloat16(), pixels(model.preprocessing)
    sequences = torch.stack([transform(image) for image in images])
    features = half.encode_image(half.normalize(sequences), normalize=True).float()
    expected = model.encode_image(model.normalize(sequences), normalize=True)
    torch.testing.assert_close(features, expected, rtol=0, atol=0.05)


def test_a_blank_image_is_finite_with_its_gradients() -> None:
    model = make()
    blank = torch.zeros(1, *model.preprocessing.shape)
    features = model.encode_image(model.normalize(blank.to(torch.uint8)))
    (features.sum() * 0).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_flops_are_those_of_the_budget(model: CLIP) -> None:
    N, W = 64, 32
    block = 2 * N * 8 * W * W + 4 * N * N * W
    pool = 2 * N * 2 * W * W + 4 * N * W + 2 * (2 + 4) * W * W
    expected = 2 * N * 192 * W + 2 * N * 16 * W + 2 * block + pool  # patches, positions, two blocks, pooling
    assert measure(model.config).image_flops == expected
    assert tower_work(model)[0][0] == expected
    counted = training_flops(model)
    assert counted is not None
    assert 2 * expected < counted.image < 3 * expected


def test_freezing_layer_decay_and_lora_know_the_layers() -> None:
    module = LitCLIP(config(), freeze={"image": {"unlock_last": 1}}, rates={"layer_decay": 0.5})
    frozen = {name for name, p in module.model.visual.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"embeds", "blocks"}
    assert not any("blocks.1" in name for name in frozen)
    factors = {layer.name: layer.rate.lr for layer in rated_layers(module.model, Rates(layer_decay=0.5))}
    assert (factors["image.head"], factors["image.blocks.1"], factors["image.embeddings"]) == (1, 0.5, 0.125)
    model = make()
    add_lora(model, LoRA())
    assert sum("qkv.lora_A" in name for name, _ in model.visual.named_parameters()) == 2


def test_a_frozen_tower_can_be_stored_but_no_part_of_one() -> None:
    """Attention behind the frozen layers would need the mask of the images."""
    whole = LitCLIP(config(), freeze=Freeze(image="all"))
    assert use_frozen_prefix(whole.model, "image") is not None
    part = LitCLIP(config(), freeze={"image": {"unlock_last": 1}})
    with pytest.raises(InputError, match="set model.freeze.image to all"):
        use_frozen_prefix(part.model, "image")


def test_another_image_size_is_another_budget_for_the_same_weights(model: CLIP) -> None:
    larger = CLIP(resized(model.config, 128, None))
    assert larger.preprocessing.max_patches == 256
    state = resize_weights(model.state_dict(), model.config, larger.config)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert CLIPConfig.from_dict(larger.config.to_dict()) == larger.config
    wide = CLIPConfig(embed_dim=32, image=TimmConfig(**{**vars(config().image), "image_size": (64, 128)}))
    assert with_external_settings(wide).preprocessing == CLIP(resized(model.config, (64, 128), None)).preprocessing


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"patch_size: must be set with max_patches"):
        Preprocessing(max_patches=64)
    four = Preprocessing(max_patches=4, patch_size=16)
    timms = TimmConfig("naflexvit_base_patch16_siglip", projection="none", options=OPTIONS)
    with pytest.raises(InputError, match=r"patch_size 16 is not the model's 8"):
        CLIP(CLIPConfig(embed_dim=32, image=timms, preprocessing=four))
    vit = CLIPConfig(embed_dim=32, image=VisionTransformerConfig(32, 16, 64, 1, 1), preprocessing=four)
    with pytest.raises(InputError, match="VisionTransformer reads images of one size"):
        CLIP(vit)
    with pytest.raises(InputError, match=r"the model reads \[B, 1 \+ N, 192\]"):
        make().encode_image(torch.zeros(1, 5, 27))


def test_open_clips_configuration_gives_the_budget() -> None:
    values = {
        "embed_dim": 768,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": 384,
            "image_seq_len": 576,
            "timm_model_name": "naflexvit_base_patch16_siglip",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {"width": 768, "heads": 12, "layers": 12, "proj_bias": True, "norm_kwargs": {"eps": 1e-6}},
    }
    values["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "act_kwargs": {"approximate": "tanh"}}
    found = from_open_clip(values, None, "ViT-B-16-SigLIP2-naflex").preprocessing
    assert found is not None
    assert (found.max_patches, found.patch_size, found.interpolation) == (576, 16, "bilinear")
    assert (found.image_size, found.mean) == (384, (0.5, 0.5, 0.5))


def test_the_optimiser_trains_every_weight(images: list[Image.Image]) -> None:
    module = LitCLIP(config(), optimizer=partial(PaperAdamW, lr=1e-3))
    features = module.model.encode_image(batch(module.model, images))
    features.square().sum().backward()
    assert [name for name, p in module.model.visual.named_parameters() if p.grad is None] == []
