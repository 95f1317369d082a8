"""Messages of other packages that only their authors, or we, could act on; every other one is shown.

A warning belongs here only if no setting of a user leads to it, or if what it asks for is done already.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Regular expressions of the start of a warning, and why nobody needs to see it.
WARNINGS = {
    r".*isinstance\(treespec, LeafSpec\)": "of torch's trees, which Lightning uses",
    r"Precision bf16-mixed is not supported by the model summary": "the plan has the sizes",
    r".*recommended to use `self\.log\(.*sync_dist=True\)`": "those of ours are over all ranks already",
    r"MLFlow only allows ": "it leaves out the @ of recall@1, which is a name of ours",
    r"Found \d+ module\(s\) in eval mode": "frozen modules should be",
    r"The dirpath has changed from ": "each run has a folder of its own, also one that is resumed",
    r"The 'predict_dataloader' does not have many workers": "we choose their number: none for a single batch",
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


@contextmanager
def log_level(level: int, *names: str) -> Iterator[None]:
    """Show only messages of at least this level, of these loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
