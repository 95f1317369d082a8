"""Draw the first page's image from a finished run of the quickstart, for light and for dark pages.

    python docs/images/draw.py runs/quickstart/version_0

Needs Chromium, whose executable is `chromium` or named by $CHROMIUM.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lit_clip
from datamodules import OpenMojiClasses
from lit_clip.tools.html import thumbnail, write_page

HERE = Path(__file__).parent
MODES = {"light": 1, "dark": 0}  # Chromium's numbers of the preferred colour scheme
COLOURS_USED = 128  # of an image: screenshots of text and drawings look the same with them and take a third


def main() -> None:
    """Draw the image."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="the run's folder: runs/quickstart/version_0")
    run = parser.parse_args().run
    checkpoint = run.absolute() / "checkpoints" / "last.ckpt"
    with tempfile.TemporaryDirectory() as name:
        draw_nearest_names(checkpoint, Path(name))


def draw_nearest_names(checkpoint: Path, folder: Path) -> None:
    """Every fifth drawing that the quickstart holds out, with its five nearest names of all."""
    model, images = lit_clip.load_model(str(checkpoint)), OpenMojiClasses("held_out")
    places = range(2, len(images), 8)[:20]
    names = model.encode(images.class_names)
    drawings: list[dict[str, Any]] = []
    for image, label in (images[place] for place in places):
        scores, nearest = (model.encode([image]) @ names.T)[0].topk(5)
        found = [(images.class_names[int(row)], float(score)) for row, score in zip(nearest, scores, strict=True)]
        drawings.append({"image": thumbnail(image), "name": images.class_names[label], "nearest": found})
    page = folder / "nearest_names.html"
    write_page(page, HERE / "nearest_names.html", title="nearest names", drawings=drawings)
    screenshot(page, "nearest_names", (1100, 574))


def screenshot(page: Path, name: str, size: tuple[int, int]) -> None:
    """Save what Chromium shows of a page, in light and in dark colours."""
    chromium = os.environ.get("CHROMIUM", "chromium")
    for mode, number in MODES.items():
        target = page.with_suffix(f".{mode}.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        flags += [f"--blink-settings=preferredColorScheme={number}", f"--window-size={size[0]},{size[1]}"]
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
