"""Skip samples that cannot be used, and check captions; lit_clip/tools/images.py refuses unreadable images."""

import re
from dataclasses import dataclass
from typing import Any, get_args

import regex
from torch.utils.data import Dataset

from lit_clip.errors import BadSample, require
from lit_clip.tools.images import OnError

BLANK = frozenset(  # what pandas and spreadsheets write for "no caption", and the errors of Excel and Google Sheets
    {
        *("", "nan", "none", "null", "n/a", "<na>", "#n/a", "#ref!", "#value!", "#name?", "#div/0!", "#num!", "#null!"),
        *("#error!", "#spill!", "#calc!", "#field!", "#blocked!", "#unknown!", "#connect!", "#busy!", "#getting_data"),
    }
)
LONGEST_BLANK = 16  # bytes of a blank text with a little white space
# White space, control and format characters, and the letters and marks that are drawn as nothing; for regex and RE2.
_INVISIBLE = (
    r"[\p{Z}\p{Cc}\p{Cf}" + "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]*"
)
_WORD = f"(?:{'|'.join(map(re.escape, sorted(BLANK, reverse=True)))})"
BLANK_PATTERN = f"^{_INVISIBLE}{_WORD}{_INVISIBLE}$"  # of a blank text, to be matched in either case
_BLANK_TEXT = regex.compile(f"{_INVISIBLE}+{_WORD}{_INVISIBLE}+", regex.IGNORECASE)  # "*+": without going back


def is_blank(caption: object) -> bool:
    """Return whether a cell means "no caption": missing, a placeholder or error text, or no visible character."""
    if not isinstance(caption, str):
        return caption is None or (isinstance(caption, float) and caption != caption)
    first = caption[:1]
    if "!" <= first <= "~" and first not in "nN<#":  # nearly every caption
        return False
    return _BLANK_TEXT.fullmatch(caption) is not None


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogate; they come from JSON escapes and from undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(name: str) -> str:
    """Escape undecodable bytes in a file name."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class BadSamples:
    """Policy for samples that cannot be used.

    Attributes:
        on_error: ``error`` ends the run and names the sample; ``skip`` drops it from its batch, counts it and lists it
            in the run's ``skipped.jsonl``. No other sample takes its place.
        max_skipped: with ``skip``, end the run once a larger share than this of at least 100 samples was skipped.
    """

    on_error: OnError = "error"
    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        require(self.on_error in get_args(OnError), f"on_error: {self.on_error!r} must be 'error' or 'skip'")
        require(0 <= self.max_skipped <= 1, f"max_skipped: {self.max_skipped} must be between 0 and 1")


class SkippingDataset(Dataset[Any]):
    """Dataset that returns the error of a sample that cannot be used; it never returns a neighbour instead."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: Any) -> Any:
        try:
            return self.dataset[sample]
        except BadSample as error:
            return BadSample(error.where, error.reason, error.detail)  # whose frames do not keep what was read


def check_caption(caption: object, where: str) -> str:
    """Return the caption; raise :class:`BadSample` if it is missing, blank (:func:`is_blank`), or not text."""
    if is_blank(caption):
        raise BadSample(where, "no caption", "no caption; write one or remove it")
    if not isinstance(caption, str):
        raise BadSample(where, "caption is not text", f"the caption is not text: {str(caption)[:60]!r}")
    if not is_unicode(caption):
        raise BadSample(where, "caption is not text", "the caption is not UTF-8 text; fix or remove it")
    return caption
