"""Encode more in a step, for a loss that reads more than the features of its pairs."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.errors import require
from lit_clip.models.clip import CLIP
from lit_clip.training.activation_checkpointing import FrozenStatistics, checkpoint


class EncodesAgain:
    """Part of a loss that encodes more than the step's pairs, or their images in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.model: tuple[CLIP] | None = None  # not a part: its parameters are the module's

    def prepare(self, model: CLIP) -> None:
        self.model = (model,)

    def require_trained_images(self, model: CLIP) -> None:
        """Raise :class:`InputError` if the image encoder is frozen."""
        trained = any(parameter.requires_grad for parameter in model.visual.parameters())
        frozen = f"model.loss: {type(self).__name__} trains the image encoder, which is frozen; leave one of them out"
        require(trained, frozen)

    def encode(self, encode: Callable[[CLIP, Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
        """Encode micro-batches; BatchNorm's statistics stay, because they already include these images."""
        assert self.model is not None, "call prepare first"
        (model,) = self.model
        norms = [layer for layer in model.visual.modules() if isinstance(layer, _BatchNorm)]
        run = encode if len(parts) == 1 else partial(checkpoint, encode, inside=model.visual)
        found = []
        for part in parts:
            torch.clear_autocast_cache()  # as for micro-batches
            with FrozenStatistics(norms):
                found.append(run(model, part))
        return torch.cat(found)
