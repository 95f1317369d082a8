"""Draw where a model sees texts in photographs that lie beside each other, for docs/locating.md.

    python docs/images/draw_locating.py best.ckpt locating "a dress" "a hat" "a pizza" --images dress.jpg hat.jpg

Nothing is posed: overlays are those of `lit-clip locate`. The photographs of the page are of the clothing data set
(CC0), the first of each class's folder in its validation part.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import lit_clip
from lit_clip.locating import Locator
from lit_clip.locating.overlay import Scale, overlay, shown_size

HERE = Path(__file__).parent
HEIGHT, COLUMNS, TITLE = 256, 3, 24  # of the photographs; panels in a row; height of a panel's title


def main() -> None:
    """Draw one sheet."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("model")
    arguments.add_argument("name")
    arguments.add_argument("texts", nargs="+")
    arguments.add_argument("--images", nargs="+", type=Path, required=True)
    options = arguments.parse_args()
    photos = [Image.open(path).convert("RGB") for path in options.images]
    photos = [photo.resize((round(photo.width * HEIGHT / photo.height), HEIGHT)) for photo in photos]
    whole = Image.new("RGB", (sum(photo.width for photo in photos), HEIGHT))
    for place, photo in enumerate(photos):
        whole.paste(photo, (sum(each.width for each in photos[:place]), 0))
    located = Locator(lit_clip.load_model(options.model), options.texts)(whole)
    scale = Scale.around(located.level, max(region.cosine for region in located.regions))
    panels = [("the image", whole)]
    for text, cosines, region in zip(options.texts, located.maps, located.regions, strict=True):
        title = text if region.seen else f"{text}: not seen"
        panels.append((title, overlay(whole, cosines, scale, region.cosine, region.box(whole.size))))
    width, height = panels[1][1].width, panels[1][1].height + TITLE
    columns = min(COLUMNS, len(panels))
    sheet = Image.new("RGB", (columns * (width + 8) - 8, -(-len(panels) // columns) * height), "white")
    for place, (title, panel) in enumerate(panels):
        x, y = place % columns * (width + 8), place // columns * height
        shown = panel if place else panel.resize(shown_size(panel.size))
        sheet.paste(shown, (x + (width - shown.width) // 2, y + TITLE))
        ImageDraw.Draw(sheet).text((x + 4, y + 4), title, "black", ImageFont.load_default(15))
    sheet.save(HERE / f"{options.name}.webp", quality=70, method=6)


if __name__ == "__main__":
    main()
