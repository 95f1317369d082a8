"""Pairs of a source as training samples, as batches, and as rows for encoders."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lit_clip.batch import CaptionBatch
from lit_clip.errors import BadSample, require
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.images import decoding_at_least
from ..loading.augmentation import TrainingTransform, seeded
from ..loading.sampling import TrainingSample, sample_seed
from .source import Pair, PairSource

if TYPE_CHECKING:
    from lit_clip.training.frozen_features import StoredImages, StoredTexts


class TrainingPairs(Dataset[Pair]):
    """Augmented pairs. All randomness comes from (seed, epoch, row, draw), so workers and ranks do not matter."""

    def __init__(self, source: PairSource, transform: TrainingTransform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: TrainingSample) -> Pair:
        seed, transform = sample_seed(self.seed, sample), self.transform.at(sample.budget)
        with seeded(seed):
            with decoding_at_least(transform.decode_size):
                pair = self.source.load(sample.row, random.Random(seed))
            more = [transform(image) for image in pair.more_images]
            augmented = pair._replace(image=transform(pair.image), more_images=more)
            images = {name: transform(each) for name, each in pair.extra.items() if isinstance(each, Image.Image)}
            return augmented._replace(extra={**pair.extra, **images}) if images else augmented


class ValidationPairs(Dataset[Pair]):
    """Pairs with the evaluation transform and the first caption."""

    def __init__(self, source: PairSource, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        pair = self.source.load(index, None)
        return pair._replace(image=self.transform(pair.image))


class Collate:
    """Join samples into a batch without the skipped ones; the batch may be empty."""

    def __init__(
        self,
        tokenize: TextTokenizer,
        shape: tuple[int, ...],
        images: "StoredImages | None" = None,
        texts: "StoredTexts | None" = None,
    ) -> None:
        self.tokenize, self.texts = tokenize, texts
        self.nothing = torch.zeros(0, *shape, dtype=torch.uint8)
        if images and images.stored:
            self.nothing = torch.zeros(0, *images.stored.shape, dtype=images.stored.dtype)

    def __call__(self, samples: list[Pair | BadSample]) -> CaptionBatch:
        items = [sample for sample in samples if not isinstance(sample, BadSample)]
        skipped = [(sample.where, sample.reason) for sample in samples if isinstance(sample, BadSample)]
        if not items:
            stored = self.texts and self.texts.nothing
            tokens = torch.zeros(0, 1, dtype=torch.long)
            return CaptionBatch(self.nothing, tokens, [], skipped=skipped, stored_texts=stored)
        texts = [(place, text) for place, item in enumerate(items) for text in (item, *(item.more or ()))]
        captions = [text.caption for _, text in texts]
        images = torch.stack([image for item in items for image in (item.image, *item.more_images)])
        keys = [items[place].key for place, _ in texts]
        groups = [text.group for _, text in texts] if any(text.group for _, text in texts) else ()
        tokens, lengths = self._tokenized(captions)
        stored = self.texts and self.texts.of(tokens, lengths)
        extra = self._joined([text.extra for _, text in texts], keys)
        batch = CaptionBatch(images, tokens, keys, captions, groups, skipped, lengths, stored_texts=stored, extra=extra)
        if items[0].more is not None:
            batch = batch._replace(image_of=torch.tensor([place for place, _ in texts]))
        if len(images) > len(items):
            rows = torch.arange(len(images)).split([1 + len(item.more_images) for item in items])
            batch = batch._replace(image_of=pad_sequence(list(rows), batch_first=True, padding_value=-1))
        negatives = [text.negative for _, text in texts]
        if not any(negatives):
            return batch
        negative_tokens, lengths = self._tokenized([text for text in negatives if text])
        return batch._replace(negatives=negatives, negative_tokens=negative_tokens, negative_lengths=lengths)

    def _tokenized(self, texts: list[str]) -> tuple[Tensor, list[int]]:
        """Return int64 ``[N, L]``, where L is the longest text's length, and each text's number of tokens."""
        tokens = self.tokenize(texts)  # [N, context length]
        lengths = self.tokenize.lengths(tokens).tolist()
        return tokens[:, : max(lengths)], lengths

    def _joined(self, extras: list[Mapping[str, Any]], keys: list[str]) -> dict[str, Tensor]:
        """Stack the extra values of samples, which need equal names and shapes; tokenize texts."""
        names = [name for name, value in extras[0].items() if isinstance(value, str)]
        tokens = {name: self._tokenized([extra[name] for extra in extras])[0] for name in names}
        tensors = [{name: value for name, value in extra.items() if name not in names} for extra in extras]
        kinds = [{name: (value.shape, value.dtype) for name, value in extra.items()} for extra in tensors]
        for kind, key in zip(kinds, keys, strict=True):
            require(kind == kinds[0], f"{key}: extra has {_told(kind)}, and that of {keys[0]} {_told(kinds[0])}")
        return tokens | {name: torch.stack([extra[name] for extra in tensors]) for name in tensors[0]}


def _told(kind: Mapping[str, tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in kind.items()) or "nothing"


class SourcePairs:
    """Rows of a source, by default all, as :class:`lit_clip.embedding.reading.ImageRows`."""

    def __init__(self, source: PairSource, rows: Sequence[int] | None = None) -> None:
        self.source, self.rows = source, range(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def key_and_images(self, row: int) -> tuple[str, list[Image.Image]]:
        pair = self.source.load(self.rows[row], None)
        return pair.key, [pair.image]

    def captions(self, row: int) -> list[str]:
        return list(dict.fromkeys(self.source.captions(self.rows[row])))
