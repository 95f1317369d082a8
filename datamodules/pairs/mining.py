"""Hard negative captions: a model finds them similar to an image although they belong to another image.

The options mean what they do in sentence-transformers' ``mine_hard_negatives``, whose names are in brackets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lit_clip.embedding.index import CHUNK, nearest_in
from lit_clip.errors import require
from lit_clip.tools.hardware import best_device

IMAGES = 256  # that are compared with all captions at once


@dataclass(frozen=True)
class MiningWindow:
    """Range of an image's nearest captions that are its hard negatives.

    Args:
        num_negatives: of an image, at most; training draws one of them in each epoch.
        skip: leave out this many of the most similar captions, which may fit the image [range_min].
        among: look at this many of the most similar captions, without its own ones [range_max].
        margin: leave out captions that are not less similar than the image's own by that much; of several own ones the
            least similar counts. 0 is a good start [absolute_margin].
        most_similar: leave out captions with a higher cosine similarity [max_score].
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    num_negatives: int = 3
    skip: int = 0
    among: int = 100
    margin: float | None = None
    most_similar: float | None = None

    def __post_init__(self) -> None:
        require(self.num_negatives >= 1, f"--num_negatives {self.num_negatives}: must be at least 1")
        require(self.skip >= 0, f"--skip {self.skip}: must be at least 0")
        fits = self.among >= self.skip + self.num_negatives
        require(fits, f"--among {self.among}: must be at least --skip and --num_negatives together")
        require(self.margin is None or self.margin >= 0, f"--margin {self.margin}: must be at least 0")


def hard_negatives(
    images: np.ndarray, texts: np.ndarray, own: Sequence[set[int]], other: Sequence[set[int]], window: MiningWindow
) -> Iterator[list[tuple[int, float]]]:
    """Yield each image's hard negatives, most similar first: numbers of texts, and cosine similarities.

    Args:
        images: unit features ``[N, D]``.
        texts: unit features ``[M, D]``, of distinct captions.
        own: numbers of each image's captions.
        other: numbers of the captions that may be true of each image besides.
        window: which of the others are negatives.
    """
    device = best_device()
    every = torch.from_numpy(texts).to(device)
    for start in range(0, len(images), IMAGES):
        block = torch.from_numpy(images[start : start + IMAGES]).to(device)
        most = window.among + max(len(own[image] | other[image]) for image in range(start, start + len(block)))
        scores, numbers = (found.cpu().numpy() for found in nearest_in(every.split(CHUNK), block, most))
        for place, image in enumerate(range(start, start + len(block))):
            negative = ~np.isin(numbers[place], list(own[image] | other[image]))
            cosines, candidates = scores[place][negative][: window.among], numbers[place][negative][: window.among]
            highest = np.inf if window.most_similar is None else window.most_similar
            if window.margin is not None:
                highest = min(highest, float((texts[list(own[image])] @ images[image]).min()) - window.margin)
            left = np.flatnonzero(cosines <= highest)[window.skip :][: window.num_negatives]
            yield list(zip(candidates[left].tolist(), cosines[left].tolist(), strict=True))
