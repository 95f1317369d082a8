"""Features of places equal published procedures, written out in float64, and the pooled features where they must."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_clip import LitCLIP, create_model, load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    ResNetConfig,
    Size,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    height_width,
)
from lit_clip.models.external_config import CustomImageConfig
from lit_clip.models.heat_maps import place_cosines
from tests.helpers.colours import GREEN, PATCH, RED, beside, colour_model
from tests.helpers.own_encoders import Image as OwnImage
from tests.helpers.towers import D, photos, saved, shaken

TEXT = TextTransformerConfig(8, 49408, 64, 1, 1)
VIT = VisionTransformerConfig(32, 8, 64, 3, 2)
RESNET = ResNetConfig((1, 1, 1, 1), 8, 64)


def model_of(image: Any) -> CLIP:
    torch.manual_seed(0)
    return shaken(CLIP(CLIPConfig(D, image, TEXT))).eval()


def timm_model(name: str, size: Size = 64, **settings: Any) -> CLIP:
    return model_of(TimmConfig(name, image_size=size, **settings))


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_vit_has_the_last_blocks_values_at_each_place(size: tuple[int, int]) -> None:
    """MaskCLIP (Zhou et al. 2022) for one place after the other."""
    model = model_of(VIT).double()
    vit: Any = model.visual
    images = photos(size).double()
    found = model.encode_patches(images)
    rows, columns = size[0] // 8, size[1] // 8
    positions = vit.positional_embedding
    if (rows, columns) != vit.grid:
        grid = positions[1:].T.reshape(1, 64, 4, 4).float()
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True).double()
        positions = torch.cat([positions[:1], grid[0].flatten(1).T])
    assert found.shape == (2, D, rows, columns)
    last = vit.transformer.resblocks[-1]
    value, bias = last.attn.in_proj_weight[128:], last.attn.in_proj_bias[128:]
    for image, places in zip(images, found, strict=True):
        patches = F.conv2d(image[None], vit.conv1.weight, stride=8)[0].flatten(1).T
        x = vit.ln_pre(torch.cat([vit.class_embedding[None], patches]) + positions)
        for block in vit.transformer.resblocks[:-1]:
            y = block.ln_1(x)
            x = x + nn.MultiheadAttention.forward(block.attn, y, y, y)[0]
            x = x + block.mlp(block.ln_2(x))
        for i, token in enumerate(x[1:]):
            attended = (
                last.attn.out_proj.weight @ (value @ layer_norm(token, last.ln_1) + bias) + last.attn.out_proj.bias
            )
            expected = layer_norm(attended, vit.ln_post) @ vit.proj
            torch.testing.assert_close(places[:, i // columns, i % columns], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(96, 64), (128, 160), (32, 96), (32, 32)])
def test_a_resnet_has_its_poolings_values_at_each_place(size: tuple[int, int]) -> None:
    """And the mean of the pooled windows of 2 x 2 places around it."""
    model = model_of(RESNET).double()
    resnet: Any = model.visual
    maps: list[Tensor] = []
    resnet.layer4.register_forward_hook(lambda _, __, output: maps.append(output))
    images = photos(size).double()
    found = model.encode_patches(images)
    pool, (features,) = resnet.attnpool, maps
    rows, columns = size[0] // 32, size[1] // 32
    assert found.shape == (2, D, rows, columns)
    pooled: dict[tuple[int, int], list[Tensor]] = {(i, j): [] for i in range(rows) for j in range(columns)}
    for top in range(max(1, rows - 1)):
        for left in range(max(1, columns - 1)):
            window = features[:, :, top : top + 2, left : left + 2]
            own = copy.deepcopy(pool)  # the encoder's own pooling, of an image without positions
            own.positional_embedding = nn.Parameter(torch.zeros(1 + window[0, 0].numel(), window.shape[1]).double())
            for i in range(window.shape[2]):
                for j in range(window.shape[3]):
                    pooled[top + i, left + j].append(own(window))
    for (i, j), around in pooled.items():
        value = features[:, :, i, j] @ pool.v_proj.weight.T + pool.v_proj.bias
        alone = value @ pool.c_proj.weight.T + pool.c_proj.bias
        expected = (alone + torch.stack(around).mean(dim=0)) / 2
        torch.testing.assert_close(found[:, :, i, j], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("test_resnet", {"pool": "avg"}),
        ("test_efficientnet", {"projection": "classifier"}),
        ("test_vit", {"pool": "avg"}),
        ("test_vit", {"pool": "avg", "options": {"depth": 2, "reg_tokens": 2}}),
        ("swin_tiny_patch4_window7_224", {"options": {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16}}),
    ],
)
def test_the_mean_of_the_places_is_the_images_feature_where_pooling_is_an_average(
    name: str, settings: dict[str, Any]
) -> None:
    model, images = timm_model(name, **settings).double(), photos(64).double()
    expected = model.encode_image(images)
    torch.testing.assert_close(model.encode_patches(images).mean((2, 3)), expected, atol=1e-9, rtol=0)


def test_a_transformer_that_averages_has_its_norm_and_projection_at_each_place() -> None:
    model = model_of(dataclasses.replace(VIT, pool="mean"))
    alone = model_of(dataclasses.replace(VIT, pool="mean", image_size=8))
    state = model.visual.state_dict()
    alone.visual.load_state_dict({**state, "positional_embedding": state["positional_embedding"][:2]})
    patch = photos(8)
    expected = alone.encode_image(patch)
    torch.testing.assert_close(alone.encode_patches(patch)[:, :, 0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "mobilenetv3_small_050"])
def test_what_follows_a_networks_average_is_applied_at_each_place(name: str) -> None:
    model = timm_model(name)
    images = photos(32)
    alone = model.encode_patches(images)  # of one place, which is its own average
    tower: Any = model.visual
    torch.testing.assert_close(alone[:, :, 0, 0], tower.project(tower.trunk(images)), atol=1e-5, rtol=1e-5)
    images = photos((64, 96))
    x = tower.trunk.forward_features(images)
    cell = x[:, 1:2, 2:3] if x.shape[1:3] == (2, 3) else x[:, :, 1:2, 2:3]
    found = model.encode_patches(images)
    assert found.shape == (2, D, 2, 3)
    expected = tower.project(tower.trunk.forward_head(cell))
    torch.testing.assert_close(found[:, :, 1, 2], expected, atol=1e-5, rtol=1e-5)


def test_timms_class_token_is_replaced_by_the_last_blocks_values() -> None:
    """The same as for our ViT, with what timm's attention may have more: two norms and a layer scale."""
    options = {"depth": 2, "qk_norm": True, "scale_attn_norm": True, "init_values": 0.5, "reg_tokens": 1}
    model = timm_model("test_vit", options=options).double()
    tower: Any = model.visual
    trunk, images = tower.trunk, photos(64).double()
    entering: list[Tensor] = []
    trunk.blocks[-1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    tower(images)
    found, last = model.encode_patches(images), trunk.blocks[-1]
    assert found.shape == (2, D, 4, 4)
    W = trunk.embed_dim
    for b, i in ((0, 0), (0, 15), (1, 6)):
        token = layer_norm(entering[0][b, 2 + i], last.norm1)
        values = last.attn.qkv.weight[2 * W :] @ token + last.attn.qkv.bias[2 * W :]
        attended = last.attn.proj.weight @ layer_norm(values, last.attn.norm) + last.attn.proj.bias
        expected = tower.head.proj.weight @ layer_norm(last.ls1.gamma * attended, trunk.norm)
        torch.testing.assert_close(found[b, :, i // 4, i % 4], expected, atol=1e-10, rtol=0)


EVA = {"depth": 2, "embed_dim": 48, "num_heads": 2, "init_values": 0.5}


def test_evas_class_token_is_replaced_by_an_attention_that_sees_each_place_alone() -> None:
    model = timm_model("eva02_tiny_patch14_224", 56, pool="token", options=EVA)
    tower: Any = model.visual
    entering: list[Tensor] = []
    tower.trunk.blocks[-1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    images, last, trunk = photos(56), tower.trunk.blocks[-1], tower.trunk
    tower(images)
    x, alone = entering[0], torch.eye(17, dtype=torch.bool)
    x = trunk.fc_norm(trunk.norm(last.gamma_1 * last.attn(last.norm1(x), attn_mask=alone)))
    expected = tower.head(trunk.head(x))[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(model.encode_patches(images), expected, atol=1e-5, rtol=1e-5)


def test_attention_pooling_pools_each_place_alone() -> None:
    model = timm_model("test_vit3", options={"depth": 2})
    tower: Any = model.visual
    images, found = photos(64), model.encode_patches(photos(64))
    x = tower.trunk.forward_features(images)  # one register, 16 patches
    for i in range(16):
        only = torch.arange(17)[None] == 1 + i
        expected = tower.head(tower.trunk.head(tower.trunk.fc_norm(tower.trunk.attn_pool(x, attn_mask=only))))
        torch.testing.assert_close(found[:, :, i // 4, i % 4], expected, atol=1e-5, rtol=1e-5)


def test_cocas_pooling_reads_each_place_alone() -> None:
    model = model_of(dataclasses.replace(VIT, pool="attention", pool_queries=3, pool_heads=2))
    vit: Any = model.visual
    pooled: list[Tensor] = []
    vit.attn_pool.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    images, found = photos(32), model.encode_patches(photos(32))
    model.encode_image(images)
    tokens = pooled[0]
    for i in range(16):
        expected = vit.project(vit.ln_post(vit.attn_pool(tokens[:, 1 + i : 2 + i])))
        torch.testing.assert_close(found[:, :, i // 4, i % 4], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "image",
    [
        VIT,
        pytest.param(dataclasses.replace(VIT, pool="mean"), marks=pytest.mark.slow),
        dataclasses.replace(VIT, pool="attention", pool_queries=3, pool_heads=2),
        pytest.param(TimmConfig("test_vit", image_size=64, options={"depth": 2}), marks=pytest.mark.slow),
        TimmConfig("test_vit3", image_size=64, options={"depth": 2}),
        TimmConfig("eva02_tiny_patch14_224", image_size=56, options=EVA),
        TimmConfig("eva02_tiny_patch14_224", image_size=56, options={**EVA, "rope_type": "mixed"}, pool="token"),
        TimmConfig("test_convnext", image_size=64),
    ],
)
def test_images_of_another_size_have_the_features_of_a_model_loaded_for_it(image: Any, tmp_path: Path) -> None:
    path, model = saved(LitCLIP(CLIPConfig(D, image, TEXT)), tmp_path)
    own = height_width(image.image_size)
    before, state = model.encode_image(photos(own)), copy.deepcopy(model.state_dict())
    size = (own[0], 2 * own[1])
    found = model.encode_patches(photos(size))
    there = load_model(path, image_size=size)
    torch.testing.assert_close(found, there.encode_patches(photos(size)), atol=2e-5, rtol=1e-4)
    assert found.shape[3] == 2 * found.shape[2]
    assert torch.equal(model.encode_image(photos(own)), before)  # nothing of the model has changed
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


EACH = {
    "vit": VIT,
    "resnet": RESNET,
    "efficientnet": TimmConfig("test_efficientnet", image_size=64),
    "token": TimmConfig("test_vit", image_size=64, options={"depth": 2}),
    "map": TimmConfig("test_vit3", image_size=64, options={"depth": 2}),
}


@pytest.mark.parametrize("kind", EACH)
def test_precisions_lengths_and_empty_batches(kind: str) -> None:
    model = model_of(EACH[kind])
    images = photos(EACH[kind].image_size)
    expected = model.encode_patches(images)
    assert model.encode_patches(images[:0]).shape == (0, *expected.shape[1:])
    unit = model.encode_patches(images, normalize=True)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones_like(unit[:, 0]))
    torch.testing.assert_close(unit * expected.norm(dim=1, keepdim=True), expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode_patches(images)
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), expected, dim=1).min() > 0.99
    model.double()
    exact = model.encode_patches(images.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), expected, atol=1e-4, rtol=1e-3)


def test_training_drops_no_patch() -> None:
    model = model_of(VIT).train()
    expected = model.encode_patches(photos(32))
    vit: Any = model.visual
    vit.patch_dropout = 0.5
    assert torch.equal(model.encode_patches(photos(32)), expected)
    dropping = timm_model("test_vit", options={"depth": 2, "patch_drop_rate": 0.5}).train()
    assert dropping.encode_patches(photos(64)).shape == (2, D, 4, 4)


class OwnPatches(OwnImage):
    """An encoder of one's own that averages its patches."""

    def __init__(self, embed_dim: int, wrong: bool = False) -> None:
        super().__init__(embed_dim)
        self.wrong = wrong

    def patches(self, images: Tensor) -> Tensor:
        x = self.trunk(images).permute(0, 2, 3, 1)
        return self.head(x) if self.wrong else self.head(x).permute(0, 3, 1, 2)


def test_an_encoder_of_ones_own_gives_its_patches() -> None:
    here = f"{__name__}.OwnPatches"
    model = model_of(CustomImageConfig(here))
    own: Any = model.visual
    images = photos((32, 48))
    assert torch.equal(model.encode_patches(images), own.encoder.patches(images))
    assert model.encode_patches(images).shape == (2, D, 4, 6)
    wrong = model_of(CustomImageConfig(here, {"wrong": True}))
    message = rf"patches of OwnPatches returns \[2, 4, 6, {D}\]; it must be float \[B, {D}, h, w\]"
    with pytest.raises(InputError, match=message):
        wrong.encode_patches(images)
    with pytest.raises(InputError, match=r"Image has no method patches\(images \[B, 3, H, W\]\) -> .*; add one$"):
        model_of(CustomImageConfig(OwnImage)).encode_patches(images)


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (VIT, (32, 36), r"images are \[2, 3, 32, 36\]; places need \[B, 3, H, W\] with multiples of 8"),
        (RESNET, (48, 64), "with multiples of 32"),
        (TimmConfig("test_vit", image_size=64, options={"depth": 2}), (64, 72), "with multiples of 16"),
        (TimmConfig("test_vit", image_size=64, options={"depth": 1}), 64, "whose last block is its only one"),
        (
            TimmConfig("vit_small_patch16_18x2_224", image_size=64, options={"depth": 2, "embed_dim": 48}),
            64,
            "whose last block is a ParallelThingsBlock has no features of places",
        ),
        (TimmConfig("test_resnet", image_size=64, pool="catavgmax"), 64, "ResNet with pooling 'catavgmax' has no"),
        (TimmConfig("deit_tiny_distilled_patch16_224"), 224, "VisionTransformerDistilled with pooling 'token' has no"),
        (TimmConfig("test_vit_relpos", image_size=64), 64, "VisionTransformerRelPos without a feature map has no"),
        (
            TimmConfig("swin_tiny_patch4_window7_224", image_size=64, options={"depths": (1, 1), "num_heads": (2, 4)}),
            96,
            "SwinTransformer reads 64 x 64 pixels only; load the model with another image_size",
        ),
        (
            TimmConfig(
                "naflexvit_base_patch16_gap", image_size=64, options={"depth": 1, "embed_dim": 64, "num_heads": 2}
            ),
            64,
            "NaFlexVit of patch sequences has no features of places",
        ),
    ],
)
def test_what_has_no_features_of_places_is_refused_in_one_line(image: Any, size: Size, message: str) -> None:
    model = model_of(image)
    with pytest.raises(InputError, match=message) as refusal:
        model.encode_patches(photos(size))
    assert "\n" not in str(refusal.value)


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    """FSDP gathers a block's weights only for its whole forward pass."""
    model = model_of(VIT)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model.visual, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(InputError, match="the weights are sharded; train with trainer.strategy ddp"):
            model.encode_patches(photos(32))
    finally:
        dist.destroy_process_group()


# ``model.locate``: cosines of texts at the pixels of whole images, of any size and mode.


TEXTS = torch.eye(4)[:2]  # red and green


@pytest.fixture(scope="module")
def model() -> CLIP:
    return colour_model()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(40, 60), (100, 20), (3, 7)])
def test_of_two_images_beside_each_other_each_text_is_in_its_half(model: CLIP, size: tuple[int, int]) -> None:
    maps = model.locate(beside(GREEN, RED, size=size), ["red", "green"])
    assert (maps.dtype, maps.device.type, maps.shape) == (torch.float32, "cpu", (2, size[1], 2 * size[0]))
    halves = [[float(half.max()) for half in cosines.split(size[0], dim=1)] for cosines in maps]
    assert halves[0][1] > 0.99 > 0.7 > halves[0][0]
    assert halves[1][0] > 0.99 > 0.7 > halves[1][1]
    assert bool((maps[0, :, -1] > 0.99).all())


@pytest.mark.parametrize(("width", "height", "scale"), [(320, 32, 1), (32, 200, 2), (128, 128, 4), (96, 64, 1)])
def test_tiles_equal_the_whole_where_a_place_is_seen_alone(model: CLIP, width: int, height: int, scale: float) -> None:
    """Images of a multiple of the model's size; a plain loop in float64 over the places."""
    image = noise(width, height)
    ratio = scale * 32 / min(width, height)
    resized = image.resize((round(width * ratio), round(height * ratio)), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float64) / 255
    rows, columns = resized.height // PATCH, resized.width // PATCH
    expected = np.zeros((2, rows, columns))
    for row in range(rows):
        for column in range(columns):
            part = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            mean = np.array([*part.mean((0, 1)), 0.01])
            expected[:, row, column] = mean[:2] / np.linalg.norm(mean)
    found = place_cosines(model, image, TEXTS, scale)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    shown: Any = model.visual.encoder
    assert max(side for shape in shown.seen for side in shape[2:]) <= 64 + PATCH  # twice the model's size
    whole = F.interpolate(found[None], (height, width), mode="bilinear", align_corners=False)[0]
    if scale == 1:
        torch.testing.assert_close(model.locate(image, TEXTS), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (900, 2), (31, 33), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
def test_any_size_and_mode_has_a_map_of_its_pixels(model: CLIP, size: tuple[int, int], mode: str) -> None:
    image = Image.new("I;16", size, 300) if mode == "I;16" else noise(*size, mode)
    maps = model.locate(image, TEXTS)
    assert maps.shape == (2, size[1], size[0])
    assert bool(maps.isfinite().all())
    if mode in ("L", "RGBA"):
        torch.testing.assert_close(maps, model.locate(image.convert("RGB"), TEXTS), atol=0.02, rtol=0)


def test_an_image_of_extreme_shape_costs_no_more_than_32_images(model: CLIP) -> None:
    shown: Any = model.visual.encoder
    shown.seen.clear()
    model.locate(noise(4000, 8), TEXTS)
    assert sum(shape[0] * shape[2] * shape[3] for shape in shown.seen) <= 1.5 * 32 * 32 * 32


def test_a_cameras_rotation_flag_is_ignored_as_in_preprocessing(model: CLIP, tmp_path: Path) -> None:
    image = noise(40, 20)
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=image.getexif())
    torch.testing.assert_close(model.locate(tmp_path / "turned.png", TEXTS), model.locate(noise(40, 20), TEXTS))
    assert model.locate(str(tmp_path / "turned.png"), TEXTS).shape == (2, 20, 40)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-tiny-16-64", "RN-tiny-64"])
def test_one_tile_is_the_features_of_the_resized_image(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name).train()
    image, stride = noise(150, 100), 16 if name.startswith("ViT") else 32
    width = stride * round(96 / stride)
    pixels = torch.from_numpy(np.array(image.resize((width, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1)[None]
    places = model.eval().encode_patches(model.normalize(pixels), normalize=True)[0]
    texts = model.encode(["a dog", "a red kite over the beach", "x"])
    model.train()
    found = place_cosines(model, image, texts, 1)
    torch.testing.assert_close(found, torch.einsum("nd,dhw->nhw", texts, places), atol=1e-5, rtol=0)
    assert model.visual.training
    assert model.locate(image, ["a dog"]).shape == (1, 100, 150)


def test_what_cannot_be_located_is_one_line(model: CLIP, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="locate: no texts given; say what to find"):
        model.locate(Image.new("RGB", (64, 64)), [])
    with pytest.raises(InputError, match="^scale: 9 must be between 1 and 4$"):
        model.locate(noise(9, 9), TEXTS, scale=9)
    with pytest.raises(InputError, match="no such image file"):
        model.locate(tmp_path / "absent.png", TEXTS)
    with pytest.raises(InputError, match=r"features are \[2, 3\], this model's are \[N, 4\]"):
        model.locate(noise(9, 9), torch.ones(2, 3))


def test_a_model_that_reads_patch_sequences_is_refused_in_one_line() -> None:
    tower = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    image = TimmConfig("naflexvit_base_patch16_gap", image_size=64, projection="none", options=tower)
    model = CLIP(CLIPConfig(64, image, TextTransformerConfig(8, 49408, 64, 1, 1)))
    with pytest.raises(InputError, match=r"^locate: a NaFlex model reads patches; use one that reads images$"):
        model.locate(noise(64, 64), torch.eye(64)[:2])
