"""Captions longer than the context: their sentences that fit, and reports of what a model does not see.

The rule for the end of a sentence is one regular expression over Unicode's sentence terminators, in the spirit of UAX
#29 with a list of abbreviations. Its limits: "Vitamin C. It ...", and an abbreviation that is not listed before a
capital letter, are judged wrongly; a full stop without a space after it ends nothing ("end.Begin"); Thai and Lao texts,
which have no terminators, are one sentence. A sentence too many or too few loses no text and splits no word.
"""

import io
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import regex
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.distributed import rank_and_world
from lit_clip.errors import BadSample, InputError, require
from lit_clip.models.config import Preprocessing
from lit_clip.models.tokenizer import CallableTokenizer, TextTokenizer
from lit_clip.tools.images import Unseen, open_image, unseen
from .source import Derived, LongCaptions, Pair, PairSource

# Words that end in a full stop before a capital letter or a number.
_ABBREVIATIONS = (
    r"Mr|Mrs|Ms|Dr|Prof|St|Mt|Lt|Capt|Gen|Sgt|Rev|Hon|No|Nos|Nr|Fig|Figs|Abb|Vol|pp|approx|etc|vs|ca|cf|Hr|Mme|Mlle|Sra?"
    r"|\p{L}"  # initials, and the ends of "e.g.", "U.S."
)
_REST = (
    r"[\p{Pe}\p{Pf}\"'’”»]{0,9}+ \s{1,99}+"  # brackets and quotation marks that belong to the sentence, and white space
)
_GOES_ON = r"(?! [^\p{L}\n\r]{0,20}+ \p{Ll})"  # as in "approx. 3 m" and "left ... and came back"


def _ends(small_letters: bool) -> regex.Pattern[str]:
    """Return a linear-time pattern for ends of sentences; in lower-case text, letter case does not matter."""
    goes_on = "" if small_letters else _GOES_ON
    return regex.compile(
        rf"""
        (?<![.!?]) (?: (?<! \b(?i:{_ABBREVIATIONS}) ) \. (?![.!?]) | \.{{2,}}+ (?![!?]) ) {_REST} {goes_on}
        | (?<![.!?]) (?= \.*+ [!?] ) [.!?]++ {_REST}
        | (?: [\p{{Sentence_Terminal}}--[.!?．]] | ．(?!\p{{N}}) )  # such as 。？।؟, which need no space after them
          \p{{Sentence_Terminal}}*+ (?: {_REST} | [\p{{Pe}}\p{{Pf}}]* )
        | [\n\r\u2028\u2029] \s{{0,99}}+ (?! \p{{Ll}} )  # a line that goes on with a small letter was only wrapped
        """,
        regex.VERBOSE | regex.VERSION1,
    )


_ENDS, _ENDS_IN_SMALL_LETTERS = _ends(small_letters=False), _ends(small_letters=True)
_LETTER, _CAPITAL = regex.compile(r"\p{L}"), regex.compile(r"\p{Lu}")


def sentences(text: str) -> list[str]:
    """Cut a text into sentences, each with the white space after it; joined, they are the text.

    What has no letter, such as the number of a list's entry, belongs to the sentence after it.
    """
    pattern = _ENDS if _CAPITAL.search(text) else _ENDS_IN_SMALL_LETTERS
    found, start, looked = [], 0, 0
    for end in (*(match.end() for match in pattern.finditer(text)), len(text)):
        if _LETTER.search(text, looked, end):
            found.append(text[start:end])
            start = end
        looked = end
    if start < len(text):
        found[-1:] = ["".join([*found[-1:], text[start:]])]
    return found


def fitting(text: str, tokenize: TextTokenizer, rng: random.Random | None) -> str:
    """Return sentences of a text, in order, that fit the context together; a text that fits is returned whole.

    If not one sentence fits, one is returned as it is, which the tokenizer then truncates. ``rng`` draws as many
    sentences as fit; None takes the first ones that fit, up to the next that does not.
    """
    context, counted = tokenize.context_length, tokenize.count
    if counted(text) <= context:
        return text
    parts = sentences(text)
    lengths = [counted(part) for part in parts]
    fits = [number for number, length in enumerate(lengths) if length <= context]
    if not fits:
        return (parts[0] if rng is None else rng.choice(parts)).strip()
    around, chosen, used = counted(""), [], counted("")  # tokens at the start and the end of any text
    for number in fits if rng is None else rng.sample(fits, len(fits)):
        if used + lengths[number] - around <= context:
            longer = sorted([*chosen, number])
            if (count := counted(_joined(parts, longer))) <= context:  # a tokenizer may join sentences otherwise
                chosen, used = longer, count
                continue
        if rng is None:
            break
    return _joined(parts, chosen)


def _joined(parts: Sequence[str], chosen: Sequence[int]) -> str:
    return "".join(parts[number] for number in chosen).strip()


class FittingCaptions(Derived):
    """The pairs of a source, for training and validation, with captions that fit: see :func:`fitting`.

    All that is random comes from the generator that a row is loaded with, after the source has drawn from it.
    """

    def __init__(self, source: PairSource, tokenize: TextTokenizer) -> None:
        require(
            not isinstance(tokenize, CallableTokenizer),
            "data.captions.long: sentences needs a tokenizer that counts the tokens of a whole text, and the model's "
            "is a callable that returns truncated ones; make it a TextTokenizer, or set truncate",
        )
        super().__init__([source])
        self.tokenize = tokenize

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        pair = self.source.draw(index, rng, decoded)
        caption = fitting(pair.caption, self.tokenize, rng)
        more = [each._replace(caption=fitting(each.caption, self.tokenize, rng)) for each in pair.more or ()]
        return pair._replace(caption=caption, more=None if pair.more is None else more)


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
