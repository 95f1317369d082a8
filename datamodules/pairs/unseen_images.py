"""Report before training which content of the image files a model does not see as it is."""

import io
import random
import time
from collections import Counter
from contextlib import suppress

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.distributed import rank_and_world
from lit_clip.errors import InputError
from lit_clip.tools.images import Unseen, open_image, unseen
from .source import PairSource

LOOKED_AT = 150  # images of each source
SECONDS = 2.0  # after which no other image is read, as of a slow store
DECODED = 4  # deep images whose levels are looked at
DARK = 64  # a deep image that has no level above is dark: it leaves at least 2 of its bits unused


def report_images(train: PairSource, val: PairSource, seed: int) -> None:
    """Print on the first rank how many of some training and validation images have what a model does not see.

    Pixels of a few deep images are read too: those of 12 bits in a file of 16 would otherwise be black without a word.
    """
    if rank_and_world()[0]:
        return
    # Of training the first that it reads, as spread ones would fetch every shard.
    rows = [(train, row) for row in train.order(0, seed)[:LOOKED_AT].tolist()]
    rows += [(val, row) for row in range(0, len(val), -(-len(val) // LOOKED_AT) or 1)]
    random.Random(0).shuffle(rows)  # both are looked at in the time
    end = time.monotonic() + SECONDS
    counts, levels, looked_at = Counter[Unseen](), list[int](), 0
    for source, row in rows:
        with suppress(InputError):  # its images are no files, it is a bad sample, or a store does not answer
            content = source.read(row).image
            lost = unseen(io.BytesIO(content), "")
            if Unseen.DEEP in lost and len(levels) < DECODED:
                levels.append(int(np.asarray(open_image(io.BytesIO(content))).max()))
            counts.update(lost)
            looked_at += 1
        if time.monotonic() > end:
            break
    found = [f"{counts[kind]} {kind}" for kind in Unseen if counts[kind]]
    if levels and max(levels) < DARK:
        found.append(
            f"the deep ones are dark: no level of {len(levels)} is above {max(levels)} of 255, so scale their values "
            "to the whole range of the file's bits"
        )
    if found:
        rank_zero_info(f"images: of {looked_at:,} looked at (of {len(train) + len(val):,} pairs), {', '.join(found)}")
