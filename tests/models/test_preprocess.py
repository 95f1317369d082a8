"""Evaluation pixels equal open_clip's, for images of any shape and mode."""

import io
from typing import Any, cast

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform as open_clip_transform
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    Preprocessing,
    ResNetConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
)
from lit_clip.models.preprocess import image_transform, normalize, pixels

ROUNDING = {"rtol": 0, "atol": 1e-5}  # a grey level is at least 0.0142 after normalisation: no pixel may differ


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """A temple and a flower, 640 x 427."""
    return [Image.fromarray(image) for image in load_sample_images().images]


def model(image_size: int = 224) -> CLIP:
    return CLIP(
        CLIPConfig(
            embed_dim=8,
            image=VisionTransformerConfig(image_size=image_size, patch_size=image_size, width=16, layers=1, heads=1),
            text=TextTransformerConfig(context_length=4, vocab_size=9, width=16, layers=1, heads=1),
        )
    )


def png(image: Image.Image, **options: Any) -> Image.Image:
    """Save an image and open it again."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    "size",
    [
        *((640, 427), (333, 251), (251, 333), (225, 223), (224, 224), (97, 31)),
        *((901, 70), (61, 803), (7, 1), (1, 5), (1, 1)),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_photographs_of_any_shape_have_open_clips_pixels(photographs: list[Image.Image], size: Any, which: int) -> None:
    photograph = photographs[which].resize(size)
    ours = model().preprocess(photograph)
    assert ours.shape == (3, 224, 224)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, open_clip_transform(224, is_train=False)(photograph), **ROUNDING)


@pytest.mark.parametrize("image_size", [1, 31, 336])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_other_settings_give_open_clips_pixels(
    photographs: list[Image.Image], image_size: int, interpolation: Any, resize_mode: Any
) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    config = Preprocessing(image_size, mean, std, interpolation, resize_mode)
    theirs = open_clip_transform(
        image_size, is_train=False, mean=mean, std=std, interpolation=interpolation, resize_mode=resize_mode
    )
    for size in ((301, 97), (97, 301)):
        photograph = photographs[0].resize(size)
        ours = image_transform(config)(photograph)
        assert ours.shape == (3, image_size, image_size)
        torch.testing.assert_close(ours, theirs(photograph), rtol=0, atol=4e-5)  # a grey level is at least 0.013


def unusual(kind: str, photograph: Image.Image) -> Image.Image:
    """Convert a photograph to another image mode or file format."""
    photograph = photograph.resize((301, 257))
    alpha = Image.fromarray(np.random.default_rng(0).integers(0, 256, (257, 301), dtype=np.uint8))
    if kind == "palette with transparency":
        return png(photograph.quantize(16), transparency=bytes(range(0, 256, 16)))
    if kind == "palette with a transparent entry":
        return png(photograph.quantize(16), transparency=3)
    if kind in ("RGBA", "LA"):
        image = photograph.convert(kind[:-1])
        image.putalpha(alpha)
        return png(image)
    if kind == "EXIF-rotated":
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        photograph.save(file, "JPEG", exif=exif)
        return Image.open(io.BytesIO(file.getvalue()))
    if kind == "one pixel high":
        return photograph.resize((300, 1))
    return photograph.convert(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("L", "1", "CMYK", "P", "YCbCr", "RGBA", "LA", "EXIF-rotated", "one pixel high"),
        *("palette with transparency", "palette with a transparent entry"),
    ],
)
def test_files_of_any_kind_have_open_clips_pixels(photographs: list[Image.Image], kind: str) -> None:
    image = unusual(kind, photographs[0])
    theirs = open_clip_transform(224, is_train=False)(image.copy())
    torch.testing.assert_close(model().preprocess(image), theirs, **ROUNDING)


def test_16_bit_levels_are_scaled_where_open_clip_clips_them(photographs: list[Image.Image]) -> None:
    grey = photographs[0].resize((301, 257)).convert("L")
    deep = png(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257))
    clipped = open_clip_transform(224, is_train=False)(deep.copy())
    assert (clipped == clipped.amax(dim=(1, 2), keepdim=True)).float().mean() > 0.9  # white
    ours = model().preprocess(deep)
    torch.testing.assert_close(ours, model().preprocess(grey), rtol=0, atol=0.04)  # two levels: resized in 16 bits


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match="range"):
        model().preprocess(Image.new(mode, (40, 30), 700))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (48, 80)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_rectangular_sizes_have_open_clips_pixels(
    photographs: list[Image.Image], size: tuple[int, int], resize_mode: Any
) -> None:
    ours = image_transform(Preprocessing(image_size=size, resize_mode=resize_mode))(photographs[1])
    theirs = open_clip_transform(size, is_train=False, resize_mode=resize_mode)(photographs[1])
    assert ours.shape == (3, *size)
    torch.testing.assert_close(ours, theirs, **ROUNDING)


def test_pixels_then_normalize_equal_the_whole_transform(photographs: list[Image.Image]) -> None:
    config = Preprocessing(image_size=65)
    batch = torch.stack([pixels(config)(photograph) for photograph in photographs])
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 3, 65, 65)
    normalized = normalize(batch, config)
    assert normalized.dtype == torch.float32
    for image, photograph in zip(normalized, photographs, strict=True):
        assert torch.equal(image, image_transform(config)(photograph))
    assert torch.equal(model(65).normalize(batch), normalized)


def test_normalize_copies_nothing_to_the_device_and_can_be_exported() -> None:
    images, config = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8), Preprocessing()
    assert normalize(images.to("meta"), config).device.type == "meta"

    class Normalize(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return normalize(images, config)

    exported = torch.export.export(Normalize(), (images,))
    assert torch.equal(exported.module()(images), normalize(images, config))
    assert not any("_to_copy" in str(node.target) and "device" in node.kwargs for node in exported.graph.nodes)


LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("mean", "std"),
    [(Preprocessing().mean, Preprocessing().std), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0, 0, 0), (1, 1, 1))],
    ids=["openai", "siglip", "none"],
)
def test_every_level_is_normalised_to_the_nearest_number(mean: Any, std: Any, half: torch.dtype) -> None:
    config = Preprocessing(mean=mean, std=std)
    columns = [torch.tensor(three, dtype=torch.float64).view(3, 1, 1) for three in (mean, std)]
    exact = (LEVELS.double() / 255 - columns[0]) / columns[1]
    torch.testing.assert_close(normalize(LEVELS, config).double(), exact, rtol=0, atol=4e-7)  # below 2 ulp of 2.x
    assert torch.equal(normalize(LEVELS, config, half), exact.to(half))


def small_model(image: VisionTransformerConfig | ResNetConfig) -> CLIP:
    torch.manual_seed(0)
    text = TextTransformerConfig(context_length=4, vocab_size=9, width=16, layers=1, heads=1)
    return CLIP(CLIPConfig(16, image, text))


VIT = VisionTransformerConfig(image_size=32, patch_size=8, width=32, layers=1, heads=1)
RESNET = ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32)


@pytest.mark.parametrize("image", [VIT, RESNET], ids=["vit", "resnet"])
def test_pixels_in_autocasts_precision_give_the_features_and_gradients_of_float32_pixels(
    image: VisionTransformerConfig | ResNetConfig,
) -> None:
    clip = small_model(image)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    in_float32 = clip.normalize(images)
    found = []
    for early in (False, True):
        clip.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            normalized = clip.normalize(images) if early else in_float32
            features = clip.encode_image(normalized, normalize=True)
        features.square().cumsum(1).sum().backward()
        found.append((normalized.dtype, [features, *(p.grad for p in clip.visual.parameters())]))
    (before, expected), (after, values) = found
    assert (before, after) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def test_only_the_papers_encoders_get_pixels_in_autocasts_precision() -> None:
    """Another encoder may compute with them before its first product, and weights in float64 are not cast."""
    clip = small_model(VIT)
    with torch.autocast("cpu", torch.bfloat16):
        assert clip.double().normalize(LEVELS).dtype == torch.float64
        cast(Any, clip).visual = nn.Conv2d(3, 4, 1)
        assert clip.normalize(LEVELS).dtype == torch.float32
        assert clip.bfloat16().normalize(LEVELS).dtype == torch.bfloat16


class PixelBytes(TorchDispatchMode):
    """Count the bytes that operators read and write of tensors of one size, except in matrix products."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes, self.names = size, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        views = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if not views and name not in ("mm", "empty", "_unsafe_view"):
            touched = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            moved = sum(x.nbytes for x in touched.values() if x.numel() == self.size)
            self.bytes, self.names = self.bytes + moved, self.names + [name] * (moved > 0)
        return result


@pytest.mark.parametrize(("bf16", "expected"), [(True, 1 + 2 + 2 * 2), (False, 1 + 4 + 2 * 4)])
def test_pixels_are_read_twice_before_the_patch_embedding(bf16: bool, expected: int) -> None:
    """Once to normalise them and once to cut them into patches; the product reads them in its own precision."""
    clip, images = small_model(VIT), torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), PixelBytes(images.numel()) as counted:
        features = clip.encode_image(clip.normalize(images))
    assert counted.names == ["addcdiv", "clone"]
    assert counted.bytes == expected * images.numel()
    with PixelBytes(images.numel()) as counted:
        features.float().sum().backward()
    assert counted.bytes == 0


def test_normalize_and_the_image_encoder_are_one_graph() -> None:
    clip, images = small_model(VIT), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)

    def encode(images: Tensor) -> Tensor:
        return clip.encode_image(clip.normalize(images))

    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(encode, backend="eager", fullgraph=True)
        assert torch.equal(compiled(images), encode(images))
