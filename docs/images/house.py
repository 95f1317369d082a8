"""Draw the packages as a house: a floor for each layer of the import contracts, a box for each room.

``make house`` writes docs/images/house.svg. A line leads from a room to one that it imports, and is left out where it
follows from others; a line to another package is dashed.
"""

import sys
import tomllib
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import grimp

ROOT = Path(__file__).parents[2]
PICTURE = Path(__file__).with_name("house.svg")
PACKAGES = ("lit_clip", "datamodules", "callbacks")
FLOOR = 58  # pixels from one floor to the next
HEIGHT = 32  # of a box
MARGIN = 14  # between boxes
LETTER = 6.6  # width
MOST = 4  # boxes side by side
COLOURS = {"lit_clip": "#dbe9f6", "datamodules": "#e4f2dd", "callbacks": "#fbe8d3"}
STYLE = "font: 12px sans-serif; background: white"


class Box(NamedTuple):
    """A room: the left and upper edge and the width of its box in pixels, and its lines of code."""

    x: float
    y: float
    width: float
    lines: int


def floors() -> dict[str, list[list[str]]]:
    """Return each package's rooms, floor by floor from above, as the contracts of pyproject.toml have them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    found = {
        each["containers"][0]: [
            [f"{each['containers'][0]}.{room}" for room in layer.split(" : ")] for layer in each["layers"]
        ]
        for each in contracts
        if "containers" in each
    }
    return {**found, "callbacks": [["callbacks"]]}


def needs(rooms: set[str]) -> set[tuple[str, str]]:
    """Return which room imports which, without what follows from others."""
    graph: Any = grimp.build_graph(*PACKAGES, cache_dir=None)

    def room_of(module: str) -> str:
        return next((room for room in rooms if f"{module}.".startswith(f"{room}.")), "")

    imported = ((room_of(one), graph.find_modules_directly_imported_by(one)) for one in graph.modules)
    pairs = {(one, room_of(other)) for one, others in imported for other in others}
    direct = {(one, other) for one, other in pairs if one and other and one != other}
    below = {room: {other for one, other in direct if one == room} for room in rooms}
    for middle, room in product(sorted(rooms), sorted(rooms)):  # whoever needs the middle needs what it needs
        if middle in below[room]:
            below[room] |= below[middle]
    return {
        (one, other)
        for one, other in direct
        if not any(other in below[middle] for middle in below[one] if middle != other)
    }


def lines_of(room: str) -> int:
    """Return a room's lines of code; a room is a folder or a file."""
    path = ROOT.joinpath(*room.split("."))
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def boxes() -> dict[str, Box]:
    """Place the rooms: lit_clip on the left, and on the right, below callbacks, datamodules, which both import it."""
    layers = floors()
    lines = {room: lines_of(room) for each in layers.values() for layer in each for room in layer}
    left, right = layers["lit_clip"], [*layers["callbacks"], *layers["datamodules"]]
    placed: dict[str, Box] = {}
    for column, middle in ((left, 260.0), (right, 800.0)):
        rows = [layer[at : at + MOST] for layer in column for at in range(0, len(layer), MOST)]
        for floor, row in enumerate(rows):
            widths = [len(f"{shown(room)} {lines[room]:,}") * LETTER + 2 * MARGIN for room in row]
            x = middle - (sum(widths) + MARGIN * (len(row) - 1)) / 2
            for room, width in zip(row, widths, strict=True):
                placed[room] = Box(x, MARGIN + floor * FLOOR, width, lines[room])
                x += width + MARGIN
    return placed


def shown(room: str) -> str:
    """Return a room's name within its package."""
    return room.partition(".")[2] or room


def draw() -> str:
    """Return the picture as SVG."""
    placed = boxes()
    width = max(box.x + box.width for box in placed.values()) + MARGIN
    height = max(box.y for box in placed.values()) + HEIGHT + MARGIN
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" style="{STYLE}">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for one, other in sorted(needs(set(placed))):
        above, under = placed[one], placed[other]
        start = f"{above.x + above.width / 2:.0f},{above.y + HEIGHT}"
        end = f"{under.x + under.width / 2:.0f},{under.y}"
        dashes = "" if one.split(".")[0] == other.split(".")[0] else ' stroke-dasharray="5 4"'
        shapes.append(f'<path d="M{start} L{end}" stroke="#9aa3ad" fill="none"{dashes}/>')
    for room, box in placed.items():
        colour = COLOURS[room.partition(".")[0]]
        place = f'x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{HEIGHT}"'
        shapes.append(f'<rect {place} rx="5" fill="{colour}" stroke="#5b6670"/>')
        text = f'{shown(room)} <tspan fill="#5b6670">{box.lines:,}</tspan>'
        shapes.append(f'<text x="{box.x + MARGIN:.0f}" y="{box.y + 20:.0f}">{text}</text>')
    return "\n".join([*shapes, "</svg>\n"])


if __name__ == "__main__":
    Path(*sys.argv[1:] or [PICTURE]).write_text(draw(), encoding="utf-8")
