"""Text for the terminal: what comes from a file, such as its name, must not reach it as an escape sequence."""

import logging
import re
import sys
import traceback
import warnings
from types import TracebackType
from typing import TextIO

# Control characters except newline and tab, other separators of lines, marks that turn the direction of writing, and
# what is not Unicode in a file's name.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return text with escapes, such as a backslash and ``x1b``, in place of the characters that steer a terminal."""
    return UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def guard_messages() -> None:
    """Make all log messages, warnings and tracebacks of this process :func:`printable`."""
    logging.setLogRecordFactory(_Record)
    warnings.showwarning = _show_warning
    sys.excepthook = _show_error


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802  # logging's name
        return printable(super().getMessage())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    (file or sys.stderr).write(printable(warnings.formatwarning(message, category, filename, lineno, line)))


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
