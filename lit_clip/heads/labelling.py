"""Choose which images to label next: uncertain, and unlike each other and the examples."""

import torch
from torch import Tensor


def label_next(probability_NC: Tensor, unit_ND: Tensor, labelled_MD: Tensor, count: int, several: bool) -> list[int]:
    """Return up to ``count`` images, the most useful first.

    One after the other, it is the image of the highest uncertainty times distance to the nearest image that is labelled
    or chosen (greedy k-centre). The uncertainty is 1 less the margin between the two best classes, or with ``several``
    classes an image the highest of 1 - |2 p - 1|; the distance is 1 less the cosine.
    """
    if several:
        uncertainty = (1 - (2 * probability_NC - 1).abs()).amax(dim=1)
    else:
        best = probability_NC.topk(2, dim=1).values
        uncertainty = 1 - (best[:, 0] - best[:, 1])
    nearest = (unit_ND @ labelled_MD.T).amax(dim=1)
    chosen: list[int] = []
    for _ in range(min(count, len(unit_ND))):
        score = uncertainty * (1 - nearest)
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
        nearest = torch.maximum(nearest, unit_ND @ unit_ND[chosen[-1]])
    return chosen
