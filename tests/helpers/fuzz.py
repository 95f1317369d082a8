"""Read randomly damaged images, tables and tar shards, seeded, in a separate process.

    python tests/helpers/fuzz.py images FOLDER COUNT SEED
    python tests/helpers/fuzz.py sources FOLDER COUNT SEED

Prints one JSON object: how many inputs were used, how many were skipped or refused for which reason, the seconds of the
slowest one, and the warnings. The exit code is not 0 after any undocumented error and any input slower than ``LIMIT``.
"""

import faulthandler
import io
import json
import random
import sys
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.caption_datamodule import TrainingPairs, ValidationPairs
from datamodules.loading.augmentation import Augmentation, TrainingTransform
from datamodules.loading.bad_samples import Skipped, SkippingDataset
from datamodules.loading.sampling import TrainingSample
from datamodules.open_source import open_source
from datamodules.pairs.source import Pair, PairSource
from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import open_image

LIMIT = 20  # seconds for one input on a busy machine
SMALL = Preprocessing(image_size=32)


def image(seed: int = 0, width: int = 70, height: int = 50) -> Image.Image:
    """Return a smooth image with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / rng.uniform(3, 20) + y / rng.uniform(3, 20)) for _ in range(3)]
    return Image.fromarray((np.stack(waves, axis=2) + rng.normal(0, 10, (height, width, 3))).clip(0, 255).astype("u1"))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def whole_images() -> dict[str, bytes]:
    """Return an intact file of each image format, by name."""
    rgb = image()
    frames = [image(seed) for seed in (1, 2)]
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate it by a quarter turn
    sixteen = Image.fromarray(np.asarray(rgb.convert("L")).astype("u2") * 257)
    return {
        "rgb.jpg": encoded(rgb, "JPEG", quality=90),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "gray.jpg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif),
        "rgb.png": encoded(rgb, "PNG"),
        "rgba.png": encoded(rgb.convert("RGBA"), "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG", transparency=3),
        "gray_alpha.png": encoded(rgb.convert("LA"), "PNG"),
        "bits.png": encoded(rgb.convert("1"), "PNG"),
        "sixteen.png": encoded(sixteen, "PNG"),
        "animated.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgb.convert("RGBA"), "WEBP", lossless=True),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "rgb.bmp": encoded(rgb, "BMP"),
        "palette.bmp": encoded(rgb.quantize(16), "BMP"),
        "raw.tif": encoded(rgb, "TIFF"),
        "lzw.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": encoded(rgb, "TIFF", compression="jpeg"),
        "fax.tif": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "sixteen.tif": encoded(sixteen, "TIFF"),
        "cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "float.tif": encoded(rgb.convert("F"), "TIFF"),
        "pages.tif": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "rgb.ppm": encoded(rgb, "PPM"),
    }


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a damaged copy: bits flipped, bytes lost, overwritten or repeated, or another file's header."""
    kind, changed = rng.randrange(7), bytearray(data)
    if kind < 2:  # anywhere, or in the header
        for _ in range(rng.choice((1, 3, 10, 50))):
            changed[rng.randrange(len(changed) if kind else min(len(changed), 100))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 3:
        length, other = rng.choice((4, 12, 30, 200)), rng.choice(others)
        changed[:length] = other[:length]
    elif kind == 4:
        start = rng.randrange(len(changed))
        del changed[start : start + rng.choice((1, 5, 100))]
    elif kind == 5:
        start = rng.randrange(len(changed))
        changed[start : start + 8] = rng.choice((bytes(8), b"\xff" * 8, b"\x7f" * 8, rng.randbytes(8)))
    else:
        start = rng.randrange(len(changed))
        changed[start:start] = changed[rng.randrange(len(changed)) :][: rng.choice((1, 20, 500))]
    return bytes(changed)


class ImageSet(PairSource):
    """A source of one pair, whose image is given as a file's bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def load(self, index: int, rng: random.Random | None) -> Pair:
        return Pair(open_image(io.BytesIO(self.data), "the image"), "an image", "0")


def read_all(source: PairSource, outcomes: Counter[str], rows: int = 50) -> None:
    """Load pairs as training and as validation do, and count the outcomes."""
    transform = TrainingTransform(Augmentation(crop_scale=(0.5, 1.0), color_jitter=0.1), SMALL)
    train = SkippingDataset(TrainingPairs(source, transform, 0))
    val = SkippingDataset(ValidationPairs(source, pixels(SMALL)))
    for row in range(min(len(source), rows)):
        for item in (train[TrainingSample(0, row)], val[row]):
            if isinstance(item, Skipped):
                outcomes[item.reason] += 1
            else:
                assert item.image.shape == (3, 32, 32), item.image.shape
                outcomes["used"] += 1


def fuzz_images(folder: Path, rng: random.Random, outcomes: Counter[str]) -> None:
    """Read one mutated image."""
    whole = list(whole_images().values())
    data = mutated(rng.choice(whole), whole, rng)
    (folder / "last").write_bytes(data)  # to look at if reading it fails
    read_all(ImageSet(data), outcomes)


CAPTIONS = ["a cat", 'a "dog", sitting', "naïve — ½ 猫", "x" * 100_000, "two\nlines", "nan", "   ", "😀 smile"]


@cache
def whole_sources(folder: Path) -> dict[str, bytes]:
    """Return an intact table of each format and a tar shard, by name; write the tables' images to the folder."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq

    names = [f"{i}.png" for i in range(len(CAPTIONS))]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(image(i), "PNG"))
    table = pa.table({"image": names, "caption": CAPTIONS})
    files: dict[str, bytes] = {}
    comma, parquet = io.BytesIO(), io.BytesIO()
    pa_csv.write_csv(table, comma)
    pq.write_table(table, parquet)
    files["t.csv"], files["t.parquet"] = comma.getvalue(), parquet.getvalue()
    lines = [json.dumps({"image": name, "caption": text}) for name, text in zip(names, CAPTIONS, strict=True)]
    files["t.jsonl"] = "\n".join(lines).encode()
    plain = [(name, text) for name, text in zip(names, CAPTIONS, strict=True) if not {'"', "\n"} & set(text)]
    files["t.tsv"] = "\n".join(["image\tcaption", *("\t".join(row) for row in plain)]).encode("utf-8-sig")
    files["t16.csv"] = files["t.csv"].decode().encode("utf-16")
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for i, text in enumerate(CAPTIONS):
            members = {"jpg": encoded(image(i), "JPEG"), "txt": text.encode(), "json": json.dumps({"i": i}).encode()}
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{i:05}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    files["t.tar"] = shard.getvalue()
    return files


def fuzz_sources(folder: Path, rng: random.Random, outcomes: Counter[str]) -> None:
    """Read one mutated table or tar shard."""
    files = whole_sources(folder)
    name = rng.choice(list(files))
    path = folder / f"{rng.randrange(10**9)}_{name}"
    path.write_bytes(mutated(files[name], list(files.values()), rng))
    on_error = rng.choice(("error", "skip"))
    try:
        read_all(open_source(path, on_error=on_error), outcomes)
    except InputError as error:
        if path.name not in str(error):  # the error must name the file
            raise
        outcomes["refused" if not isinstance(error, BadSample) else "refused, a row"] += 1
    path.unlink()


KINDS: dict[str, Callable[[Path, random.Random, Counter[str]], None]] = {
    "images": fuzz_images,
    "sources": fuzz_sources,
}


def main(kind: str, folder: str, count: str, seed: str) -> None:
    """Mutate and read ``count`` inputs, and print the result."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with warnings.catch_warnings(record=True) as caught:
        for number in range(int(count)):
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            start = time.perf_counter()
            try:
                KINDS[kind](Path(folder), random.Random(f"{seed} {number}"), outcomes)
            except BaseException:
                sys.stderr.write(f"{kind} number {number} of seed {seed}:\n")
                raise
            slowest = max(slowest, time.perf_counter() - start)
            faulthandler.cancel_dump_traceback_later()
    result = {"outcomes": dict(outcomes), "slowest": slowest, "warnings": [str(each.message) for each in caught]}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
