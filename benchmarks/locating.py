"""How well `lit-clip locate` tells texts that an image shows from those it does not, and what it costs.

    python benchmarks/locating.py --model best.ckpt --images validation/classes [--size 150] [--forms "a {}"]

Two images of different classes lie beside each other, each cropped to a square: of the folder, or without it of 40
drawings that the quickstart trains on. Asked are both names with all other classes' names (near), and names of ImageNet
alone (far); the background has 100 other names, of CIFAR-100. Printed are the share of shown texts that are seen, of
these the share whose peak is in their half and the mean IoU of box and half, and the shares of absent texts that are
seen. Times are medians of pairs that alternate.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps

import lit_clip
from datamodules import OpenMojiClasses
from lit_clip import CLIP
from lit_clip.embedding.image_files import images_in
from lit_clip.evaluation.prompts import paper_class_names
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.locating import Locator, Region
from lit_clip.models.size import height_width

FAR, DRAWINGS = 40, 40
FORMS = ["{}", "a {}", "a photo of a {}"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--images", type=Path, help="a folder of class folders")
    arguments.add_argument("--size", type=int, default=150, help="composed images")
    arguments.add_argument("--forms", nargs="+", default=FORMS, help="of the texts; {} stands for the name")
    arguments.add_argument("--backgrounds", nargs="+", default=FORMS, help="their form")
    arguments.add_argument("--false_alarms", type=float, default=0.05)
    arguments.add_argument("--scale", type=float, default=1)
    options = arguments.parse_args()
    model = lit_clip.load_model(options.model)
    pairs = composed(options.images, options.size, height_width(model.preprocessing.image_size))
    print(f"{len(pairs)} images, false alarms {options.false_alarms:g}, scale {options.scale:g}\n")
    print("| texts | background | seen | peak in its half | IoU | near | far |\n|---|---|--:|--:|--:|--:|--:|")
    for form in options.forms:
        for background in options.backgrounds:
            numbers = rates(model, pairs, form, background, options.false_alarms, options.scale)
            print(
                f"| {form} | {background} |", " | ".join(f"{100 * number:.1f}" for number in numbers), "|", flush=True
            )
    cost(model, pairs[0][0])


def named_files(folder: Path | None) -> list[tuple[Path, str]]:
    """Return image files, each with its class's name."""
    if folder is not None:
        return [(file.path, file.path.parent.name) for file in images_in(folder)]
    drawings = OpenMojiClasses("trained")
    return random.Random(2).sample([(path, drawings.class_names[label]) for path, label in drawings.files], DRAWINGS)


def composed(folder: Path | None, size: int, side: tuple[int, int]) -> list[tuple[Image.Image, list[str], list[str]]]:
    """Return images of two parts, the classes' names of both, and all names."""
    files, draw, found = named_files(folder), random.Random(0), []
    names = sorted({name for _, name in files})
    while len(found) < size:
        parts = draw.sample(files, 2)
        shown = [name for _, name in parts]
        if shown[0] != shown[1]:
            whole = Image.new("RGB", (2 * side[1], side[0]))
            for place, (path, _) in enumerate(parts):
                with Image.open(path) as image:
                    whole.paste(ImageOps.fit(image.convert("RGB"), (side[1], side[0])), (place * side[1], 0))
            found.append((whole, shown, names))
    return found


def rates(
    model: CLIP,
    pairs: list[tuple[Image.Image, list[str], list[str]]],
    form: str,
    background: str,
    error: float,
    scale: float,
) -> list[float]:
    """Return the shares of the table's columns."""
    others = [background.format(name) for name in paper_class_names("CIFAR100")]
    far = [form.format(name) for name in random.Random(1).sample(imagenet_class_names(), FAR)]
    named = Locator(model, [form.format(name) for name in pairs[0][2]], others, error, scale)
    alone = [Locator(model, [text], others, error, scale) for text in far]
    counts: dict[str, list[float]] = defaultdict(list)
    for image, shown, names in pairs:
        for name, region in zip(names, named(image).regions, strict=True):
            if name not in shown:
                counts["near"].append(region.seen)
            else:
                counts["seen"].append(region.seen)
                if region.seen:
                    inside, overlap = in_half(region, image, shown.index(name))
                    counts["half"].append(inside)
                    counts["iou"].append(overlap)
        # A text that is asked alone competes with the background only.
        counts["far"] += [
            locator(image).regions[0].seen for locator in random.Random(len(counts["far"])).sample(alone, 4)
        ]
    return [statistics.fmean(counts[name]) for name in ("seen", "half", "iou", "near", "far")]


def in_half(region: Region, image: Image.Image, half: int) -> tuple[bool, float]:
    """Return whether a region's peak is in a half of the image, and the IoU of its box with the half."""
    left, top, right, bottom = region.box(image.size) or (0, 0, 0, 0)
    middle = image.width // 2
    shared = max(0, min(right, middle * (half + 1)) - max(left, middle * half)) * (bottom - top)
    union = (right - left) * (bottom - top) + middle * image.height - shared
    return region.peak[0] // (region.mask.shape[1] // 2) == half, shared / union


def cost(model: CLIP, image: Image.Image) -> None:
    """Time a map of three texts beside `encode_image` of one square image and of as many as have the pixels."""
    texts, pixels = model.encode(["a dress", "a hat", "a dog"]), model.preprocess(image)[None].repeat(2, 1, 1, 1)
    locator, times = Locator(model, ["a dress", "a hat", "a dog"]), defaultdict(list)
    todo: dict[str, Callable[[], object]] = {
        "encode_image": lambda: model.encode_image(pixels),
        "locate": lambda: model.locate(image, texts),
        "Locator": lambda: locator(image),
    }
    with torch.inference_mode():
        for _ in range(21):
            for name, call in todo.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    for name in ("locate", "Locator"):
        ratio = statistics.median(a / b for a, b in zip(times[name][1:], times["encode_image"][1:], strict=True))
        print(f"\n{name}: {1000 * statistics.median(times[name]):.1f} ms, {ratio:.2f} times encode_image of its pixels")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    main()
