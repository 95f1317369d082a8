"""Crop what an image shows of each text, with the pixels outside of its region in white.

    python locate.py last.ckpt photo.png "a tiger" "a pizza"

A region is only as fine as the encoder's places (32 pixels of the resized image for a ResNet, 16 for a ViT-B/16).
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import lit_clip
from lit_clip.locating import Locator
from lit_clip.locating.regions import resized_mask
from lit_clip.models.preprocess import to_rgb


def main(checkpoint: str, photo: str, *texts: str) -> None:
    image = to_rgb(Image.open(photo))
    located = Locator(lit_clip.load_model(checkpoint), texts)(image)
    for number, (text, region) in enumerate(zip(texts, located.regions, strict=True)):
        box = region.box(image.size)
        if box is None:
            print(f"{text}: not seen ({region.cosine:.3f}, texts of other things reach {located.level:.3f})")
            continue
        pixels = np.where(resized_mask(region.mask, image.size)[:, :, None], np.asarray(image), 255)
        name = f"{Path(photo).stem}_{number}.png"
        Image.fromarray(pixels.astype(np.uint8)).crop(box).save(name)
        print(f"{text}: {name}, box {box}, cosine {region.cosine:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
