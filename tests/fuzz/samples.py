"""Intact files of each kind, small ones, from which hostile ones are made."""

import io
import json
import tarfile
from functools import cache
from typing import Any

import numpy as np
from PIL import Image


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


def array_file(values: np.ndarray) -> bytes:
    """Return the bytes of an ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, values)
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
        "rgb.npy": array_file(np.asarray(rgb)),
    }


CAPTIONS = ["a cat", 'a "dog", sitting', "naïve — ½ 猫", "x" * 20_000, "two\nlines", "nan", "   ", "😀 smile"]
IMAGE_NAMES = [f"{number}.png" for number in range(len(CAPTIONS))]


@cache
def table_images() -> dict[str, bytes]:
    """Return the images that the tables name."""
    return {name: encoded(image(number), "PNG") for number, name in enumerate(IMAGE_NAMES)}


@cache
def whole_tables() -> dict[str, bytes]:
    """Return an intact table of each text format, by name."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    comma = io.BytesIO()
    pa_csv.write_csv(pa.table({"image": IMAGE_NAMES, "caption": CAPTIONS}), comma)
    records = table_records()
    plain = [(name, text) for name, text in zip(IMAGE_NAMES, CAPTIONS, strict=True) if not {'"', "\n"} & set(text)]
    lines = "\n".join(map(json.dumps, records)).encode()
    return {
        "t.csv": comma.getvalue(),
        "utf16.csv": comma.getvalue().decode().encode("utf-16"),
        "t.tsv": "\n".join(["image\tcaption", *("\t".join(row) for row in plain)]).encode("utf-8-sig"),
        "t.txt": comma.getvalue(),
        "t.jsonl": lines,
        "t.ndjson": lines,
        "t.json": json.dumps(records).encode(),
    }


def table_records() -> list[dict[str, str]]:
    """Return the rows of the tables."""
    return [{"image": name, "caption": text} for name, text in zip(IMAGE_NAMES, CAPTIONS, strict=True)]


def tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    """Return a tar of these files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


@cache
def shard_members() -> list[tuple[str, bytes]]:
    """Return the files of a tar shard."""
    return [
        (f"{number:05}.{extension}", data)
        for number, text in enumerate(CAPTIONS)
        for extension, data in {
            "jpg": encoded(image(number, 40, 30), "JPEG"),
            "txt": text[:200].encode(),
            "json": json.dumps({"i": number}).encode(),
        }.items()
    ]
