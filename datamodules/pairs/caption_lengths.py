"""Caption lengths in tokens against the model's context length."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.pairs.sentences import sentences
from datamodules.pairs.source import PairSource, Rows
from lit_clip.distributed import rank_and_world
from lit_clip.errors import BadSample, InputError
from lit_clip.models.tokenizer import TextTokenizer

LongCaptions = Literal["truncate", "sentences", "error"]
MOST_OF_A_ROW = 100  # captions that are measured
FEW_REPEATED = 0.1
SAMPLED = 2000  # captions take about 50 microseconds each


class CaptionStatistics(NamedTuple):
    """Lengths of captions in a tokenizer's tokens.

    Attributes:
        truncated: share of them that is truncated, from 0 to 1.
        tokens_lost: mean number of tokens that the truncated ones lose; 0 if there are none.
        longest: tokens of the longest, start and end included.
        endless: share of the captions that are truncated although they are cut into sentences: no sentence fits.
        repeated: share of the captions that occur more than once.
    """

    captions: int
    truncated: float
    tokens_lost: float
    longest: int
    endless: float
    repeated: float


def caption_statistics(source: PairSource, tokenizer: TextTokenizer, sample: int | None = SAMPLED) -> CaptionStatistics:
    """Measure the captions of about ``sample`` evenly spread rows (None: of all); unreadable ones are skipped."""
    step = 1 if sample is None else max(1, -(-len(source) // sample))
    counts, endless, context = [], 0, tokenizer.context_length
    times: Counter[int] = Counter()
    for index in range(0, len(source), step):
        try:
            captions = source.captions(index)
        except BadSample:
            continue
        for caption in captions[:MOST_OF_A_ROW]:
            times[hash(caption)] += 1
            counts.append(tokenizer.count(caption))
            endless += counts[-1] > context and all(tokenizer.count(part) > context for part in sentences(caption))
    lost = [count - context for count in counts if count > context]
    number, mean = max(1, len(counts)), sum(lost) / max(1, len(lost))
    repeated = sum(count for count in times.values() if count > 1) / number
    return CaptionStatistics(len(counts), len(lost) / number, mean, max(counts, default=0), endless / number, repeated)


def report_captions(source: PairSource, tokenizer: TextTokenizer, policy: LongCaptions, loss: object = None) -> None:
    """Print on the first rank what becomes of captions that exceed the context, and whether many are equal.

    A loss without an option ``duplicates``, or with it set, knows what to do with equal captions.
    """
    if rank_and_world()[0]:
        return
    first = np.arange(min(len(source), SAMPLED))  # not spread: that would fetch every shard of a store
    found, context = caption_statistics(Rows(source, first), tokenizer), tokenizer.context_length
    if found.repeated > FEW_REPEATED and (loss is None or getattr(loss, "duplicates", "") == "negatives"):
        kind = "Contrastive" if loss is None else type(loss).__name__
        rank_zero_info(
            f"captions: {found.repeated:.0%} of the first {found.captions} occur more than once, and by default count "
            f"as wrong for each other's images; often better as right: --model.loss {kind} --model.loss.duplicates "
            f'positives (in Python loss={kind}(duplicates="positives"))'
        )
    if found.truncated:
        what = f"captions: {found.truncated:.1%} of the first {found.captions}"
        rank_zero_info(
            f"{what} exceed {context} tokens and are read by sentences that fit; {found.endless:.1%} are truncated, as "
            "not one sentence fits (model.context_length)"
            if policy == "sentences"
            else f"{what} are truncated to {context} tokens and lose {found.tokens_lost:.1f} on average "
            "(to read more: model.context_length, or data.long_captions: sentences)"
        )


def refuse_long(captions: Sequence[str], keys: Sequence[str], tokenizer: TextTokenizer) -> None:
    """Raise :class:`InputError` for the first caption that the tokenizer would truncate, naming its image."""
    for caption, key in zip(captions, keys, strict=True):
        count = tokenizer.count(caption)
        if count > tokenizer.context_length:
            raise InputError(
                f"{key}: its caption has {count} tokens, the model reads {tokenizer.context_length}; shorten it, "
                f"or set long_captions to sentences or truncate: {caption[:60]!r}"
            )
