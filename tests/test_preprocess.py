"""Evaluation pixels are open_clip's, for pictures of any shape and mode."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform as open_clip_transform
from PIL import Image
from sklearn.datasets import load_sample_images

from lit_clip.config import CLIPConfig, Preprocessing, TextTransformerConfig, VisionTransformerConfig
from lit_clip.model import CLIP
from lit_clip.preprocess import image_transform, normalize, pixels, to_rgb

ROUNDING = {"rtol": 0, "atol": 1e-5}  # a grey level is 0.0142 or more after normalisation: no pixel may differ


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """A temple and a flower, 640 x 427."""
    return [Image.fromarray(picture) for picture in load_sample_images().images]


def model(image_size: int = 224) -> CLIP:
    return CLIP(
        CLIPConfig(
            embed_dim=8,
            image=VisionTransformerConfig(image_size=image_size, patch_size=image_size, width=16, layers=1, heads=1),
            text=TextTransformerConfig(context_length=4, vocab_size=9, width=16, layers=1, heads=1),
        )
    )


def png(image: Image.Image, **options: Any) -> Image.Image:
    """As it comes back from a file."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    "size",
    [
        (640, 427),
        (333, 251),
        (251, 333),
        (225, 223),
        (224, 224),
        (97, 31),
        (901, 70),
        (61, 803),
        (7, 1),
        (1, 5),
        (1, 1),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_photographs_of_any_shape_are_open_clips(photographs: list[Image.Image], size: Any, which: int) -> None:
    photograph = photographs[which].resize(size)
    ours = model().preprocess(photograph)
    assert ours.shape == (3, 224, 224)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, open_clip_transform(224, is_train=False)(photograph), **ROUNDING)


@pytest.mark.parametrize("image_size", [1, 31, 336])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_other_settings_are_open_clips(
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
        torch.testing.assert_close(ours, theirs(photograph), rtol=0, atol=4e-5)  # a grey level is 0.013 or more


def test_squash_shows_the_whole_picture_and_shortest_its_centre() -> None:
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (0, 0, 24, 32))  # left of the central square
    squashed = pixels(Preprocessing(image_size=32, resize_mode="squash"))(wide)
    cropped = pixels(Preprocessing(image_size=32))(wide)
    assert squashed.shape == cropped.shape == (3, 32, 32)
    assert (squashed[:, :, 0] == 255).all()
    assert (cropped == 0).all()


def test_a_model_of_another_size_preprocesses_for_itself(photographs: list[Image.Image]) -> None:
    small = model(image_size=33)
    pixels_of_one = small.preprocess(photographs[1])
    torch.testing.assert_close(pixels_of_one, open_clip_transform(33, is_train=False)(photographs[1]), **ROUNDING)
    assert small.encode_image(pixels_of_one[None]).shape == (1, 8)


def laid_on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Float ``[H, W, 3]`` from uint8 colour ``[H, W, 3]`` and alpha ``[H, W]``."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_partial_transparency_is_laid_on_white(photographs: list[Image.Image], mode: str) -> None:
    picture = photographs[0].resize((41, 23)).convert(mode[:-1])
    alpha = np.random.default_rng(0).integers(0, 256, (23, 41), dtype=np.uint8)
    alpha[:5], alpha[5:9] = 0, 255
    picture.putalpha(Image.fromarray(alpha))
    assert picture.mode == mode
    colour = np.asarray(picture.convert("RGB"), dtype=np.float64)
    seen = np.asarray(to_rgb(png(picture)), dtype=np.float64)
    assert np.abs(seen - laid_on_white(colour, alpha)).max() <= 1  # a grey level
    assert (seen[:5] == 255).all()
    assert (seen[5:9] == colour[5:9]).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_laid_on_white(mode: str) -> None:
    # PNG's other kind of transparency: one colour (or palette entry) is see-through.
    picture = Image.new("RGB", (6, 4), (10, 10, 10))
    picture.paste((200, 200, 200), (3, 0, 6, 4))
    picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    corner = picture.getpixel((0, 0))
    read = png(picture, transparency=corner)
    assert read.mode == mode
    assert "transparency" in read.info
    seen = np.asarray(to_rgb(read))
    assert (seen[:, 3:] == 200).all()
    assert (seen[:, :3] == 255).all()


def test_a_palette_with_an_alpha_for_each_entry_is_laid_on_white(photographs: list[Image.Image]) -> None:
    palette = photographs[1].resize((40, 30)).quantize(4)
    alphas = [0, 255, 128, 64]
    read = png(palette, transparency=bytes(alphas))
    assert read.mode == "P"
    indices = np.asarray(palette)
    colours = np.asarray(palette.getpalette()[:12], dtype=np.uint8).reshape(4, 3)
    expected = laid_on_white(colours[indices], np.asarray(alphas)[indices])
    assert np.abs(np.asarray(to_rgb(read), dtype=np.float64) - expected).max() <= 1


def test_transparency_is_gone_before_the_picture_is_resized() -> None:
    # What lies underneath the transparent half is black; on white it must not show through at the edge.
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (0, 0, 33, 64))
    assert (pixels(Preprocessing(image_size=24))(picture) == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "YCbCr"])
def test_other_modes_are_turned_into_rgb_first(photographs: list[Image.Image], mode: str) -> None:
    picture = photographs[0].resize((301, 257)).convert(mode)
    ours = model().preprocess(picture)
    theirs = open_clip_transform(224, is_train=False)(picture.convert("RGB"))
    torch.testing.assert_close(ours, theirs, **ROUNDING)
    if mode == "L":
        torch.testing.assert_close(ours, open_clip_transform(224, is_train=False)(picture), **ROUNDING)


def test_normalised_pixels_are_the_whole_transform(photographs: list[Image.Image]) -> None:
    config = Preprocessing(image_size=65)
    batch = torch.stack([pixels(config)(photograph) for photograph in photographs])
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 3, 65, 65)
    normalized = normalize(batch, config)
    assert normalized.dtype == torch.float32
    for image, photograph in zip(normalized, photographs, strict=True):
        assert torch.equal(image, image_transform(config)(photograph))
    assert torch.equal(model(65).normalize(batch), normalized)


def test_normalize_is_the_formula() -> None:
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    config = Preprocessing()
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(normalize(images, config), (images / 255 - mean) / std)
