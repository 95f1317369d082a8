"""Fast decoding and resizing of training images: the exact method's crops and, up to rounding, its pixels."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from datamodules import Augmentation
from datamodules.loading.augmentation import RandomSquareCrop, TrainingTransform
from lit_clip.models.config import Preprocessing
from lit_clip.tools.images import decoding_at_least, fraction, full_size, open_image
from tests.fuzz.samples import whole_images


@pytest.fixture(scope="module")
def temple() -> Image.Image:
    """A photograph, 640 x 427."""
    return Image.fromarray(load_sample_images().images[0])


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


# Crops


@pytest.mark.parametrize("size", [(1280, 960), (1281, 963), (1279, 957), (640, 481)])
def test_an_image_decoded_at_a_fraction_is_cropped_at_the_same_place(
    temple: Image.Image, size: tuple[int, int]
) -> None:
    """Also if the size is not a multiple of the divisor, so that the decoded image's last pixels cover less."""
    data = jpeg(temple.resize(size, Image.Resampling.BICUBIC))
    crop = RandomSquareCrop(exact=True, size=224, interpolation="bicubic")
    whole = open_image(io.BytesIO(data), "")
    with decoding_at_least(crop.least_size):
        part = open_image(io.BytesIO(data), "")
    factor = {1280: 4, 1281: 4, 1279: 4, 640: 2}[size[0]]
    assert full_size(part) == (*size, factor)
    assert full_size(whole) == (*size, 1)
    torch.manual_seed(0)
    for _ in range(20):
        params = crop.make_params([])
        assert tuple(factor * edge for edge in crop.box(part, params)) == crop.box(whole, params)
    one, other = (np.asarray(crop.transform(each, params), dtype=float) for each in (whole, part))
    assert np.abs(one - other).mean() < 4  # the photograph has edges everywhere
    for shifted in (one[:, 1:] - other[:, :-1], one[1:] - other[:-1], one[:, :-1] - other[:, 1:], one[:-1] - other[1:]):
        assert np.abs(shifted).mean() > 3 * np.abs(one - other).mean()


@pytest.mark.parametrize("size", [(224, 224), (100, 75), (500, 1), (1, 9), (1, 1), (225, 224), (3000, 17)])
@pytest.mark.parametrize("target", [16, 224, (32, 64)])
def test_a_crop_lies_inside_an_image_of_any_shape(size: tuple[int, int], target: Any) -> None:
    crop = RandomSquareCrop((0.1, 1.0), size=target, interpolation="bilinear")
    image = Image.new("RGB", size, (10, 20, 30))
    with decoding_at_least(crop.least_size):
        decoded = open_image(io.BytesIO(jpeg(image, quality=100, subsampling=0)), "")
    for place in (0.0, 0.49, 1.0):
        for side in (0.1**0.5, 1.0):
            params = {"side": side, "x": place, "y": place}
            left, top, right, bottom = crop.box(decoded, params)
            assert 0 <= left < right <= decoded.width
            assert 0 <= top < bottom <= decoded.height
            pixels = crop.transform(decoded, params)
            assert tuple(pixels.shape) == (3, *crop.size)
            assert (pixels.float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)).abs().max() <= 2


def test_the_fraction_is_the_one_pillow_uses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height, wide, high = (int(each) for each in rng.integers(1, [300, 300, 90, 90]))
        least = (min(wide, width), min(high, height))
        with Image.open(io.BytesIO(jpeg(Image.new("RGB", (width, height))))) as image:
            image.draft("RGB", least)
            divided = fraction((width, height), least)
            assert image.size == (-(-width // divided), -(-height // divided))


# Pixels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(640, 427), (320, 240), (100, 75), (224, 224), (900, 800), (2000, 1500)])
def test_torch_resizing_equals_pillows_up_to_rounding(
    temple: Image.Image, size: tuple[int, int], interpolation: Any
) -> None:
    image = temple.resize(size, Image.Resampling.BICUBIC)
    plain, fast = (RandomSquareCrop((0.5, 1.0), exact, 224, interpolation) for exact in (True, False))
    for _ in range(3):
        params = plain.make_params([])
        expected = np.asarray(plain.transform(image, params), dtype=float)
        found = fast.transform(image, params)
        assert found.dtype == torch.uint8
        off = np.abs(found.permute(1, 2, 0).numpy() - expected)
        assert off.mean() < 0.2
    assert np.abs(np.diff(expected, axis=0)).mean() > 3


@pytest.mark.parametrize("name", [name for name in whole_images() if name != "float.tif"])  # which is refused
def test_images_of_every_format_equal_the_exact_ones_up_to_rounding(name: str) -> None:
    data = whole_images()[name]
    small = Preprocessing(image_size=32)
    result = []
    for augmentation in (Augmentation(exact=True), Augmentation()):
        torch.manual_seed(1)
        transform = TrainingTransform(augmentation, small)
        with decoding_at_least(transform.decode_size):
            result.append(transform(open_image(io.BytesIO(data), "")))
    assert result[0].shape == result[1].shape == (3, 32, 32)
    assert (result[0].float() - result[1].float()).abs().mean() < 2


def test_exact_decodes_the_whole_image_and_resizes_with_pillow(temple: Image.Image) -> None:
    """The definition written out, on the pixels that Pillow decodes."""
    data = jpeg(temple.resize((1280, 960)))
    transform = TrainingTransform(Augmentation(exact=True), Preprocessing())
    with decoding_at_least(transform.decode_size):
        decoded = open_image(io.BytesIO(data), "")
    assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(data))))
    torch.manual_seed(5)
    share, y, x = torch.rand(3).tolist()
    side = round(240 * (0.9 + 0.1 * share) ** 0.5)  # in units of four pixels, as at a quarter of the size
    left, top = round(x * (320 - side)), round(y * (240 - side))
    box = (4 * left, 4 * top, 4 * (left + side), 4 * (top + side))
    expected = np.asarray(decoded.resize((224, 224), Image.Resampling.BICUBIC, box, 2.0))
    torch.manual_seed(5)
    found = transform(decoded)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_colour_augmentation_works_with_and_without_exact(temple: Image.Image, exact: bool) -> None:
    grey = TrainingTransform(Augmentation(color_jitter=0.4, grayscale=1.0, exact=exact), Preprocessing())(temple)
    assert grey.dtype == torch.uint8
    assert torch.equal(grey[0], grey[2])
    assert grey.float().std() > 20
