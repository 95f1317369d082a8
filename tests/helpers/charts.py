"""Runs and evaluations without charts and TensorBoard: half of the time of a run or an evaluation of a few images.

Tests of charts take the fixture ``charts``.
"""

from functools import partial
from typing import Any
from unittest.mock import patch

from lit_clip.commands import evaluate
from lit_clip.evaluation.report import page, run_page


def _run_page_without_curves(write: Any, *arguments: Any) -> None:
    path, rows, start, worse, _, examples = arguments
    write(path, rows, start, worse, {}, examples)


LEFT_OUT = [
    patch.object(page, "few_shot", lambda *_: None),
    patch.object(evaluate, "write_tensorboard", lambda *_: None),
    patch.object(run_page, "write_run_page", partial(_run_page_without_curves, run_page.write_run_page)),
]


def leave_out() -> None:
    """Draw no charts from now on."""
    for each in LEFT_OUT:
        each.start()


def draw() -> None:
    """Draw charts again."""
    for each in LEFT_OUT:
        each.stop()
