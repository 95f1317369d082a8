"""Make a data set of icons and their names from Iconify's package, for the grid ``icons.yaml``.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-2.2.535.tgz
    python benchmarks/recipes/icons.py package icons

Writes tables of 500, 5,000 and 50,000 pairs, each part of the next, and folders of icons by name: those of designers
from whom no pair is, with the names that many designers have drawn. An icon is black on white, 64 x 64 pixels; its
caption is its name without words on style, such as "outline". Logos, flags, emoji and icons in colour are left out.
Each set of icons has a licence of its own, which ``package/collections.json`` names.
"""

import argparse
import csv
import json
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from resvg_py import svg_to_bytes

PAIRS = (500, 5_000, 50_000)
HELD_OUT = 8  # one designer of so many
DESIGNERS = 20  # of training, who have drawn a name for it to be a class
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
    """An icon of a designer's set."""

    designer: str
    caption: str
    svg: str

    def write(self, folder: Path) -> Path:
        """Draw it into a folder, and return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.designer} {self.caption}.png"
        path.write_bytes(svg_to_bytes(svg_string=self.svg, background="white", skip_system_fonts=True))
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="Iconify's package, unpacked")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args()
    training, others = [], []
    for icon in read_icons(given.package):
        (training if zlib.crc32(icon.designer.encode()) % HELD_OUT else others).append(icon)
    random.Random(0).shuffle(training)
    drawn = Counter(icon.caption for icon in training)
    held_out = [icon for icon in others if drawn[icon.caption] >= DESIGNERS]
    for icon in held_out:
        icon.write(given.out / "classes" / icon.caption)
    rows = [
        (str(icon.write(given.out / "training").relative_to(given.out)), icon.caption) for icon in training[: PAIRS[-1]]
    ]
    for pairs in PAIRS:
        with (given.out / f"{pairs}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows[:pairs]])
    names = len({icon.caption for icon in held_out})
    print(f"{len(training):,} pairs; held out: {len(held_out):,} icons with {names} names, of other designers")


def read_icons(package: Path) -> list[Icon]:
    """Return one icon for each designer and caption, in the order of their names."""
    icons: dict[tuple[str, str], Icon] = {}
    for designer, about in json.loads((package / "collections.json").read_text(encoding="utf-8")).items():
        if about.get("hidden") or about.get("palette") or not about.get("category", "").startswith(CATEGORIES):
            continue
        of_set = json.loads((package / "json" / f"{designer}.json").read_text(encoding="utf-8"))
        for name in sorted(of_set["icons"], key=lambda name: (len(name), name)):  # the plain style has the shortest
            words = [word for word in name.split("-") if word.isascii() and word.isalpha() and word not in STYLES]
            drawing = {**of_set, **of_set["icons"][name]}
            if words and "<animate" not in drawing["body"]:  # those begin with an empty drawing
                caption = " ".join(words)
                icons.setdefault((designer, caption), Icon(designer, caption, svg(drawing)))
    return list(icons.values())


def svg(drawing: dict[str, Any]) -> str:
    """Return an icon of Iconify's format as a file."""
    left, top, width, height = (drawing.get(key, default) for key, default in SIZES)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f'viewBox="{left} {top} {width} {height}" width="64" height="64" color="black"'
    return f"<svg {namespaces} {box}>{drawing['body']}</svg>"


if __name__ == "__main__":
    main()
