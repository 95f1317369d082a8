"""Reports before training: captions longer than the context, and parts of images that a model does not see."""

import io
import random
import time
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.distributed import rank_and_world
from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import Preprocessing
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.images import Unseen, open_image, unseen
from .sentences import sentences
from .source import LongCaptions, PairSource

MOST_OF_A_ROW = 100  # captions that are measured
FEW_REPEATED = 0.1
SAMPLED = 2000  # captions take about 50 microseconds each


class CaptionStatistics(NamedTuple):
    """Lengths of captions in a tokenizer's tokens; shares are between 0 and 1."""

    captions: int
    truncated: float  # share
    tokens_lost: float  # by the truncated ones, on average
    endless: float  # share of captions that are truncated although they are cut into sentences: no sentence fits
    repeated: float  # share of captions that occur more than once


def caption_statistics(source: PairSource, tokenizer: TextTokenizer) -> CaptionStatistics:
    """Measure the captions of an epoch's first rows (others would fetch every shard); skip unreadable rows."""
    counts, endless, context = [], 0, tokenizer.context_length
    times: Counter[int] = Counter()
    rows = range(len(source)) if source.pairs_per_epoch >= len(source) else np.sort(source.order(0, 0)).tolist()
    for index in rows[:SAMPLED]:
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
    return CaptionStatistics(len(counts), len(lost) / number, mean, endless / number, repeated)


def report_captions(source: PairSource, tokenizer: TextTokenizer, policy: LongCaptions, loss: object = None) -> None:
    """Print on the first rank what happens to captions longer than the context, and whether many are equal.

    A loss without an option ``duplicates``, or with it set, knows what to do with equal captions.
    """
    if rank_and_world()[0]:
        return
    found, context = caption_statistics(source, tokenizer), tokenizer.context_length
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
            else f"{what} are truncated to {context} tokens and lose {found.tokens_lost:.1f} tokens on average "
            "(to read more: model.context_length, or data.captions.long: sentences)"
        )


LOOKED_AT = 150  # images of each source
SECONDS = 2.0  # after which no other image is read, as of a slow store
DECODED = 4  # deep images whose levels are looked at
DARK = 64  # a deep image that has no level above is dark: it leaves at least 2 of its bits unused


def report_images(train: PairSource, val: PairSource, seed: int, preprocessing: Preprocessing) -> None:
    """Print on the first rank how many sampled images contain something that the model does not see.

    Without a window of deep levels, pixels of a few deep images are read too: those of 12 bits in a file of 16 would
    otherwise be black without a word.
    """
    if rank_and_world()[0]:
        return
    seen = set() if preprocessing.window is None else {Unseen.DEEP}
    if preprocessing.bands != 3:
        seen |= {Unseen.CONVERTED, Unseen.TRANSPARENT, Unseen.ANIMATED}
    # Of training the first that it reads, as spread ones would fetch every shard.
    rows = [(train, row) for row in train.order(0, seed)[:LOOKED_AT].tolist()]
    rows += [(val, row) for row in range(0, len(val), -(-len(val) // LOOKED_AT) or 1)]
    random.Random(0).shuffle(rows)  # both are looked at in the time
    end = time.monotonic() + SECONDS
    counts, levels, looked_at = Counter[Unseen](), list[int](), 0
    for source, row in rows:
        with suppress(InputError):  # its images are no files, it is a bad sample, or a store does not answer
            content = source.read(row).image
            lost = [kind for kind in unseen(io.BytesIO(content), "") if kind not in seen]
            if Unseen.DEEP in lost and len(levels) < DECODED:
                levels.append(int(np.asarray(open_image(io.BytesIO(content))).max()))
            counts.update(lost)
            looked_at += 1
        if time.monotonic() > end:
            break
    found = [f"{counts[kind]} {kind}" for kind in Unseen if counts[kind]]
    if levels and max(levels) < DARK:
        found.append(
            f"the deep ones are dark: no level of {len(levels)} is above {max(levels)} of 255, so scale their values "
            "by data.window, such as [0, 4095] for 12 bits"
        )
    if found:
        rank_zero_info(f"images: of {looked_at:,} looked at (of {len(train) + len(val):,} pairs), {', '.join(found)}")
