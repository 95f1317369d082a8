"""What a model's context length does to captions."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from datamodules.pairs.source import PairSource
from lit_clip.errors import BadSample, InputError
from lit_clip.models.tokenizer import TextTokenizer

LongCaptions = Literal["truncate", "error"]
SAMPLED = 2000  # captions cost some 50 microseconds each


class CaptionStatistics(NamedTuple):
    """How long captions are for a tokenizer.

    Attributes:
        captions: number looked at.
        truncated: share of them that are cut, from 0 to 1.
        tokens_lost: mean number of tokens that those lose; 0 if none is cut.
        longest: tokens of the longest, start and end included.
    """

    captions: int
    truncated: float
    tokens_lost: float
    longest: int


def caption_statistics(source: PairSource, tokenizer: TextTokenizer, sample: int | None = SAMPLED) -> CaptionStatistics:
    """Lengths of a source's captions; what cannot be read is passed over.

    Args:
        source: of the captions; sources that have them apart from the images read no image.
        tokenizer: the model's.
        sample: look at all captions of so many rows, evenly spread; None: of all rows.
    """
    step = 1 if sample is None else max(1, -(-len(source) // sample))
    counts = []
    for index in range(0, len(source), step):
        try:
            captions = source.captions(index)
        except BadSample:
            continue
        counts += [tokenizer.count(caption) for caption in captions]
    lost = [count - tokenizer.context_length for count in counts if count > tokenizer.context_length]
    share, mean = len(lost) / max(1, len(counts)), sum(lost) / max(1, len(lost))
    return CaptionStatistics(len(counts), share, mean, max(counts, default=0))


def refuse_long(captions: Sequence[str], keys: Sequence[str], tokenizer: TextTokenizer) -> None:
    """Raise :class:`InputError` for the first caption that the tokenizer would cut, naming its image."""
    for caption, key in zip(captions, keys, strict=True):
        count = tokenizer.count(caption)
        if count > tokenizer.context_length:
            raise InputError(
                f"{key}: its caption has {count} tokens, the model reads {tokenizer.context_length}; shorten it, "
                f"or set long_captions to truncate: {caption[:60]!r}"
            )
