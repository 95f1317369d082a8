"""Share an image among its pairs in a batch."""

import torch

from lit_clip.batch import CaptionBatch
from lit_clip.tools.hardware import to_device


def images_once(batch: CaptionBatch) -> CaptionBatch:
    """Return an evaluation batch with each image once; pairs with equal keys have the same image."""
    row_of: dict[str, int] = {}
    image_of = [row_of.setdefault(key, len(row_of)) for key in batch.keys]
    if batch.image_of is not None or len(row_of) == len(image_of):
        return batch
    first = [image_of.index(row) for row in range(len(row_of))]
    images, own = (to_device(torch.tensor(rows), batch.images.device) for rows in (first, image_of))
    return batch._replace(images=batch.images[images], image_of=own)
