"""Where images show texts: images of any mode and size, texts and background, against the cosines of each place."""

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
from tests.fuzz.inputs import Input, Inputs, Target, damaged
from tests.fuzz.samples import encoded, whole_images
from tests.helpers.colours import PATCH, colour_model

SIDE, MOST_ELONGATED = 32, 32  # of the model's images; longer to shorter side of what it reads
TEXTS, BACKGROUND = ["red", "green", "blue"], [f"{letter} other" for letter in "acdefhijklmnopqstuvwxz"]
FALSE_ALARMS, LEAST = 0.05, 19  # texts of the background, at least
TOLERANCE = 2e-3  # of cosines, as resizing rounds to whole levels
DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", *DEEP),
    "webp": ("RGB", "RGBA"),
    "ppm": ("L", "RGB", "I;16"),
}
BITS_PER_SAMPLE = 258  # a tag of TIFF


def odd_image(kind: tuple[str, str], size: tuple[int, int], seed: int) -> Input:
    """Return an image in a format and mode, of two plain halves or of noise."""
    (suffix, mode), rng = kind, np.random.default_rng(seed)
    cells = (1, 2) if rng.random() < 0.7 else size[::-1]
    image = Image.fromarray(rng.integers(0, 256, (*cells, 4), np.uint8)).resize(size, Image.Resampling.NEAREST)
    if mode in DEEP:
        image = Image.fromarray((np.asarray(image)[:, :, 0] * rng.choice((1 / 256, 16, 256))).astype(DEEP[mode]))
    elif mode not in ("LA", "RGBA"):
        image = image.convert("RGB").convert(mode)
    return Input(f"a.{suffix}", encoded(image, suffix))


def located_inputs() -> Inputs:
    sides = st.one_of(st.sampled_from((1, 2, 32, 33, 255, 257, 300)), st.integers(1, 400))
    modes = st.sampled_from([(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
    images = st.builds(odd_image, modes, st.tuples(sides, sides), st.integers(0, 2**32))
    words = st.one_of(st.sampled_from((*TEXTS, *BACKGROUND, "RED", " red ", "\ud800")), st.text(max_size=4))
    some = st.lists(st.sampled_from(BACKGROUND), min_size=17, unique=True)
    repeated = st.builds(lambda word, times: [word] * times, words, st.sampled_from((1, 5, 19)))
    lines = st.one_of(repeated, st.builds(list.__add__, some, repeated)).map("\n".join)
    others = lines.map(lambda text: Input("others.txt", text.encode(errors="replace")))
    return st.one_of(images, images, damaged(whole_images), others)


@cache
def _directions() -> np.ndarray:
    """Return the unit features of texts by their first letter."""
    table = dict(colour_model().named_buffers())["text.encoder.table"].double().numpy()
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def _cosines(texts: list[str], image: Image.Image) -> np.ndarray:
    """Return the cosine of each text with the mean colour of each place, ``[N, h, w]``."""
    if image.mode.startswith("I"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    sides = (min(MOST_ELONGATED * SIDE, side * SIDE / min(image.size)) for side in image.size)
    w, h = (max(1, round(side / PATCH)) for side in sides)
    rgb = image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC).convert("RGB")
    means = np.asarray(rgb, dtype=np.float64).reshape(h, PATCH, w, PATCH, 3).mean(axis=(1, 3)) / 255
    places = np.concatenate([means, np.full((h, w, 1), 0.01)], axis=2)
    places /= np.linalg.norm(places, axis=2, keepdims=True)
    return np.einsum("nd,hwd->nhw", np.stack([_directions()[ord(text[0]) % 128] for text in texts]), places)


def locate_texts(folder: Path, given: Input) -> Iterator[str]:
    """Run the command, and compare what it says and writes with the cosines of each place."""
    files = {"a.png": encoded(Image.new("RGB", (48, 32), "red"), "PNG"), "others.txt": "\n".join(BACKGROUND).encode()}
    name = "a.png" if given.name == "others.txt" else given.name
    for each, data in {**files, given.name: given.data}.items():
        (folder / each).write_bytes(data)
    with patch.object(command, "load_model", lambda name: colour_model()):
        command.locate(name, TEXTS, model="colours", background="others.txt", false_alarms=FALSE_ALARMS)
    image = Image.open(io.BytesIO((folder / name).read_bytes()))
    known = image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM"))  # which have 16 bits
    assert known, f"levels of the mode {image.mode}, whose range is not known, were read"
    lines = (folder / "others.txt").read_text(encoding="utf-8-sig").splitlines()
    plain = dict.fromkeys(" ".join(line.lower().split()) for line in lines)
    others = [text for text in plain if text and text not in TEXTS]
    assert len(others) >= LEAST, f"{len(others)} different texts of other things are too few"
    peaks = np.sort(_cosines(others, image).max(axis=(1, 2)))[::-1]
    level = peaks[math.floor(FALSE_ALARMS * (len(others) + 1) + 1e-9) - 1]
    rows = json.loads((folder / "locations" / "locations.json").read_text(encoding="utf-8"))
    assert [(row["image"], row["text"]) for row in rows] == [(name, text) for text in TEXTS]
    margins = _cosines(TEXTS, image) - level
    for number, row in enumerate(rows):
        others_here = np.delete(margins, number, axis=0).max(axis=0, initial=-2)
        _check_row(row, image.size, margins[number], others_here, level)
        yield "used"


def _check_row(row: dict[str, Any], size: tuple[int, int], own: np.ndarray, others: np.ndarray, level: float) -> None:
    """Compare with a text's margins at each place, and those of the best other text there."""
    surely = (own > others + TOLERANCE) & (own > TOLERANCE)
    perhaps = (own > others - TOLERANCE) & (own > -TOLERANCE)
    assert row["seen"] if surely.any() else not row["seen"] or perhaps.any(), f"{row} is wrongly seen or not seen"
    highest = own[surely].max(initial=-2) if row["seen"] else own.max()
    assert highest - TOLERANCE < row["margin"] < own.max() + TOLERANCE, f"{row}: the margin is {highest}"
    assert abs(row["cosine"] - row["margin"] - level) < TOLERANCE, f"{row}: the level is {level}"
    assert row["size"] == list(size)
    if not row["seen"]:
        assert row["box"] is row["mask"] is None
        return
    mask = np.asarray(Image.open(f"locations/{row['mask']}"))
    assert mask[row["peak"][1], row["peak"][0]], f"{row}: the peak is not in the mask"
    ys, xs = np.nonzero(mask)
    box = [int(each) for each in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
    assert (mask.shape, row["box"]) == (size[::-1], box), f"{row}: the mask's box is {box}"


located = Target(located_inputs, locate_texts, named=False)
