"""Fine-tuning without forgetting: features of kept images and captions stay those of the model before.

Shapes: K kept pairs, B of them in a step on this rank, D embedding dimension.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import at_least_float32, unit
from lit_clip.losses.distillation import ModelFeatures, blockwise_distillation
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.models import preprocess as pp
from lit_clip.models.clip import CLIP
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.tools.class_paths import find_object
from lit_clip.training.activation_checkpointing import checkpoint
from lit_clip.training.micro_batches import encode_pairs

Kind = Literal["features", "similarities"]
BATCH = 64  # kept pairs that are encoded at once before training


class KeptPairs(NamedTuple):
    """A model, and the images (uint8, on the CPU) and texts that it shall encode as before.

    Not a module, so that the model's parameters are not the loss's.
    """

    model: CLIP
    images: Tensor
    tokens: Tensor

    def batch(self, rows: Tensor, device: torch.device) -> CaptionBatch:
        tokenizer, tokens = self.model.tokenizer, self.tokens[rows]
        lengths = tokenizer.lengths(tokens).tolist()
        batch = CaptionBatch(self.images[rows], tokenizer.trim(tokens), [], lengths=lengths)
        return (batch.pin_memory() if device.type == "cuda" else batch).to(device)


class Preservation(Loss):
    """Keep features of some images and captions as they were before training.

    In each step some rows of a table are encoded, without augmentation and in evaluation mode, and compared with the
    model before. That one encodes the table once, when training starts; its features are in checkpoints, so a resumed
    run has the same. Use it beside another loss, with :class:`lit_clip.losses.Sum`.

    Args:
        kept: images and captions unlike the training data: anything that ``data.train`` may be. They stay in memory.
        pairs: how many of them all ranks together encode in a step.
        kind: ``features``: squared distance of unit features; ``similarities``: cross-entropy of the probabilities
            among the step's kept images and captions.
    """

    image: Tensor  # unit features ``[K, D]`` of the model before
    text: Tensor
    scale: Tensor  # its inverse temperature

    def __init__(self, kept: str, pairs: int = 32, kind: Kind = "features") -> None:
        super().__init__()
        require(kind in get_args(Kind), f"model.loss: Preservation.kind {kind!r} must be 'features' or 'similarities'")
        require(pairs >= 1, f"model.loss: Preservation.pairs {pairs} must be at least 1")
        self.kept, self.pairs, self.kind = kept, pairs, kind
        self.steps = 0  # with another one each step draws other rows
        self.loaded: KeptPairs | None = None

    def prepare(self, model: CLIP) -> None:
        self.loaded = kept = _load(self.kept, model)
        features = []
        with torch.no_grad():
            for rows in torch.arange(len(kept.images)).split(BATCH):
                features.append(_encode(model, kept.batch(rows, model.device)))
            image, text = (torch.cat(parts) for parts in zip(*features, strict=True))
            for name, value in {"image": image, "text": text, "scale": model.logit_scale.exp()}.items():
                self.register_buffer(name, value.clone())

    def forward(self, pairs: Pairs) -> Tensor:
        assert self.loaded is not None, "call prepare first"
        rank, world = pairs.ranks.rank, pairs.ranks.world
        generator = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        drawn = torch.randperm(len(self.image), generator=generator)[: self.pairs]
        ranks = RankCounts(rank, tuple(len(drawn[each::world]) for each in range(world)))
        rows = drawn[rank::world]
        rows = torch.cat([rows, drawn[:1].expand(max(ranks.counts) - len(rows))])  # equally many, as in encode_step
        image, text = self._encoded(rows, len(pairs.parts), pairs.image.device)
        D, own = pairs.image.shape[1], slice(ranks.counts[rank])  # Matryoshka's have fewer channels
        rows = rows.to(image.device)
        cut = [unit(each[own, :D]) for each in (image, text, self.image[rows], self.text[rows])]
        if self.kind == "similarities":
            student, before = ModelFeatures(*cut[:2], pairs.scale), ModelFeatures(*cut[2:], self.scale)
            return blockwise_distillation(student, before, ranks)
        with torch.autocast(image.device.type, enabled=False):
            image, text, image_before, text_before = map(at_least_float32, cut)
            distances = (image - image_before).square().sum() + (text - text_before).square().sum()
            return distances / max(1, ranks.counts[rank]) * ranks.weight

    def _encoded(self, rows: Tensor, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return unit features ``[B, D]`` of rows in as many micro-batches as the step has."""
        assert self.loaded is not None
        features = []
        for part in rows.chunk(parts):
            torch.clear_autocast_cache()  # as for micro-batches
            batch = self.loaded.batch(part, device)
            if parts == 1:
                features.append(_encode(self.loaded.model, batch))
            else:
                features.append(checkpoint(_encode, self.loaded.model, batch, inside=self.loaded.model))
        image, text = zip(*features, strict=True)
        return torch.cat(image), torch.cat(text)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def _encode(model: CLIP, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
    with evaluation_mode(model):  # in here: checkpointing calls this again in the backward pass
        return encode_pairs(model, batch)


def _load(kept: str, model: CLIP) -> KeptPairs:
    """Open a table and read all its images; of several captions the first."""
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
