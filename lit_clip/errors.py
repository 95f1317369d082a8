"""Errors that the user can fix.

Code that reads options or files raises :class:`InputError` for values it cannot use. Docstrings do not repeat that.
"""

import os
import re
from collections.abc import Collection
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from lit_clip.secrets import ends_without_secrets, without_secrets

# Control characters except newline and tab, other separators of lines, marks that turn the direction of writing, and
# what is not Unicode in a file's name.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_BREAK = re.compile(r"(?<!\s)\s*[\n\t]\s*")
# A part of a message that is longer than our sentences quotes a name: of a column, a member, a key, an image.
LONG_PART = re.compile(r"[^,:;]{200,}")
LONGEST_MESSAGE = 2000  # characters; with long lists of what there is
FROM_WORKER = re.compile(r"\ACaught \w+ in DataLoader worker .*^(?:\w+\.)+\w+: ([^\n]*)", re.DOTALL | re.MULTILINE)


def printable(text: str) -> str:
    """Return text without secrets, and with terminal control characters escaped."""
    return UNPRINTABLE.sub(_escaped, without_secrets(text))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_printable_line(text: str) -> str:
    """Return text as one line for a terminal; shorten names that are too long to read.

    A data loader raises a worker's error again with the worker's traceback as its message; of that the message remains.
    """
    from_worker = FROM_WORKER.search(text)
    text = ends_without_secrets(from_worker[1] if from_worker else text)
    line = LONG_PART.sub(lambda part: _without_middle(part[0], 110, 60), printable(LINE_BREAK.sub(" ", text)))
    return _without_middle(line, LONGEST_MESSAGE - 500, 490)  # says at its end what to do


def _without_middle(text: str, first: int, last: int) -> str:
    return text if len(text) <= first + last else f"{text[:first]} ... {text[-last:]}"


def listed(names: Collection[str], most: int = 5) -> str:
    """Return names for a message: the first ones, and the number of the others."""
    shown = ", ".join(list(names)[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


class InputError(ValueError):
    """An error in the user's input; its one-line message names file, row or key and says what to do.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary ``ValueError``.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_printable_line(arg) if isinstance(arg, str) else arg for arg in args))


def require(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless the condition holds (NaN never does)."""
    if not condition:
        raise InputError(message)


def similar_file(path: Path) -> str:
    """Return a hint at a file or folder in the same place with the same suffix and a similar name, or nothing."""
    with suppress(OSError):
        others = [file.stem for file in path.parent.iterdir() if file.suffix == path.suffix and file.name != path.name]
        if near := get_close_matches(path.stem, others, n=1):
            return f"; did you mean {path.with_stem(near[0])}?"
    return ""


def no_such_file(path: str | os.PathLike[str]) -> InputError:
    """Return the error for a missing file, with a similarly named file as a suggestion."""
    path = Path(path)
    hint = similar_file(path)
    if path.parts[:1] == ("configs",) and not Path("configs").is_dir():
        hint = f"; packaged configurations are typed by name, without folder and ending: {path.stem}"
    return InputError(f"{path}: there is no such file{hint}")


class BadSample(InputError):  # noqa: N818  # named for the sample
    """A sample that cannot be used: its file and row, or shard and key, and the reason.

    The reason is a few words that other samples share, as skipped samples are counted by it; the detail says what
    exactly is wrong, and what to do.
    """

    def __init__(self, where: str, reason: str = "", detail: str = "") -> None:
        # A data loader raises a worker's error again, from its message alone.
        where, reason, detail = map(without_secrets, (where, reason, detail))  # they are listed in files, too
        super().__init__(": ".join(part for part in (where, detail or reason) if part))
        self.where, self.reason, self.detail = where, reason, detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        return type(self), (self.where, self.reason, self.detail)


def unreadable_image(error: Exception, where: str) -> InputError:
    """Return the error for an unreadable image: ours unchanged, a decoder's or transform's with its place."""
    if isinstance(error, InputError):
        return error
    words = str(error).partition("\n")[0] or type(error).__name__
    return BadSample(where, "broken image", f"cannot be read ({words})")
