"""Grey levels of every depth, against plain arithmetic; what of a file's image a model does not see."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_clip.errors import BadSample
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import Unseen, eight_bits, open_image, stored_image, unseen
from tests.fuzz.samples import encoded, whole_images

LEVELS = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32  # 0 to 63,968
SEEN_OTHERWISE = {  # of the kinds of files, those that do not reach a model as they are
    "cmyk.jpg": [Unseen.CONVERTED],
    "cmyk.tif": [Unseen.CONVERTED],
    "turned.jpg": [Unseen.ROTATED],
    "rgba.png": [Unseen.TRANSPARENT],
    "palette.png": [Unseen.TRANSPARENT],
    "gray_alpha.png": [Unseen.TRANSPARENT],
    "lossless.webp": [],  # opaque everywhere, so WebP stores no alpha
    "sixteen.png": [Unseen.DEEP],
    "sixteen.tif": [Unseen.DEEP],
    "float.tif": [Unseen.DEEP],
    "animated.png": [Unseen.ANIMATED],
    "animated.gif": [Unseen.ANIMATED],
    "animated.webp": [Unseen.ANIMATED],
    "pages.tif": [Unseen.ANIMATED],
}


def twelve_bit_tiff(levels: np.ndarray) -> bytes:
    """Write a TIFF of 12 bits a level, two levels in three bytes, which Pillow reads and does not write."""
    high, width = levels.shape
    pairs = levels.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    tags = {256: width, 257: high, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: high, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + packed


def colours(levels: np.ndarray) -> bytes:
    """Write the levels as 16-bit red, green and blue of a PPM."""
    high, width = levels.shape
    return b"P6 %d %d 65535\n" % (width, high) + np.repeat(levels[:, :, None], 3, axis=2).astype(">u2").tobytes()


DEEP = {
    "16.png": encoded(Image.fromarray(LEVELS), "PNG"),
    "16 with a transparent level.png": encoded(Image.fromarray(LEVELS), "PNG", transparency=64),
    "16.tif": encoded(Image.fromarray(LEVELS), "TIFF"),
    "16, packed.tif": encoded(Image.fromarray(LEVELS), "TIFF", compression="tiff_lzw"),
    "16, other order.tif": encoded(Image.fromarray(LEVELS.astype(">u2")), "TIFF"),
    "16.pgm": encoded(Image.fromarray(LEVELS), "PPM"),
    "12.tif": twelve_bit_tiff(LEVELS >> 4),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_whole_range_of_the_files_bits_becomes_0_to_255(name: str) -> None:
    image = open_image(io.BytesIO(DEEP[name]))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), LEVELS // 256)
    assert np.array_equal(np.asarray(image.convert("RGB"))[:, :, 1], LEVELS // 256)
    assert Unseen.DEEP in unseen(io.BytesIO(DEEP[name]), "")
    bits = 12 if name.startswith("12") else 16
    assert np.array_equal(np.asarray(stored_image(io.BytesIO(DEEP[name]))), LEVELS >> (16 - bits))


@pytest.mark.parametrize("name", DEEP)
def test_an_image_that_pillow_opened_has_the_pixels_of_its_file(name: str) -> None:
    transform = pixels(Preprocessing(image_size=6))
    expected = transform(open_image(io.BytesIO(DEEP[name])))
    assert torch.equal(transform(Image.open(io.BytesIO(DEEP[name]))), expected)


def test_levels_of_which_zero_is_white_are_inverted() -> None:
    data = encoded(Image.fromarray(LEVELS), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(open_image(io.BytesIO(data))), 255 - LEVELS // 256)


def test_deep_colours_have_the_levels_of_deep_grey() -> None:
    """Within one: of PPMs Pillow rounds."""
    found = np.asarray(open_image(io.BytesIO(colours(LEVELS)))).astype(int)
    assert np.abs(found - (LEVELS // 256)[:, :, None]).max() <= 1
    assert unseen(io.BytesIO(colours(LEVELS)), "") == [Unseen.DEEP]


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_levels_without_a_range_are_a_bad_sample_that_says_what_to_do(kind: str, tmp_path: Path) -> None:
    Image.fromarray(LEVELS.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(BadSample, match=r"^t.csv row 3: its levels are .*scale them to 8 or 16 bits") as refused:
        open_image(tmp_path / "a.tif", "t.csv row 3")
    assert refused.value.reason == "levels without a range"
    with pytest.raises(BadSample, match="a.tif"):
        open_image(tmp_path / "a.tif")
    assert unseen(tmp_path / "a.tif", "") == [Unseen.DEEP]


@pytest.mark.parametrize("name", whole_images())
def test_the_header_says_what_a_model_does_not_see(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self: Any) -> Any:
        raise AssertionError("the pixels are read")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert unseen(io.BytesIO(whole_images()[name]), "") == SEEN_OTHERWISE.get(name, [])


def test_shallow_images_stay_the_same_object() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        image = Image.new(mode, (3, 2))
        assert eight_bits(image) is image
