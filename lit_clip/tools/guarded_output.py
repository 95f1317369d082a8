"""Keep escape sequences from files, and useless messages, out of the terminal."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lit_clip.errors import printable


def guard_messages() -> None:
    """Make all log messages, warnings and tracebacks of this process :func:`printable`."""
    logging.setLogRecordFactory(_Record)
    warnings.showwarning = _show_warning
    sys.excepthook = _show_error


def open_closed_streams() -> set[str]:
    """Open the null device for closed standard streams, such as by ``2>&-``; return their names.

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


# Regular expressions of the start of a warning, and why nobody needs to see it.
WARNINGS = {
    r".*isinstance\(treespec, LeafSpec\)": "of torch's trees, which Lightning uses",
    r"Precision bf16-mixed is not supported by the model summary": "the plan has the sizes",
    r".*recommended to use `self\.log\(.*sync_dist=True\)`": "those of ours are over all ranks already",
    r"MLFlow only allows ": "it leaves out the @ of recall@1, which is a name of ours",
    r"The number of training batches \(\d+\) is smaller than the logging interval": "steps count over all epochs",
    r"Found \d+ module\(s\) in eval mode": "frozen modules should be",
    r"The dirpath has changed from ": "each run has a folder of its own, also one that is resumed",
    r"The `srun` command is available": "without it one machine's ranks start too; an error says where it is needed",
    r"The 'predict_dataloader' does not have many workers": "we choose their number: none for a single batch",
    r"Be aware that when using `ckpt_path`.* following callbacks: \['EMA'\]": "ours says which weights are used",
    r"Consider setting `persistent_workers=True` in 'predict_dataloader'": "it is read once",
}
# Parts of log messages, and why nobody needs to see them.
LOGGED = {
    "Tip:": "advertisements",
    "TPU available: False": "nobody asked for one",
    "Automatic Mixed Precision (AMP)": "of trainer.precision, as set or as said in a line of ours",
    "configured with model summary callbacks": "the plan is the summary",
    "`weights_only` was not set": "of Lightning's own loading; checkpoints are read without code (WholeCheckpointIO)",
}


def silence() -> None:
    """Silence these messages in this process."""
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in LOGGED)


class _Stderr:
    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def log_above_bars() -> None:
    """Let Lightning's log messages move its progress bar down, as warnings do, instead of breaking it.

    rich takes the place of ``sys.stderr`` while a bar is drawn; Lightning's handlers keep the stream of before. Where
    that is a file, messages stay in it.
    """
    for name in ("lightning", "lightning.pytorch"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.__stderr__ and sys.stderr.isatty():
                handler.setStream(_Stderr())


@contextmanager
def log_level(level: int, *names: str) -> Iterator[None]:
    """Show only messages of at least this level from these loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
