"""``model.locate``: cosines of texts at the pixels of whole images, of any size and mode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lit_clip import CLIP, create_model
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, TimmConfig
from lit_clip.models.heat_maps import place_cosines
from tests.helpers.colours import GREEN, PATCH, RED, beside, colour_model

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
