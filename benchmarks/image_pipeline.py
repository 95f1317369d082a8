"""Time JPEGs to training batches: open_clip's CSV pipeline and ours on the same files, one worker each, alternating.

    python benchmarks/image_pipeline.py [--pairs 5] [--images 512] [--size 1280x960]

Prints images per second of one worker, from a loader's first batch to its last, with each package's tokenizer and
default training augmentation to 224 pixels. Then the pixel difference, on the same crops, between a JPEG decoded at a
fraction of its size and resized by torch and one decoded at full size and resized by Pillow. The photographs are those
that scikit-image and scikit-learn install, cropped to the size. open_clip's pipeline needs pandas.
"""

import csv
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import skimage
import sklearn
from peers import captions, parser
from PIL import Image, ImageOps
from results import compared, need, save
from torch.utils.data import DataLoader

from datamodules import Captions, RandomSquareCrop
from lit_clip.tools.images import decoding_at_least, open_image

BATCH = 32


def photographs(size: tuple[int, int]) -> list[Image.Image]:
    """Load eight real photographs, resized and cropped to the size."""
    sk, sl = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images"
    names = ("astronaut.png", "coffee.png", "chelsea.png", "hubble_deep_field.jpg", "rocket.jpg", "motorcycle_left.png")
    files = [sk / name for name in names] + [sl / "china.jpg", sl / "flower.jpg"]
    return [ImageOps.fit(Image.open(file).convert("RGB"), size, Image.Resampling.LANCZOS) for file in files]


def write_table(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write images in JPEG quality 90, and a TSV of them for open_clip."""
    contents = []
    for image in photographs(size):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    with (folder / "pairs.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for i, caption in enumerate(captions(count)):
            path = folder / f"{i}.jpg"
            path.write_bytes(contents[i % len(contents)])
            rows.writerow([path, caption])
    return folder / "pairs.tsv"


def open_clip_loader(table: Path) -> Iterable[Any]:
    """Build the loader that ``open_clip_train.data.get_csv_dataset`` builds for one process."""
    from open_clip_train.data import CsvDataset

    transform = open_clip.image_transform(224, is_train=True)
    dataset = CsvDataset(str(table), transform, "filepath", "title", tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=1, drop_last=True)


def our_loader(table: Path) -> Iterable[Any]:
    """Return the data module's training loader."""
    data = Captions(str(table), str(table), batch_size=BATCH, num_workers=1)
    data.setup("fit")
    return data.train_dataloader()


def rate(loader: Iterable[Any]) -> float:
    """Return images per second from the first batch to the last."""
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in batches:
        count += BATCH
    return count / (time.perf_counter() - start)


def differences(size: tuple[int, int]) -> list[float]:
    """Return each photograph's mean absolute pixel difference (0 to 255)."""
    plain, crop = (RandomSquareCrop(exact=exact, size=224, interpolation="bicubic") for exact in (True, False))
    result = []
    for image in photographs(size):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        whole = open_image(file, "")
        with decoding_at_least(crop.least_size):
            part = open_image(file, "")
        params = crop.make_params([])
        one = np.asarray(plain.transform(whole, params), dtype=float)
        other = crop.transform(part, params).permute(1, 2, 0).numpy()
        result.append(float(np.abs(one - other).mean()))
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=512)
    arguments.add_argument("--size", default="1280x960")
    options = arguments.parse_args()
    need("pandas", "webdataset")
    logging.disable(logging.WARNING)
    width, height = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder), (width, height), options.images)
        makers: tuple[Callable[[Path], Iterable[Any]], ...] = (open_clip_loader, our_loader)
        rates = [[rate(make(table)) for make in makers] for _ in range(options.pairs + 1)][1:]  # the first warms up
    found = compared(
        "image_pipeline",
        f"{options.size} JPEGs to 224 pixels, one worker",
        [(theirs, ours) for theirs, ours in rates],
        "images/s",
        more_is_better=True,
    )
    print(
        f"{found.title}: open_clip {found.peers:.0f} images/s, lit-clip {found.ours:.0f}, times as many: {found.ratio}"
    )
    off = differences((width, height))
    print(f"pixel difference of 255 by decoding at a fraction: mean {statistics.mean(off):.2f}, largest {max(off):.2f}")
    found.figures.update(mean_difference=statistics.mean(off), largest_difference=max(off))
    save(options.json, found)


if __name__ == "__main__":
    main()
