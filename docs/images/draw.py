"""Draw the first page's pictures from a finished run of the quickstart, for light and for dark pages.

    python docs/images/draw.py runs/quickstart/version_0
    python docs/images/draw.py --tables new_names
    python docs/images/draw.py --tables new_names --compare before.ckpt after.ckpt

The second line writes tables: `new.csv` (the drawings that the quickstart holds out), `new_lines.csv` (the same as line
drawings) and `known_lines.csv` (every eighth line drawing of the others). The third line prints how many of these line
drawings two models name. `before.ckpt` is the quickstart's; `after.ckpt` is what `lit-clip fit --config finetune_clip`
makes of it, with `--model.architecture null --model.pretrained before.ckpt --data.train new_names/new.csv` and any
folders of classes.

The pictures need Chromium, whose executable is `chromium` or named by $CHROMIUM.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lit_clip
from datamodules import OpenMojiClasses
from lit_clip.locating import Locator
from lit_clip.locating.overlay import Scale, overlay
from lit_clip.tools.html import thumbnail, write_page

HERE = Path(__file__).parent
MODES = {"light": 1, "dark": 0}  # Chromium's numbers of the preferred colour scheme
COLOURS_USED = 128  # of an image: screenshots of text and drawings look the same with them and take a third
QUERIES = ["red heart", "person running"]
SIDE_BY_SIDE = ["pizza", "tiger", "bicycle"]
ABSENT = "sailboat"


def main() -> None:
    """Draw the pictures, or write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="the run's folder: runs/quickstart/version_0")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="write the tables to this folder")
    parser.add_argument("--compare", nargs=2, metavar="CHECKPOINT", help="name the tables' line drawings by both")
    options = parser.parse_args()
    if options.tables:
        write_tables(options.tables)
    if options.compare:
        compare(options.tables, *options.compare)
    if options.run:
        model = lit_clip.load_model(str(options.run.absolute() / "checkpoints" / "last.ckpt"))
        draw_search(model)
        draw_places(model)


def write_tables(folder: Path) -> None:
    """Write the tables of images and names that the first page fine-tunes and tests on."""
    new, lines = OpenMojiClasses("held_out"), OpenMojiClasses("held_out", style="line")
    known = OpenMojiClasses("trained", style="line")
    folder.mkdir(exist_ok=True)
    for name, images, step in (("new", new, 1), ("new_lines", lines, 1), ("known_lines", known, 8)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(path, images.class_names[label]) for path, label in images.files[::step]]
            csv.writer(file).writerows([("image", "caption"), *rows])


def compare(tables: Path, *checkpoints: str) -> None:
    """Print which shares of each table's line drawings two models name, and the interval of the difference."""
    for name in ("new_lines", "known_lines"):
        before, after = (named(tables / f"{name}.csv", checkpoint) for checkpoint in checkpoints)
        draws = np.random.default_rng(0).integers(len(before), size=(10_000, len(before)))
        low, high = np.percentile((after - before)[draws].mean(axis=1), [2.5, 97.5])
        shares = f"{before.mean():.1%} before, {after.mean():.1%} after"
        sys.stdout.write(f"{name}: {len(before)} drawings, {shares}, {low:+.1%} to {high:+.1%}\n")


def named(table: Path, checkpoint: str) -> np.ndarray:
    """Return for each drawing whether its own name is the nearest of the table's, 0 or 1."""
    model = lit_clip.load_model(checkpoint)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    nearest = model.similarity([Path(row["image"]) for row in rows], [row["caption"] for row in rows]).argmax(dim=1)
    return (nearest == torch.arange(len(rows))).double().numpy()


def draw_search(model: Any) -> None:
    """The six nearest drawings of each query, of all that the quickstart trains on."""
    images = OpenMojiClasses("trained")
    features = model.encode([path for path, _ in images.files])
    rows: list[dict[str, Any]] = []
    for query in QUERIES:
        scores, nearest = (features @ model.encode(query)).topk(6)
        drawings = [images[row] for row in nearest.tolist()]
        found = [
            {"image": thumbnail(image), "name": images.class_names[label], "score": float(score)}
            for (image, label), score in zip(drawings, scores, strict=True)
        ]
        rows.append({"title": query, "found": found})
    draw_page("search", rows, (720, 404))


def draw_places(model: Any) -> None:
    """Where the model sees texts in drawings beside each other, one of them not there."""
    images = OpenMojiClasses("trained")
    drawings = {images.class_names[label]: row for row, (_, label) in enumerate(images.files)}
    whole = Image.new("RGB", (72 * len(SIDE_BY_SIDE), 72), "white")
    for place, name in enumerate(SIDE_BY_SIDE):
        whole.paste(images[drawings[name]][0], (72 * place, 0))
    texts = [*SIDE_BY_SIDE, ABSENT]
    others = [name for name in images.class_names[::18] if name not in texts]  # as notebooks/quickstart.ipynb
    located = Locator(model, texts, others)(whole)
    scale = Scale.around(located.level, max(region.cosine for region in located.regions))
    panels = []
    for text, cosines, region in zip(texts, located.maps, located.regions, strict=True):
        drawn = overlay(whole, cosines, scale, region.cosine, region.box(whole.size) if region.seen else None)
        panels.append({"image": thumbnail(drawn, 512), "name": text if region.seen else f"{text}: not seen"})
    draw_page("places", [{"title": "", "found": panels}], (720, 426))


def draw_page(name: str, rows: list[dict[str, Any]], size: tuple[int, int]) -> None:
    """Save what Chromium shows of a page of images in rows, in light and in dark colours."""
    chromium = os.environ.get("CHROMIUM", "chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, f"{name}.html")
        write_page(page, HERE / "pictures.html", title=name, name=name, rows=rows)
        for mode, number in MODES.items():
            target = page.with_suffix(f".{mode}.png")
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            flags += [
                "--disable-background-networking",
                f"--blink-settings=preferredColorScheme={number}",
                f"--window-size={size[0]},{size[1]}",
            ]
            command = [chromium, *flags, f"--screenshot={target}", page.as_uri()]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            save(Image.open(target), name, mode)


def save(image: Image.Image, name: str, mode: str) -> None:
    """Write ``NAME-MODE.png`` beside this file, with few colours."""
    small = image.convert("RGB").quantize(COLOURS_USED, dither=Image.Dither.NONE)
    small.save(HERE / f"{name}-{mode}.png", optimize=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
