"""Fine-tune without forgetting: keep the features of chosen images and captions near the original model's.

Shapes: K kept pairs, B of them in a step on this rank, D embedding dimension.
"""

import torch
from torch import Tensor

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError, require
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.losses.weighted import feature_distance
from lit_clip.models import preprocess as pp
from lit_clip.models.clip import CLIP
from lit_clip.models.running import evaluation_mode
from lit_clip.tools.class_paths import find_object
from lit_clip.tools.hardware import to_device
from lit_clip.training.losses import EncodesAgain
from lit_clip.training.micro_batches import encode_pairs

BATCH = 64  # kept pairs that are encoded at once before training


class Preservation(EncodesAgain, Loss):
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

    def prepare(self, model: CLIP) -> None:
        super().prepare(model)
        self.images, self.tokens = load_kept(self.kept, model)
        self.steps = 0
        with torch.no_grad():
            rows = torch.arange(len(self.images)).split(BATCH)
            before = torch.cat([self._features(model, part) for part in rows])
        for name, features in zip(("image", "text"), before.chunk(2, dim=1), strict=True):
            self.register_buffer(name, features.clone())

    def forward(self, pairs: Pairs) -> Tensor:
        rank, world = pairs.ranks.rank, pairs.ranks.world
        generator = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        drawn = torch.randperm(len(self.image), generator=generator)[: self.pairs]
        ranks = RankCounts(rank, tuple(len(drawn[each::world]) for each in range(world)))
        rows = drawn[rank::world]
        rows = torch.cat([rows, drawn[:1].expand(max(ranks.counts) - len(rows))])  # equally many, as in encode_step
        mine = ranks.counts[rank]
        image, text = self.encode(self._features, rows.chunk(len(pairs.parts)))[:mine].chunk(2, dim=1)
        dim = pairs.image.shape[1]  # Matryoshka's have fewer channels
        rows = to_device(rows[:mine], self.image.device)
        return feature_distance((image[:, :dim], text[:, :dim]), (self.image[rows], self.text[rows]), ranks)

    def chance_loss(self, pairs: int) -> float | None:
        """Return None: a model without knowledge has no particular distance."""
        return None

    def _features(self, model: CLIP, rows: Tensor) -> Tensor:
        """Encode kept pairs -> unit features of images, then of texts, ``[b, 2 D]``."""
        tokens = self.tokens[rows]
        lengths = model.tokenizer.lengths(tokens).tolist()
        batch = CaptionBatch(self.images[rows], model.tokenizer.trim(tokens), [], lengths=lengths)
        batch = (batch.pin_memory() if model.device.type == "cuda" else batch).to(model.device)
        with evaluation_mode(model):  # in here: checkpointing calls this again in the backward pass
            return torch.cat(encode_pairs(model, batch), dim=1)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def load_kept(kept: str, model: CLIP) -> tuple[Tensor, Tensor]:
    """Read all images of a table, uint8 on the CPU, and their tokens; of several captions, take the first."""
    try:
        source = find_object("datamodules.open_source.open_source")(kept)
        source.prepare()
        require(len(source) > 0, f"{kept}: no pairs")
        found = [source.load(row, None) for row in range(len(source))]
    except InputError as error:
        raise InputError(f"model.loss: Preservation.kept: {error}") from error
    pixels = pp.pixels(model.preprocessing)
    return torch.stack([pixels(pair.image) for pair in found]), model.tokenize([pair.caption for pair in found])
