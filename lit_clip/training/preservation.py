"""Fine-tune without forgetting: keep the features of chosen images and captions near the original model's.

Shapes: K kept pairs, B of them in a step on this rank, D embedding dimension.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError, require
from lit_clip.losses.distillation import feature_distance
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.models import preprocess as pp
from lit_clip.models.clip import CLIP
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.tools.class_paths import find_object
from lit_clip.training.activation_checkpointing import checkpoint
from lit_clip.training.micro_batches import encode_pairs

BATCH = 64  # kept pairs that are encoded at once before training


class KeptPairs(NamedTuple):
    """A model, and images (uint8, on the CPU) and texts with features to preserve.

    Not a module, so that the model's parameters are not the loss's.
    """

    model: CLIP
    images: Tensor
    tokens: Tensor

    def batch(self, rows: Tensor, device: torch.device) -> CaptionBatch:
        tokenizer, tokens = self.model.tokenizer, self.tokens[rows]
        lengths = tokenizer.lengths(tokens).tolist()
        batch = CaptionBatch(self.images[rows], tokenizer.trim(tokens), [], lengths=lengths, extra={"row": rows})
        return (batch.pin_memory() if device.type == "cuda" else batch).to(device)


class Preservation(Loss):
    """Squared distance between unit features of kept images and captions, now and before training.

    Each step encodes some rows of a table, without augmentation and in evaluation mode. The model before encodes the
    table once, when training starts; its features are in checkpoints, so a resumed run compares with the same ones.
    Use it beside another loss, with :class:`lit_clip.losses.Sum`.

    Args:
        kept: images and captions unlike those to be learned: a path that ``data.train`` may be. They stay in memory.
        pairs: how many of them all ranks together encode in a step.
    """

    image: Tensor  # unit features ``[K, D]`` of the model before
    text: Tensor

    def __init__(self, kept: str, pairs: int = 32) -> None:
        super().__init__()
        require(pairs >= 1, f"model.loss: Preservation.pairs {pairs} must be at least 1")
        self.kept, self.pairs = kept, pairs
        self.steps = 0  # with another one each step draws other rows
        self.loaded: KeptPairs | None = None

    def prepare(self, model: CLIP) -> None:
        self.loaded, self.steps = (kept := _load(self.kept, model)), 0
        features = []
        with torch.no_grad():
            for rows in torch.arange(len(kept.images)).split(BATCH):
                features.append(_encode(model, kept.batch(rows, model.device)))
        for name, parts in zip(("image", "text"), zip(*features, strict=True), strict=True):
            self.register_buffer(name, torch.cat(parts))

    def forward(self, pairs: Pairs) -> Tensor:
        assert self.loaded is not None, "call prepare first"
        rank, world = pairs.ranks.rank, pairs.ranks.world
        generator = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        drawn = torch.randperm(len(self.image), generator=generator)[: self.pairs]
        ranks = RankCounts(rank, tuple(len(drawn[each::world]) for each in range(world)))
        rows = drawn[rank::world]
        rows = torch.cat([rows, drawn[:1].expand(max(ranks.counts) - len(rows))])  # equally many, as in encode_step
        image, text, rows = (x[: ranks.counts[rank]] for x in self._encoded(rows, len(pairs.parts), pairs.image.device))
        dim = pairs.image.shape[1]  # Matryoshka's have fewer channels
        return feature_distance((image[:, :dim], text[:, :dim]), (self.image[rows], self.text[rows]), ranks)

    def chance_loss(self, pairs: int) -> float | None:
        """Return None: a model without knowledge has no particular distance."""
        return None

    def _encoded(self, rows: Tensor, parts: int, device: torch.device) -> Iterator[Tensor]:
        """Yield unit features ``[B, D]`` of images and texts, in as many micro-batches as the step; and their rows."""
        assert self.loaded is not None
        found = []
        for part in rows.chunk(parts):
            torch.clear_autocast_cache()  # as for micro-batches
            batch = self.loaded.batch(part, device)
            encode = _encode if parts == 1 else partial(checkpoint, _encode, inside=self.loaded.model)
            found.append((*encode(self.loaded.model, batch), batch.extra["row"]))
        return map(torch.cat, zip(*found, strict=True))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def _encode(model: CLIP, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
    with evaluation_mode(model):  # in here: checkpointing calls this again in the backward pass
        return encode_pairs(model, batch)


def _load(kept: str, model: CLIP) -> KeptPairs:
    """Open a table and read all its images; of several captions, take the first."""
    try:
        source = find_object("datamodules.open_source.open_source")(kept)
        source.prepare()
        require(len(source) > 0, f"{kept}: no pairs")
        found = [source.load(row, None) for row in range(len(source))]
    except InputError as error:
        raise InputError(f"model.loss: Preservation.kept: {error}") from error
    pixels = pp.pixels(model.preprocessing)
    return KeptPairs(
        model, torch.stack([pixels(pair.image) for pair in found]), model.tokenize([pair.caption for pair in found])
    )
