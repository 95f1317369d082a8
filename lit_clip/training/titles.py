"""A loss that uses the mixture of an image and its title instead of the image."""

import math
from dataclasses import replace

import torch
from torch import nn

from lit_clip.errors import require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, LossValue, Pairs, evaluate_loss
from lit_clip.models.clip import CLIP
from lit_clip.training.encode_again import EncodesAgain

NAME = "title"  # of the int64 tokens in CaptionBatch.extra
SPEED = 10  # Adam's steps have the size of the learning rate, which suits weights of layers: a logit needs larger ones


class WithTitle(EncodesAgain, Loss):
    """Apply a loss with an image and its title as one vector, and captions as queries (``data.columns.title``).

    The vector is the sum of ``1 - w`` times the image's unit features and ``w`` times the title's, scaled to unit
    length, as ``lit-clip embed --fields image,caption --text_weight w`` writes it. ``w`` is learned, and logged as
    ``train/text_weight``. Duplicates are as in the inner loss. Titles are encoded in addition to the captions.

    Args:
        loss: the inner loss.
        text_weight: ``w`` at the start, above 0 and below 1.
    """

    reads = (NAME,)

    def __init__(self, loss: Loss, text_weight: float = 0.5) -> None:
        super().__init__()
        within = 0 < text_weight < 1
        require(within, f"model.loss: WithTitle.text_weight {text_weight} must be above 0 and below 1")
        self.loss, self.text_weight = loss, text_weight
        self.logit = nn.Parameter(torch.tensor(math.log(text_weight / (1 - text_weight)) / SPEED))

    @property
    def uses_negatives(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # the inner loss's
        return self.loss.uses_negatives

    def prepare(self, model: CLIP) -> None:
        self.loss.prepare(model)
        super().prepare(model)

    def forward(self, pairs: Pairs) -> LossValue:
        B, D = pairs.image.shape  # Matryoshka's have fewer channels
        there = not B or NAME in pairs.batch.extra
        require(there, "model.loss: WithTitle: the data have no titles; set data.columns.title")
        tokens = [part.extra.get(NAME, part.tokens) for part in pairs.parts]  # a placeholder has none
        title_BD = unit(self.encode(CLIP.encode_text, tokens)[:B, :D])
        weight = torch.sigmoid(SPEED * self.logit)
        mixed_BD = unit(torch.lerp(pairs.image, title_BD, weight))
        value = evaluate_loss(self.loss, replace(pairs, image=mixed_BD))
        return value._replace(metrics={**value.metrics, "text_weight": weight.detach()})

    def chance_loss(self, pairs: int) -> float | None:
        return self.loss.chance_loss(pairs)
