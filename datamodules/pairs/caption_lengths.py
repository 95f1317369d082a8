"""Caption lengths in tokens against the model's context length."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.pairs.source import PairSource, Rows
from lit_clip.distributed import rank_and_world
from lit_clip.errors import BadSample, InputError
from lit_clip.models.tokenizer import TextTokenizer

LongCaptions = Literal["truncate", "error"]
MOST_OF_A_ROW = 100  # captions that are measured
SAMPLED = 2000  # captions take about 50 microseconds each


class CaptionStatistics(NamedTuple):
    """Lengths of captions in a tokenizer's tokens.

    Attributes:
        captions: number measured.
        truncated: share of them that is truncated, from 0 to 1.
        tokens_lost: mean number of tokens that the truncated ones lose; 0 if there are none.
        longest: tokens of the longest, start and end included.
    """

    captions: int
    truncated: float
    tokens_lost: float
    longest: int


def caption_statistics(source: PairSource, tokenizer: TextTokenizer, sample: int | None = SAMPLED) -> CaptionStatistics:
    """Measure a source's captions; unreadable ones are skipped.

    Args:
        source: of the captions; its images are not read where it can read captions alone.
        tokenizer: the model's.
        sample: number of evenly spread rows to measure, about; None: all.
    """
    step = 1 if sample is None else max(1, -(-len(source) // sample))
    counts = []
    for index in range(0, len(source), step):
        try:
            captions = source.captions(index)
        except BadSample:
            continue
        counts += [tokenizer.count(caption) for caption in captions[:MOST_OF_A_ROW]]
    lost = [count - tokenizer.context_length for count in counts if count > tokenizer.context_length]
    share, mean = len(lost) / max(1, len(counts)), sum(lost) / max(1, len(lost))
    return CaptionStatistics(len(counts), share, mean, max(counts, default=0))


def refuse_long(captions: Sequence[str], keys: Sequence[str], tokenizer: TextTokenizer) -> None:
    """Raise :class:`InputError` for the first caption that the tokenizer would truncate, naming its image."""
    for caption, key in zip(captions, keys, strict=True):
        count = tokenizer.count(caption)
        if count > tokenizer.context_length:
            raise InputError(
                f"{key}: its caption has {count} tokens, the model reads {tokenizer.context_length}; shorten it, "
                f"or set long_captions to truncate: {caption[:60]!r}"
            )


def report_truncation(source: PairSource, tokenize: TextTokenizer) -> None:
    """Print on the first rank how many of a source's captions are truncated, if any are."""
    if rank_and_world()[0]:
        return
    first = np.arange(min(len(source), SAMPLED))  # not spread: that would fetch every shard of a store
    found = caption_statistics(Rows(source, first), tokenize)
    if found.truncated:
        rank_zero_info(
            f"captions: {found.truncated:.1%} of the first {found.captions} are truncated to {tokenize.context_length} "
            f"tokens and lose {found.tokens_lost:.1f} on average (model.context_length, data.long_captions)"
        )
