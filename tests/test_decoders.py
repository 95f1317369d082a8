"""Training pictures decoded and resized the fast way: the plain way's crops and, to within rounding, its pixels."""

import builtins
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from datamodules import Augmentation, images
from datamodules.augmentation import FastSquareCrop, RandomSquareCrop
from datamodules.images import decoding_at_least, fraction, full_size, open_image
from lit_clip.config import Preprocessing
from tests.fuzz import mutated, whole_pictures


@pytest.fixture(scope="module")
def temple() -> Image.Image:
    """640 x 427."""
    return Image.fromarray(load_sample_images().images[0])


@pytest.fixture
def without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes simplejpeg not installed."""
    images._simplejpeg.cache_clear()
    real = builtins.__import__

    def imported(name: str, *rest: Any, **options: Any) -> Any:
        if name == "simplejpeg":
            raise ImportError(name)
        return real(name, *rest, **options)

    def hide() -> None:
        images._simplejpeg.cache_clear()
        monkeypatch.setattr(builtins, "__import__", imported)

    yield hide
    images._simplejpeg.cache_clear()


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def opened(data: bytes, size: tuple[int, int] | None) -> Image.Image:
    with decoding_at_least(size and (lambda width, height: size)):
        return open_image(io.BytesIO(data), "")


# What is cropped


@pytest.mark.parametrize("size", [(1280, 960), (1281, 963), (1279, 957), (640, 481)])
def test_a_fraction_is_cropped_where_the_whole_picture_is(temple: Image.Image, size: tuple[int, int]) -> None:
    """Also where the size is no multiple of the fraction, and a decoded picture's last pixels cover less."""
    data = jpeg(temple.resize(size, Image.Resampling.BICUBIC))
    crop = RandomSquareCrop(224, (0.9, 1.0), "bicubic")
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
    assert np.abs(one - other).mean() < 4  # this temple is all edges
    for shifted in (one[:, 1:] - other[:, :-1], one[1:] - other[:-1], one[:, :-1] - other[:, 1:], one[:-1] - other[1:]):
        assert np.abs(shifted).mean() > 3 * np.abs(one - other).mean()


@pytest.mark.parametrize("size", [(224, 224), (100, 75), (500, 1), (1, 9), (1, 1), (225, 224), (3000, 17)])
@pytest.mark.parametrize("target", [16, 224, (32, 64)])
def test_a_crop_lies_inside_a_picture_of_any_shape(size: tuple[int, int], target: Any) -> None:
    crop = FastSquareCrop(target, (0.1, 1.0), "bilinear", decode_margin=1.0)
    picture = Image.new("RGB", size, (10, 20, 30))
    with decoding_at_least(crop.least_size):
        decoded = open_image(io.BytesIO(jpeg(picture, quality=100, subsampling=0)), "")
    for place in (0.0, 0.49, 1.0):
        for side in (0.1**0.5, 1.0):
            params = {"side": side, "x": place, "y": place}
            left, top, right, bottom = crop.box(decoded, params)
            assert 0 <= left < right <= decoded.width
            assert 0 <= top < bottom <= decoded.height
            pixels = crop.transform(decoded, params)
            assert tuple(pixels.shape) == (3, *crop.size)
            assert (pixels.float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)).abs().max() <= 2


def test_the_fraction_is_the_one_that_pillow_takes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height, wide, high = (int(each) for each in rng.integers(1, [300, 300, 90, 90]))
        least = (min(wide, width), min(high, height))
        with Image.open(io.BytesIO(jpeg(Image.new("RGB", (width, height))))) as image:
            image.draft("RGB", least)
            divided = fraction((width, height), least)
            assert image.size == (-(-width // divided), -(-height // divided))


# Its pixels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(640, 427), (320, 240), (100, 75), (224, 224), (2000, 1500)])
def test_torch_resizes_as_pillow_does(temple: Image.Image, size: tuple[int, int], interpolation: Any) -> None:
    picture = temple.resize(size, Image.Resampling.BICUBIC)
    plain, fast = (kind(224, (0.5, 1.0), interpolation) for kind in (RandomSquareCrop, FastSquareCrop))
    for _ in range(3):
        params = plain.make_params([])
        expected = np.asarray(plain.transform(picture, params), dtype=float)
        found = fast.transform(picture, params)
        assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)
        off = np.abs(found.permute(1, 2, 0).numpy() - expected)
        assert off.mean() < (0.2 if max(size) < 1000 else 0.7)  # there Pillow averages pixels first
    assert np.abs(np.diff(expected, axis=0)).mean() > 3


@pytest.mark.parametrize("name", list(whole_pictures()))
def test_pictures_of_every_kind_are_the_exact_ones_to_within_rounding(name: str) -> None:
    data = whole_pictures()[name]
    small = Preprocessing(image_size=32)
    result = []
    for augmentation in (Augmentation(exact=True), Augmentation()):
        torch.manual_seed(1)
        with decoding_at_least(augmentation.least_size(small)):
            result.append(augmentation.transform(small)(open_image(io.BytesIO(data), "")))
    assert result[0].shape == result[1].shape == (3, 32, 32)
    assert (result[0].float() - result[1].float()).abs().mean() < 2


def test_exact_is_decoded_whole_and_resized_by_pillow(temple: Image.Image) -> None:
    """The definition, written out: of the very pixels that Pillow has decoded."""
    data = jpeg(temple.resize((1280, 960)))
    augmentation = Augmentation(exact=True)
    with decoding_at_least(augmentation.least_size(Preprocessing())):
        decoded = open_image(io.BytesIO(data), "")
    assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(data))))
    torch.manual_seed(5)
    share, y, x = torch.rand(3).tolist()
    side = round(240 * (0.9 + 0.1 * share) ** 0.5)  # in fours of pixels, which a quarter of the size would have
    left, top = round(x * (320 - side)), round(y * (240 - side))
    box = (4 * left, 4 * top, 4 * (left + side), 4 * (top + side))
    expected = np.asarray(decoded.resize((224, 224), Image.Resampling.BICUBIC, box, 2.0))
    torch.manual_seed(5)
    found = augmentation.transform(Preprocessing())(decoded)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_colours_change_alike_either_way(temple: Image.Image, exact: bool) -> None:
    grey = Augmentation(color_jitter=0.4, grayscale=1.0, exact=exact).transform(Preprocessing())(temple)
    assert grey.dtype == torch.uint8
    assert torch.equal(grey[0], grey[2])
    assert grey.float().std() > 20


# Decoders


ENCODINGS = {
    **{f"subsampling {each}": {"subsampling": each} for each in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": {"progressive": True},
    "quality 30": {"quality": 30, "optimize": True},
    "kept as RGB": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 3},
}


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_simplejpegs_pixels_are_pillows(
    temple: Image.Image, encoding: str, without_simplejpeg: Callable[[], None]
) -> None:
    pytest.importorskip("simplejpeg")
    for size in ((640, 427), (333, 251), (17, 9)):
        data = jpeg(temple.resize(size), **ENCODINGS[encoding])
        for divided in (1, 2, 4, 8):
            least = (max(1, size[0] // divided), max(1, size[1] // divided))
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", least)
                fast = images._by_simplejpeg(image)
                assert fast is not None  # it was at work
                assert np.array_equal(fast, np.asarray(image))
            picture = opened(data, least)
            assert np.array_equal(np.asarray(picture), fast)
            assert (picture.mode, picture.format, full_size(picture)[:2]) == ("RGB", "JPEG", size)
    without_simplejpeg()
    assert np.array_equal(np.asarray(opened(data, least)), fast)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_are_pillows_work(temple: Image.Image, mode: str) -> None:
    data = jpeg(temple.convert(mode))
    with Image.open(io.BytesIO(data)) as image:
        assert images._by_simplejpeg(image) is None
    assert opened(data, (200, 100)).mode == mode


def outcome(data: bytes) -> object:
    """The pixels, or the reason why there are none."""
    try:
        return np.asarray(opened(data, (20, 20))).tobytes()
    except images.BadSample as error:
        return str(error)


def test_damaged_files_end_alike_with_and_without_simplejpeg(without_simplejpeg: Callable[[], None]) -> None:
    pytest.importorskip("simplejpeg")
    rng, others = random.Random(0), list(whole_pictures().values())
    whole = jpeg(Image.fromarray(load_sample_images().images[1]).resize((160, 120)))
    files = [mutated(whole, others, rng) for _ in range(300)] + [
        whole + b"and more",
        whole[:-2],
        whole[: len(whole) // 2],
    ]
    found = [outcome(data) for data in files]
    without_simplejpeg()
    assert [outcome(data) for data in files] == found
    assert {type(each) for each in found} == {bytes, str}


def test_a_decoder_of_other_pixels_is_not_used(
    temple: Image.Image, monkeypatch: pytest.MonkeyPatch, without_simplejpeg: Callable[[], None]
) -> None:
    """Another version of libjpeg-turbo may round differently; a resumed run would not find its pixels again."""
    simplejpeg = pytest.importorskip("simplejpeg")
    real = simplejpeg.decode_jpeg
    assert images._simplejpeg() is real
    images._simplejpeg.cache_clear()
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *data, **least: real(*data, **least) ^ 1)
    assert images._simplejpeg() is None
    data = jpeg(temple)
    assert np.array_equal(np.asarray(opened(data, temple.size)), np.asarray(Image.open(io.BytesIO(data))))


def test_evaluation_never_asks_another_decoder(temple: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(images, "_by_simplejpeg", asked)
    data = jpeg(temple)
    assert np.array_equal(np.asarray(opened(data, None)), np.asarray(Image.open(io.BytesIO(data))))
    with pytest.raises(images.BadSample):  # the test would notice
        opened(data, (10, 10))
