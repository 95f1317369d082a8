"""Measure whether ``encode_patches`` finds images beside each other by their texts, and what it costs.

    python benchmarks/places.py --model last.ckpt [--classes folder | --drawings folder] [--queries 400]
        [--scales 1 1.5 2] [--seed 0] [--pairs 21]

Each query puts two images beside each other, or four in a grid, drawn at random and of different classes, each resized
and cropped as for the model, and asks for one of them by its text. For each grid and size of a part:

- right: how often the highest cosine of the text with a place lies in the right part,
- separate: how often separate encodings of the parts (``encode_image``, at the model's own size) choose it,
- false alarms: for a text of none of the parts, how often its highest cosine reaches the threshold that 95 % of the
  true texts reach (95 % for a model that knows nothing); for separate encodings too.

Images are the drawings of OpenMoji that quickstart trains on, with their names; another artist's drawings of the same
things, which no model here is trained on (docs/evidence/recipes.md says where they are); or those of a folder of
classes, each with "a photo of a (class)". Then the processor's seconds per image of ``encode_image`` and
``encode_patches``, alternating, at the model's own size.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from recipes.measuring import OtherDrawings
from results import Figure, compared, pair_parser, save
from torch import Tensor

from datamodules import ImageFolderClasses
from datamodules.openmoji import OpenMojiClasses
from lit_clip import CLIP, load_model
from lit_clip.evaluation.data import LabelledImages
from lit_clip.models.preprocess import image_transform
from lit_clip.models.size import height_width

GRIDS = ((1, 2), (2, 2))
KEPT = 0.95  # of the true texts
BATCH = 8


class Query(NamedTuple):
    """Rows of the images in the grid, which of them is asked for, and the row of an image that is absent."""

    rows: list[int]
    asked: int
    absent: int


def draw_queries(labels: Sequence[int], parts: int, number: int, seed: int) -> list[Query]:
    """Draw images of different classes."""
    rng = random.Random(seed)
    queries: list[Query] = []
    while len(queries) < number:
        rows = rng.sample(range(len(labels)), parts + 1)
        if len({labels[row] for row in rows}) == parts + 1:
            queries.append(Query(rows[:-1], rng.randrange(parts), rows[-1]))
    return queries


class Peaks(NamedTuple):
    """The highest cosine in each part: float ``[queries, parts]``, of the text that is asked for and the absent one."""

    asked: Tensor
    absent: Tensor

    def right(self, queries: Sequence[Query]) -> float:
        wanted = torch.tensor([query.asked for query in queries])
        return (self.asked.argmax(dim=1) == wanted).double().mean().item()

    def false_alarms(self) -> float:
        threshold = self.asked.amax(dim=1).quantile(1 - KEPT)
        return (self.absent.amax(dim=1) >= threshold).double().mean().item()


class Places:
    """A model, images and the texts of their classes."""

    def __init__(self, model: CLIP, images: LabelledImages, template: str) -> None:
        self.model, self.images, self.labels = model, images, list(images.labels())
        texts = [template.format(name) for name in images.class_names]
        batches = [texts[start : start + 64] for start in range(0, len(texts), 64)]
        self.texts = torch.cat([model.encode_text(model.tokenize(batch), normalize=True) for batch in batches])

    def pixels(self, rows: Sequence[int], side: int | None = None) -> Tensor:
        """Images -> ``[N, 3, H, W]``, of the model's own size or ``side``."""
        preprocessing = self.model.preprocessing
        if side is not None:
            preprocessing = replace(preprocessing, image_size=side)
        transform = image_transform(preprocessing)
        return torch.stack([transform(self.images[row][0]) for row in rows])

    def cosines(self, query: Query, features: Tensor) -> Tensor:
        """Cosines of both texts: unit ``[..., D]`` -> ``[2, ...]``."""
        texts = self.texts[[self.labels[query.rows[query.asked]], self.labels[query.absent]]]
        return torch.stack([features @ text for text in texts])

    def composed(self, queries: Sequence[Query], grid: tuple[int, int], side: int) -> Peaks:
        rows, columns = grid
        peaks = []
        for start in range(0, len(queries), BATCH):
            batch = queries[start : start + BATCH]
            parts = torch.stack([self.pixels(query.rows, side) for query in batch])  # [B, parts, 3, S, S]
            images = parts.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
            features = self.model.encode_patches(images, normalize=True).permute(0, 2, 3, 1)  # [B, h, w, D]
            places = features.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # [B, rows, h, columns, w, D]
            for query, found in zip(batch, places, strict=True):
                peaks.append(self.cosines(query, found).amax(dim=(2, 4)).flatten(1))
        return Peaks(*torch.stack(peaks, dim=1))

    def separate(self, queries: Sequence[Query]) -> Peaks:
        used = sorted({row for query in queries for row in query.rows})
        batches = [used[start : start + 4 * BATCH] for start in range(0, len(used), 4 * BATCH)]
        encoded = [self.model.encode_image(self.pixels(batch), normalize=True) for batch in batches]
        features = dict(zip(used, torch.cat(encoded), strict=True))
        stacked = [torch.stack([features[row] for row in query.rows]) for query in queries]
        return Peaks(*torch.stack([self.cosines(*pair) for pair in zip(queries, stacked, strict=True)], dim=1))


def measure(places: Places, number: int, scales: Sequence[float], seed: int) -> dict[str, Figure]:
    """Print a row of the table for each grid and size, and return the figures."""
    own = max(height_width(places.model.preprocessing.image_size))
    figures: dict[str, Figure] = {}
    print("| grid | part | right | separate | false alarms | separate |\n|---|--:|--:|--:|--:|--:|")
    for grid in GRIDS:
        queries = draw_queries(places.labels, grid[0] * grid[1], number, seed)
        apart = places.separate(queries)
        for scale in scales:
            side = max(1, round(scale * own / 32)) * 32
            found = places.composed(queries, grid, side)
            name = f"{grid[0]} x {grid[1]}"
            values = [found.right(queries), apart.right(queries), found.false_alarms(), apart.false_alarms()]
            print(f"| {name} | {side} | {' | '.join(f'{100 * value:.1f}' for value in values)} |", flush=True)
            names = ("right", "separate", "false_alarms", "separate_false_alarms")
            figures |= {f"{key} {name} {side}": value for key, value in zip(names, values, strict=True)}
    return figures


def processor_seconds(encode: Callable[[], Tensor]) -> float:
    """Time the encoding of a batch, for one image."""
    start = time.process_time()
    encode()
    return (time.process_time() - start) / BATCH


@torch.no_grad()
def main() -> None:
    arguments = pair_parser(__doc__)
    arguments.set_defaults(pairs=21)
    arguments.add_argument("--model", required=True, help="anything that load_model opens")
    arguments.add_argument("--classes", help="a folder with a subfolder of images for each class; default: OpenMoji")
    arguments.add_argument("--drawings", type=Path, help="a folder of another artist's drawings, HEXCODE.png or .webp")
    arguments.add_argument("--queries", type=int, default=400, help="for each grid")
    arguments.add_argument(
        "--scales", type=float, nargs="+", default=[1, 1.5, 2], help="of a part, of the model's size"
    )
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    model = load_model(options.model).eval()
    images = OtherDrawings(options.drawings) if options.drawings else OpenMojiClasses("trained")
    if options.classes:
        images = ImageFolderClasses(options.classes)
    places = Places(model, images, "a photo of a {}" if options.classes else "{}")
    figures = measure(places, options.queries, options.scales, options.seed)
    batch = places.pixels(range(BATCH))
    works = (partial(model.encode_image, batch), partial(model.encode_patches, batch))
    times = [(processor_seconds(works[0]), processor_seconds(works[1])) for _ in range(options.pairs + 1)]
    title = f"processor's seconds per image of encode_image and encode_patches, batch {BATCH}"
    found = compared("places", title, times[1:], peer="encode_image", figures=figures)
    print(f"{title}: {found.peers:.5f} and {found.ours:.5f}, times as fast: {found.ratio}")
    save(options.json, found)


if __name__ == "__main__":
    main()
