"""Text for the terminal: what comes from a file, such as its name, must not reach it as an escape sequence."""

import logging
import os
import sys
import traceback
import warnings
from types import TracebackType
from typing import Any

from lit_clip.errors import printable
from lit_clip.secrets import remember_environment


def guard_messages() -> None:
    """Make all log messages, warnings and tracebacks of this process :func:`printable`."""
    remember_environment()
    logging.setLogRecordFactory(_Record)
    warnings.showwarning = _show_warning
    sys.excepthook = _show_error


def open_closed_streams() -> set[str]:
    """Open the null device in place of the standard streams that are closed, as by ``2>&-``; return their names.

    Python has no object for a closed stream, and the next file that is opened would get its descriptor.
    """
    streams = {"stdin": "r", "stdout": "w", "stderr": "w"}  # by descriptor: a file gets the lowest that is free
    closed = {name for name in streams if getattr(sys, name) is None}
    for name, mode in streams.items():
        if name in closed:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    return closed


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802  # logging's name
        return printable(super().getMessage())


def _show_warning(*given: Any) -> None:
    parts: Any = (*given, None, None)
    message, category, filename, lineno, file, line = parts[:6]
    (file or sys.stderr).write(printable(warnings.formatwarning(message, category, filename, lineno, line)))


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
