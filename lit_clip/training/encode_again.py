"""Encode images again for a loss that reads more than the features of the step's pairs."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.models.clip import CLIP
from lit_clip.training.activation_checkpointing import FrozenStatistics, checkpoint


def encode_again(model: CLIP, encode: Callable[[CLIP, Tensor], Tensor], images: Sequence[Tensor]) -> Tensor:
    """Encode micro-batches of images; BatchNorm's statistics stay, because they already include these images."""
    norms = [layer for layer in model.visual.modules() if isinstance(layer, _BatchNorm)]
    run = encode if len(images) == 1 else partial(checkpoint, encode, inside=model.visual)
    found = []
    for part in images:
        torch.clear_autocast_cache()  # as for micro-batches
        with FrozenStatistics(norms):
            found.append(run(model, part))
    return torch.cat(found)
