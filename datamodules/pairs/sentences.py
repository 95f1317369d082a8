"""Captions longer than the context: use whole sentences that fit, different ones in each epoch.

The rule for the end of a sentence is one regular expression over Unicode's sentence terminators, in the spirit of UAX
#29 with a list of abbreviations. Its limits: "Vitamin C. It ...", and an abbreviation that is not listed before a
capital letter, are judged wrongly; a full stop without a space after it ends nothing ("end.Begin"); Thai and Lao texts,
which have no terminators, are one sentence. A sentence too many or too few loses no text and splits no word.
"""

import random
from collections.abc import Sequence

import regex

from lit_clip.errors import require
from lit_clip.models.custom import CallableTokenizer
from lit_clip.models.tokenizer import TextTokenizer
from .source import Derived, Pair, PairSource

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
