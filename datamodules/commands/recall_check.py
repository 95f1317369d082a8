"""Recall on pairs with features as they are and with smaller stored ones."""

from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from datamodules.open_source import open_source
from datamodules.pairs.encoder_rows import SourcePairs
from lit_clip.embedding.compact import Int8Scale, truncated
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.embedding.precision import autocast
from lit_clip.embedding.reading import encoded_batches, image_features, in_batches
from lit_clip.errors import InputError, require
from lit_clip.evaluation.caption_texts import caption_texts
from lit_clip.models.clip import CLIP
from lit_clip.retrieval.metrics import PairIndices
from lit_clip.retrieval.retrieval_set import evaluate_pairs
from lit_clip.tools.console import Console

SHOWN = [
    (f"{direction}_recall@{k}", f"{direction.replace('_', ' ')}, recall@{k}")
    for direction in ("image_to_text", "text_to_image")
    for k in (1, 5, 10)
]


class RecallCheck(NamedTuple):
    """The distinct images and captions of some pairs.

    Attributes:
        images: one row for each.
        texts: distinct captions.
        pairs: of the images and the texts.
    """

    images: SourcePairs
    texts: list[str]
    pairs: PairIndices

    @classmethod
    def open(cls, data: str) -> "RecallCheck":
        """Open whatever training takes."""
        source = open_source(data, default_split="validation", option_prefix="--check ")
        source.prepare()
        first: dict[str, int] = {}
        captions: dict[str, list[str]] = {}
        for row in range(len(source)):
            key = source.key(row)
            first.setdefault(key, row)
            captions.setdefault(key, []).extend(source.captions(row))
        prompts, pairs = caption_texts(_Captions(list(captions.values())), range(len(first)), None)
        enough = len(first) > 1 and len(prompts.names) > 1
        require(enough, f"--check {data}: recall needs at least two images and two captions")
        return cls(SourcePairs(source, list(first.values())), prompts.names, pairs)

    def report(
        self, model: CLIP, settings: EncodingSettings, images: bool, width: int, scale: Int8Scale | None
    ) -> None:
        """Print recall with the model's features and with what a file stores of them.

        Args:
            model: the encoders.
            settings: how to compute.
            images: whether the file stores images; otherwise texts. The others are queries, which are only truncated.
            width: dimensions that the file stores.
            scale: of its int8 numbers; None: float32.
        """
        image_ID, text_TD = self._encoded(model, settings)

        def smaller(features: Tensor, stored: bool) -> Tensor:
            kept = truncated(features.numpy(), width)
            return torch.from_numpy(scale.decode(scale.encode(kept)) if stored and scale is not None else kept)

        before = evaluate_pairs(image_ID, text_TD, self.pairs).metrics
        after = evaluate_pairs(smaller(image_ID, images), smaller(text_TD, not images), self.pairs).metrics
        table = Table(title=f"{len(self.images):,} images, {len(self.texts):,} captions")
        for column in ("%", "whole", "as stored", "difference"):
            table.add_column(column, justify="left" if column == "%" else "right")
        for name, shown in SHOWN:
            old, new = 100 * before[name], 100 * after[name]
            table.add_row(shown, f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f}")
        Console().print(table)

    @torch.no_grad()
    def _encoded(self, model: CLIP, settings: EncodingSettings) -> tuple[Tensor, Tensor]:
        """Return the unit features of the images ``[I, D]`` and of the texts ``[T, D]``, float32 on the CPU."""
        images, size, precision = [], settings.batch_size, settings.precision
        encode = image_features(model, precision)
        for batch, features in encoded_batches(
            model, self.images, size, settings.num_workers, encode=encode, title="check"
        ):
            for bad in batch.unreadable:
                raise InputError(bad.message)
            images.append(features.cpu())
        texts = []
        for rows in in_batches(range(len(self.texts)), size):
            tokens = model.tokenizer.trim(model.tokenize([self.texts[row] for row in rows]))
            with autocast(model.device, precision):
                texts.append(model.encode_text(tokens.to(model.device), normalize=True).float().cpu())
        return torch.cat(images), torch.cat(texts)


class _Captions:
    """Captions by image, as an evaluation set has them."""

    def __init__(self, of_image: list[list[str]]) -> None:
        self.of_image = of_image

    def captions(self, index: int) -> list[str]:
        return self.of_image[index]
