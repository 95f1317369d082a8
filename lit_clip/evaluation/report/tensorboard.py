"""An evaluation in TensorBoard: the same charts as on the page, its numbers, and sheets of images taken wrongly."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_clip.errors import InputError
from lit_clip.evaluation.overview import number, sets_of, shots_of, tasks_of
from lit_clip.evaluation.report.chart_style import styled
from lit_clip.evaluation.report.charts import figures
from lit_clip.evaluation.report.prediction_grid import Prediction, prediction_grid
from lit_clip.evaluation.report.run_images import run_image


def write_tensorboard(
    results: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], out: Path, step: int = 0
) -> None:
    """Write event files to the folder ``tensorboard`` in ``out``, in place of those of an earlier evaluation.

    Scalars are called as in training (``zero_shot/<set>/top1``), few-shot ones have the number of shots as their step;
    charts are ``evaluation/<chart>`` and sheets ``zero_shot/<set>/most confidently wrong``.

    Args:
        results: what a ``results.json`` holds.
        others: other runs that the charts compare with, by the name that is shown.
        out: the run's folder, in which the images are.
        step: of what has none of its own.

    Raises:
        InputError: the folder cannot be written to.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    try:
        for old in folder.glob("events.out.tfevents.*"):  # else TensorBoard would show both
            old.unlink()
        with SummaryWriter(folder) as writer:
            for tag, value, at in _scalars(results, step):
                writer.add_scalar(tag, value, at)
            with styled(), warnings.catch_warnings(action="ignore"):  # of letters that a font lacks
                for name, figure in figures(results, others).items():
                    writer.add_figure(f"evaluation/{name}", figure, step)
            for name, sheet in _sheets(results, out):
                tag = f"zero_shot/{name}/most confidently wrong"
                writer.add_image(tag, np.asarray(sheet), step, dataformats="HWC")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _scalars(results: Mapping[str, Any], step: int) -> Iterator[tuple[str, float, int]]:
    """Tags, values and steps."""
    for name, entry in sets_of(results):
        for task, result in tasks_of(entry).items():
            for metric, value in (result.get("metrics") or {}).items():
                known = number(value)
                if known is not None:
                    yield f"{task}/{name}/{metric}", known, step
        for shots, mean in shots_of(entry).items():
            yield f"few_shot/{name}/{entry.get('metric') or 'top1'}", mean, shots


def _sheets(results: Mapping[str, Any], out: Path) -> Iterator[tuple[str, Image.Image]]:
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # more letters than Pillow's own has
    for name, entry in sets_of(results):
        wrong = []
        for error in tasks_of(entry).get("zero_shot", {}).get("errors") or []:
            image = run_image(out, error.get("image"))
            if image:
                nearest = [(str(prediction), float(share)) for prediction, share in error.get("nearest") or []]
                wrong.append(Prediction(image, str(error.get("truth")), nearest))
        if wrong:
            yield name, prediction_grid(wrong, font_file=font)
