"""Where images show texts: images of any mode and size, texts and background, against a computation in float64."""

import io
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from lit_clip.commands import locate as command
from lit_clip.errors import InputError
from tests.fuzz.inputs import Input, Inputs, damaged, to_json
from tests.fuzz.samples import encoded, whole_images
from tests.fuzz.target import Target
from tests.helpers.colours import PATCH, colour_model

SIDE, MOST_ELONGATED = 32, 32  # of the model's images; longer to shorter side of what it reads
TEXTS = ["red", "green", "blue", "yellow"]
BACKGROUND = [f"{letter} other" for letter in "acdefhijklmnopqstuvwxz"]
FALSE_ALARMS, LEAST = 0.05, 19  # texts of the background, at least
TOLERANCE = 2e-3  # of cosines, as resizing rounds to whole levels
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("L", "RGB", "I;16"),
}
BANDS = {"LA": 2, "RGB": 3, "LAB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}
BITS_PER_SAMPLE = 258  # a tag of TIFF
DEEP = {"I;16": (np.uint16, 2**16), "I": (np.int32, 2**16), "F": (np.float32, 2)}  # type, and levels below this


def odd_image(mode: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return an image of a mode with two plain halves, or with noise."""
    dtype, levels = DEEP.get(mode, (np.uint8, 2 if mode == "1" else 256))
    shape = (
        (1, int(rng.choice((1, 2))), BANDS.get(mode, 1)) if rng.random() < 0.7 else (*size[::-1], BANDS.get(mode, 1))
    )
    low = int(levels * rng.random()) // 2 if mode in DEEP else 0
    values = (low + rng.random(shape) * (levels - low)).astype(dtype)
    columns = np.arange(size[0]) * shape[1] // size[0]
    pixels = np.broadcast_to(values[:, columns], (size[1], size[0], shape[2])) if shape[0] == 1 else values
    pixels = np.ascontiguousarray(pixels if shape[2] > 1 else pixels[:, :, 0])
    if mode == "1":
        return Image.fromarray(pixels * np.uint8(255)).convert("1")
    if mode in DEEP:
        return Image.fromarray(pixels)
    made = Image.frombytes(mode, size, pixels.tobytes())
    if mode == "P":
        made.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
    return made


def image_inputs() -> Inputs:
    sides = st.one_of(st.sampled_from((1, 2, 8, 32, 33, 64, 255, 257, 300)), st.integers(1, 400))
    modes = st.sampled_from([(kind, mode) for kind, modes in FORMATS.items() for mode in modes])

    def make(kind: tuple[str, str], size: tuple[int, int], seed: int) -> Input:
        image = odd_image(kind[1], size, np.random.default_rng(seed))
        return Input(f"a.{kind[0].lower().replace('tiff', 'tif')}", encoded(image, kind[0]))

    return st.builds(make, modes, st.tuples(sides, sides), st.integers(0, 2**32))


def text_inputs() -> Inputs:
    words = st.one_of(
        st.sampled_from(
            (*TEXTS, *BACKGROUND, "RED", " red ", "", " ", "\x00", "red\nblue", "a.png", "x" * 3000, "\ud800")
        ),
        st.text(max_size=4),
    )
    typed = st.lists(words, max_size=3).map(lambda texts: Input("texts.json", to_json(texts)))
    separators = st.sampled_from(("\n", "\n", "\r\n", "\n\n", "\u2028", "\x0c"))

    def make(some: list[str], more: list[str], separator: str) -> Input:
        return Input("others.txt", separator.join([*some, *more]).encode(errors="replace"))

    several = st.lists(st.sampled_from(BACKGROUND), min_size=17, max_size=22, unique=True)
    repeated = st.builds(lambda word, times: [word] * times, words, st.sampled_from((1, 5, 19, 100)))
    background = st.builds(
        make, st.one_of(several, st.just([])), st.one_of(repeated, st.lists(words, max_size=3)), separators
    )
    return st.one_of(typed, background, damaged(lambda: {"others.txt": "\n".join(BACKGROUND).encode()}))


@cache
def _directions() -> np.ndarray:
    """Return the unit features of texts by their first letter."""
    table = dict(colour_model().named_buffers())["text.encoder.table"].double().numpy()
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def _features(texts: list[str]) -> np.ndarray:
    return np.stack([_directions()[ord(text[0]) % 128] for text in texts])


def _places(image: Image.Image) -> np.ndarray:
    """Return the unit features ``[h, w, 4]`` of an image's places: their mean colour."""
    if image.mode.startswith("I"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    ratio = SIDE / min(image.size)
    sides = (min(MOST_ELONGATED * SIDE, side * ratio) for side in image.size)
    w, h = (max(1, round(side / PATCH)) for side in sides)
    rgb = image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC).convert("RGB")
    means = np.asarray(rgb, dtype=np.float64).reshape(h, PATCH, w, PATCH, 3).mean(axis=(1, 3)) / 255
    places = np.concatenate([means, np.full((h, w, 1), 0.01)], axis=2)
    return places / np.linalg.norm(places, axis=2, keepdims=True)


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def locate_texts(folder: Path, given: Input) -> Iterator[str]:
    """Run the command, and compare what it says and writes with the cosines of each place."""
    files = {"a.png": encoded(Image.new("RGB", (48, 32), "red"), "PNG"), "others.txt": "\n".join(BACKGROUND).encode()}
    texts = json.loads(given.data) if given.name == "texts.json" else TEXTS
    is_image = given.name not in ("texts.json", "others.txt")
    name = given.name if is_image else "a.png"
    for each, data in {**files, given.name: given.data}.items():
        (folder / each).write_bytes(data)
    try:
        with patch.object(command, "load_model", lambda name: colour_model()):
            command.locate(name, texts, model="colours", background="others.txt", false_alarms=FALSE_ALARMS)
    except InputError as error:
        named = given.name in str(error) or "background" in str(error)
        assert named or given.name == "texts.json", f"a refusal that names no file: {error}"
        raise
    image = Image.open(io.BytesIO(given.data if is_image else files["a.png"]))
    known = image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM"))  # which have 16 bits
    assert known, f"levels of the mode {image.mode}, whose range is not known, were read"
    others = dict.fromkeys(map(_words, (folder / "others.txt").read_text(encoding="utf-8-sig").splitlines()))
    others = [text for text in others if text and text not in map(_words, texts)]
    assert len(others) >= LEAST, f"{len(others)} different texts of other things are too few"
    places = _places(image)
    cosines = np.einsum("nd,hwd->nhw", _features([*texts, *others]), places)
    peaks = np.sort(cosines[len(texts) :].max(axis=(1, 2)))[::-1]
    level = peaks[math.floor(FALSE_ALARMS * (len(others) + 1) + 1e-9) - 1]
    rows = json.loads((folder / "locations" / "locations.json").read_text(encoding="utf-8"))
    assert [(row["image"], row["text"]) for row in rows] == [(name, text) for text in texts]
    for number, row in enumerate(rows):
        _check_row(row, image.size, cosines[: len(texts)], number, level, folder / "locations")
        yield "used"


def _check_row(
    row: dict[str, Any], size: tuple[int, int], cosines: np.ndarray, number: int, level: float, folder: Path
) -> None:
    own, best = cosines[number], cosines.max(axis=0)
    surely = (np.delete(cosines, number, axis=0).max(axis=0, initial=-1) < own - TOLERANCE) & (own > level + TOLERANCE)
    perhaps = (own >= best - TOLERANCE) & (own > level - TOLERANCE)
    assert row["seen"] if surely.any() else not row["seen"] or perhaps.any(), f"{row['text']!r}: seen is {row['seen']}"
    assert np.abs(own - row["cosine"]).min() < TOLERANCE, f"{row['text']!r}: no place has the cosine {row['cosine']}"
    highest = own[surely].max(initial=-1) if row["seen"] else own.max()
    assert row["cosine"] > highest - TOLERANCE, f"{row['text']!r}: a place has the cosine {highest}"
    assert abs(row["margin"] - (row["cosine"] - level)) < TOLERANCE, f"{row['text']!r}: the level is not {level}"
    assert row["size"] == list(size)
    assert (folder / row["overlay"]).is_file()
    if not row["seen"]:
        assert row["box"] is row["mask"] is None
        return
    mask = np.asarray(Image.open(folder / row["mask"]))
    assert mask.shape == size[::-1]
    x, y = row["peak"]
    assert mask[y, x], "the peak is not in the mask"
    found = [np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1)]
    box = [int(each[end] + (end == -1)) for end in (0, -1) for each in found]
    assert row["box"] == box, f"the box {row['box']} is not that of the mask, {box}"


located = Target(
    lambda: st.one_of(image_inputs(), image_inputs(), damaged(whole_images), text_inputs()), locate_texts, named=False
)
