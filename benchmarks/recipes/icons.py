"""Make a data set of icons and their names from Iconify's package, for the grid ``icons.yaml``.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-2.2.535.tgz
    python benchmarks/recipes/icons.py package icons

Writes tables of 500, 5,000, 50,000 and all pairs, each part of the next, and folders of icons by name: those of
authors from whom no pair is, with the names that many icons have, unless training has nearly the same picture with
that name, as sets borrow from each other. An icon is black on white, 64 x 64 pixels; its caption is its name without
words on style, such as "outline". Logos, flags, emoji and icons in colour are left out. Each set of icons has a
licence of its own, which ``package/collections.json`` names.
"""

import argparse
import csv
import io
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from resvg_py import svg_to_bytes

TABLES = {"500": 500, "5000": 5_000, "50000": 50_000, "all": None}
HELD_OUT = 8  # one author of so many
DRAWN = 20  # training icons that a name must have to be a class
BORROWED = 0.05  # mean difference of pixels, from 0 to 1, below which an icon is another's
CATEGORIES = ("UI", "Material", "Thematic")
STYLES = {
    *("outline", "outlined", "filled", "fill", "solid", "bold", "duotone", "duo", "twotone", "two", "tone", "line"),
    *(
        "linear",
        "thin",
        "light",
        "regular",
        "sharp",
        "rounded",
        "round",
        "broken",
        "baseline",
        "alt",
        "stroke",
        "color",
    ),
}
SIZES = (("left", 0), ("top", 0), ("width", 16), ("height", 16))  # with the defaults of Iconify's format


class Icon(NamedTuple):
    """An icon of a set."""

    source: str
    author: str
    caption: str
    svg: str

    @property
    def held_out(self) -> bool:
        """Whether its author is not in training."""
        return zlib.crc32(self.author.encode()) % HELD_OUT == 0

    def png(self) -> bytes:
        """Draw it."""
        return svg_to_bytes(svg_string=self.svg, background="white", skip_system_fonts=True)

    def grey(self) -> np.ndarray:
        """Draw it as float32 ``[64, 64]`` from 0 to 1."""
        return np.asarray(Image.open(io.BytesIO(self.png())).convert("L"), np.float32) / 255

    def write(self, folder: Path) -> Path:
        """Draw it into a folder, and return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.source} {self.caption}.png"
        path.write_bytes(self.png())
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="Iconify's package, unpacked")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args()
    icons = read_icons(given.package)
    training = [icon for icon in icons if not icon.held_out]
    random.Random(0).shuffle(training)
    held_out = unseen(icons, training)
    for icon in held_out:
        icon.write(given.out / "classes" / icon.caption)
    files = [icon.write(given.out / "training").relative_to(given.out) for icon in training]
    rows = [(str(file), icon.caption) for file, icon in zip(files, training, strict=True)]
    for name, pairs in TABLES.items():
        with (given.out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows[:pairs]])
    names = len({icon.caption for icon in held_out})
    sources, authors = len({icon.source for icon in training}), len({icon.author for icon in training})
    print(f"{len(training):,} icons of {sources} sets by {authors} authors")
    print(f"held out: {len(held_out):,} icons with {names} names, by {len({icon.author for icon in held_out})} others")


def unseen(icons: Sequence[Icon], training: Sequence[Icon]) -> list[Icon]:
    """Return the icons to name: held out, of a frequent name, and not nearly a picture of training with that name."""
    drawn: dict[str, list[Icon]] = defaultdict(list)
    for icon in training:
        drawn[icon.caption].append(icon)
    pictures = cache(lambda caption: np.stack([icon.grey() for icon in drawn[caption]]))
    frequent = [icon for icon in icons if icon.held_out and len(drawn[icon.caption]) >= DRAWN]
    return [icon for icon in frequent if abs(pictures(icon.caption) - icon.grey()).mean((1, 2)).min() >= BORROWED]


def read_icons(package: Path) -> list[Icon]:
    """Return one icon for each set and caption, in the order of their names."""
    icons: dict[tuple[str, str], Icon] = {}
    for source, about in json.loads((package / "collections.json").read_text(encoding="utf-8")).items():
        if about.get("hidden") or about.get("palette") or not about.get("category", "").startswith(CATEGORIES):
            continue
        of_set = json.loads((package / "json" / f"{source}.json").read_text(encoding="utf-8"))
        for name in sorted(of_set["icons"], key=lambda name: (len(name), name)):  # the plain style has the shortest
            words = [word for word in name.split("-") if word.isascii() and word.isalpha() and word not in STYLES]
            drawing = {**of_set, **of_set["icons"][name]}
            if words and "<animate" not in drawing["body"]:  # those begin with an empty drawing
                caption = " ".join(words)
                icons.setdefault((source, caption), Icon(source, about["author"]["name"], caption, svg(drawing)))
    return list(icons.values())


def svg(drawing: dict[str, Any]) -> str:
    """Return an icon of Iconify's format as a file."""
    left, top, width, height = (drawing.get(key, default) for key, default in SIZES)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f'viewBox="{left} {top} {width} {height}" width="64" height="64" color="black"'
    return f"<svg {namespaces} {box}>{drawing['body']}</svg>"


if __name__ == "__main__":
    main()
