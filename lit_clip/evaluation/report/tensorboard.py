"""An evaluation in TensorBoard: its numbers, and the charts of the page."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.evaluation.report.charts import chart_settings, figures
from lit_clip.evaluation.report.tables import MEAN, lines


def write_tensorboard(results: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Write event files to ``out/tensorboard``, and replace an earlier evaluation's.

    Scalars are named as in training (``zero_shot/<set>/top1``), charts ``evaluation/<chart>``. The step of a few-shot
    scalar is its number of examples per class, that of everything else 0.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    try:
        for old in folder.glob("events.out.tfevents.*"):  # TensorBoard would show both
            old.unlink()
        with SummaryWriter(folder) as writer:
            for line in lines("", results):
                if line.metric != MEAN:
                    tag = f"{line.task}/{line.set}/{line.metric}"
                    writer.add_scalar(tag, line.value, line.shots or 0)
            with chart_settings(), warnings.catch_warnings(action="ignore"):  # missing glyphs
                for name, figure in figures(results, others).items():
                    writer.add_figure(f"evaluation/{name}", figure)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
