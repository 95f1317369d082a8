"""Compare JPEG decoders: from a file to the uint8 pixels of a training crop, on one thread, alternating.

    python benchmarks/decoders.py [--pairs 7] [--sizes 1280x960 640x480 320x240]

Prints images per second of CPU time on one core, for the same 224-pixel crops of eight photographs (JPEG quality 90),
and the pixels' difference from the peers' method (Pillow decodes the whole image and resizes it): the mean over all
photographs, and the worst one. Then how the time of a sample is spent. simplejpeg and torchcodec are skipped where they
are not installed or cannot be loaded.
"""

import importlib
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from image_pipeline import photographs
from peers import captions, parser
from PIL import Image, features
from torch.utils.data import default_collate

from datamodules.loading.augmentation import RandomSquareCrop
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.tools import images
from lit_clip.tools.images import decoding_at_least, fraction, open_image

Decode = Callable[[bytes], Image.Image]
SCALE, BATCH = (0.9, 1.0), 32
EXACT, FAST = (RandomSquareCrop(SCALE, exact=exact, size=224, interpolation="bicubic") for exact in (True, False))


def by_pillow(content: bytes, least: images.LeastSize | None) -> Image.Image:
    """Decode as the data modules do."""
    image = Image.open(io.BytesIO(content))
    image.info[images.FULL_SIZE] = image.size
    if least is not None:
        image.draft("RGB", least(*image.size))
    image.load()
    return image


def by_simplejpeg(content: bytes, decode: Any, least: images.LeastSize | None) -> Image.Image:
    """Decode at the fraction that Pillow would choose, or at full size."""
    height, width, *_ = decode.decode_jpeg_header(content)
    divided = fraction((width, height), least(width, height)) if least else 1
    pixels = decode.decode_jpeg(content, min_width=-(-width // divided), min_height=-(-height // divided))
    image = Image.fromarray(pixels)
    image.info[images.FULL_SIZE] = (width, height)
    return image


def by_torch(content: bytes, decode: Any) -> Image.Image:
    """Decode with torchvision or torchcodec, always at full size: they cannot decode at a fraction."""
    pixels = decode(torch.frombuffer(content, dtype=torch.uint8), mode="RGB")
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def decoders() -> dict[str, Decode]:
    """Return the decoders that can be loaded."""
    found: dict[str, Decode] = {
        "Pillow, whole": lambda content: by_pillow(content, None),
        "Pillow, fraction": lambda content: by_pillow(content, FAST.least_size),
    }
    for name in ("torchvision.io", "torchcodec.decoders", "simplejpeg"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name}: skipped ({str(error).partition(chr(10))[0]})")
            continue
        if name == "simplejpeg":
            found[f"{name}, whole"] = lambda content, module=module: by_simplejpeg(content, module, None)
            found[f"{name}, fraction"] = lambda content, module=module: by_simplejpeg(content, module, FAST.least_size)
        else:
            found[f"{name}, whole"] = lambda content, decode=module.decode_jpeg: by_torch(content, decode)
    return found


def ways() -> dict[str, Callable[[bytes, dict[str, Any]], Any]]:
    """Return the combinations of decoder and resizing: file content and crop -> pixels; the first is the reference."""
    found: dict[str, Callable[[bytes, dict[str, Any]], Any]] = {}
    for name, decode in decoders().items():
        for resize, crop in (("Pillow", EXACT), ("torch", FAST)):
            if resize == "torch" or name.startswith("Pillow"):

                def way(content: bytes, params: dict[str, Any], decode: Decode = decode, crop: Any = crop) -> Any:
                    return crop.transform(decode(content), params)

                found[f"{name}; resized by {resize}"] = way
    return found


def as_array(pixels: Any) -> np.ndarray:
    """Convert either kind of result to float ``[H, W, 3]``."""
    return np.asarray(pixels.permute(1, 2, 0) if isinstance(pixels, torch.Tensor) else pixels, dtype=float)


def microseconds(work: Callable[[], object], times: int) -> float:
    """Return the CPU time of one call."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times * 1e6


def contents_of(size: tuple[int, int]) -> list[bytes]:
    """Encode the photographs as JPEGs."""
    files = [io.BytesIO() for _ in range(8)]
    for file, image in zip(files, photographs(size), strict=True):
        image.save(file, "JPEG", quality=90)
    return [file.getvalue() for file in files]


def compare(size: tuple[int, int], rounds: int) -> None:
    """Print the table for one image size."""
    contents, params = contents_of(size), [EXACT.make_params([]) for _ in range(8)]
    work = ways()
    crops = list(zip(contents, params, strict=True))
    results = {name: [as_array(way(*each)) for each in crops] for name, way in work.items()}
    reference = next(iter(results.values()))
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, way in work.items():
            everything = lambda way=way: [way(*each) for each in crops]  # noqa: E731
            times[name].append(microseconds(everything, 4) / len(contents))
    print(f"\n| {size[0]} x {size[1]} | images/s | off by, of 255 | worst |\n|---|--:|--:|--:|")
    for name in work:
        off = [float(np.abs(a - b).mean()) for a, b in zip(results[name], reference, strict=True)]
        rate = 1e6 / statistics.median(times[name])
        print(f"| {name} | {rate:.0f} | {statistics.mean(off):.2f} | {max(off):.2f} |")


def parts(size: tuple[int, int], rounds: int) -> None:
    """Print how a data worker spends the time of a sample."""
    tokenize, texts = CLIPTokenizer(), captions(BATCH)
    content = contents_of(size)[1]

    def decode() -> Image.Image:
        with decoding_at_least(FAST.least_size):
            return open_image(io.BytesIO(content), "")

    image = decode()
    pixels = FAST.transform(image, FAST.make_params([]))
    work: dict[str, tuple[Callable[[], object], int]] = {
        "header": (lambda: Image.open(io.BytesIO(content)), 1),
        "header and decoding": (decode, 1),
        "crop, resizing, tensor": (lambda: FAST(image), 1),
        "collating": (lambda: default_collate([pixels] * BATCH), BATCH),
        "tokenising": (lambda: tokenize(texts), BATCH),
    }
    spent = {
        name: statistics.median(microseconds(each, 10) / share for _ in range(rounds))
        for name, (each, share) in work.items()
    }
    print(f"\n{size[0]} x {size[1]}, microseconds: {', '.join(f'{name} {each:.0f}' for name, each in spent.items())}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", default=["1280x960", "640x480", "320x240"])
    arguments = options.parse_args()
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"Pillow {Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}, torch {torch.__version__}")
    for each in arguments.sizes:
        width, height = map(int, each.split("x"))
        compare((width, height), arguments.pairs)
        parts((width, height), arguments.pairs)


if __name__ == "__main__":
    main()
