"""An evaluation in TensorBoard: its numbers, the charts of the page, and contact sheets of wrong predictions."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_clip.errors import InputError
from lit_clip.evaluation.overview import sets_of, tasks_of
from lit_clip.evaluation.predictions import run_image
from lit_clip.evaluation.report.chart_style import chart_settings
from lit_clip.evaluation.report.charts import figures
from lit_clip.evaluation.report.prediction_grid import Prediction, prediction_grid
from lit_clip.evaluation.report.tables import MEAN, lines


def write_tensorboard(
    results: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], out: Path, step: int = 0
) -> None:
    """Write event files to ``out/tensorboard``, and replace an earlier evaluation's.

    Scalars are named as in training (``zero_shot/<set>/top1``), charts ``evaluation/<chart>`` and contact sheets
    ``zero_shot/<set>/most confidently wrong``. The step of a few-shot scalar is its number of examples per class,
    ``step`` that of everything else.
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
                    writer.add_scalar(tag, line.value, step if line.shots is None else line.shots)
            with chart_settings(), warnings.catch_warnings(action="ignore"):  # missing glyphs
                for name, figure in figures(results, others).items():
                    writer.add_figure(f"evaluation/{name}", figure, step)
            for name, sheet in _sheets(results, out):
                tag = f"zero_shot/{name}/most confidently wrong"
                writer.add_image(tag, np.asarray(sheet), step, dataformats="HWC")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _sheets(results: Mapping[str, Any], out: Path) -> Iterator[tuple[str, Image.Image]]:
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Pillow's own font has fewer glyphs
    for name, entry in sets_of(results):
        wrong = []
        for error in tasks_of(entry).get("zero_shot", {}).get("errors") or []:
            image = run_image(out, error.get("image"))
            if image:
                nearest = [(str(label), float(probability)) for label, probability in error.get("nearest") or []]
                wrong.append(Prediction(image, str(error.get("truth")), nearest))
        if wrong:
            yield name, prediction_grid(wrong, font_file=font)
