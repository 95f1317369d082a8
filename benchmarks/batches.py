"""False negatives in batches, and the time that an order takes: plain, without duplicates, and hard.

    python benchmarks/batches.py [--images 6000] [--batch 256] [--epochs 3]

A made-up table has five rows for each image. One caption in twenty is one of a hundred common ones, and the images have
features in clusters of ten, as similar as photographs of one kind of thing. A false negative of a pair is another pair
of its batch with its image or its caption. Each rank computes the order once an epoch; its time is told for a step. The
time to read the table, and to find all neighbours, is spent once a run. No image is opened.
"""

import argparse
import csv
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from datamodules import BatchOptions
from datamodules.open_source import open_source
from datamodules.pairs.batch_order import BatchOrder
from datamodules.pairs.related_rows import name_pairs, stored_neighbours
from datamodules.pairs.source import PairSource
from lit_clip.embedding.feature_files import write_features

ROWS, COMMON, CLUSTER = 5, 100, 10


def write_data(folder: Path, images: int) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write a table and its features; return the table, and each row's image and caption as numbers."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(images), ROWS)
    caption = np.where(
        rng.random(len(image)) < 0.05, rng.integers(COMMON, size=len(image)), COMMON + np.arange(len(image))
    )
    table = folder / "captions.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = ((f"{one}.jpg", f"a caption of the number {other}") for one, other in zip(image, caption, strict=True))
        csv.writer(file).writerows([("image", "caption"), *rows])
    features = rng.normal(size=(images // CLUSTER + 1, 512))[np.arange(images) // CLUSTER]
    features = (features + 0.5 * rng.normal(size=(images, 512))).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    write_features(folder / "features.parquet", [f"{one}.jpg" for one in range(images)], features, {})
    return table, image, caption


def false_negatives(order: np.ndarray, batch: int, *labels: np.ndarray) -> float:
    """Return the share of pairs with a duplicate in their batch."""
    found = 0
    for rows in order[: len(order) // batch * batch].reshape(-1, batch):
        counts = [(label[rows], Counter(label[rows].tolist())) for label in labels]
        found += sum(any(count[each[place]] > 1 for each, count in counts) for place in range(batch))
    return found / (len(order) // batch * batch)


def of_cluster(order: np.ndarray, batch: int, image: np.ndarray) -> float:
    """Return how many other pairs of its cluster a pair has in its batch, on average."""
    counts = [np.bincount(image[rows] // CLUSTER) for rows in order[: len(order) // batch * batch].reshape(-1, batch)]
    return float(sum((count * (count - 1)).sum() for count in counts) / (len(counts) * batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 6000), ("batch", 256), ("epochs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        table, image, caption = write_data(Path(temporary), options.images)
        source: PairSource = open_source(str(table))
        start = time.perf_counter()
        names = name_pairs(source, 0)
        read = time.perf_counter()
        near = stored_neighbours(str(table.with_name("features.parquet")), names)
        print(f"{len(source):,} pairs: read in {read - start:.1f} s, neighbours in {time.perf_counter() - read:.1f} s")
        for title, settings in (
            ("plain", None),
            ("duplicates: avoided", BatchOptions("avoided")),
            ("hard: 0.25", BatchOptions(hard=0.25)),
            ("hard: 0.5", BatchOptions(hard=0.5)),
        ):
            made = settings and BatchOrder(source, settings, 0, names.shared, near if settings.hard else None)
            steps = made.batches(options.batch) if made else len(source) // options.batch
            start = time.perf_counter()
            orders = [
                made.order(epoch, options.batch) if made else source.order(epoch, 0) for epoch in range(options.epochs)
            ]
            each = (time.perf_counter() - start) / options.epochs / steps
            wrong = np.mean([false_negatives(order, options.batch, image, caption) for order in orders])
            kind = np.mean([of_cluster(order, options.batch, image) for order in orders])
            print(
                f"{title}: {steps} steps, {1000 * each:.2f} ms a step, {wrong:.1%} of pairs with a false negative, "
                f"{kind:.2f} pairs of its kind beside a pair"
            )


if __name__ == "__main__":
    main()
