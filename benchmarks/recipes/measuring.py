"""Measure a run from within: its processor time, and at its end what the model has learned."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from PIL import Image

from datamodules import OpenMojiClasses
from lit_clip.evaluation.accuracy import accuracies, classification_counts
from lit_clip.evaluation.data import LabelledImages
from lit_clip.evaluation.zero_shot import zero_shot_classifier
from lit_clip.models.clip import CLIP

WARM_UP = 5  # steps that are not measured
SETS: dict[str, dict[str, Any]] = {
    "trained_names": {"drawings": "trained"},
    "unseen_names": {"drawings": "held_out"},
    "unseen_groups": {"drawings": "held_out", "classes": "group"},
    "line_art": {"drawings": "all", "style": "line"},
}


class Measuring(Callback):
    """Write steps, processor seconds and metrics as JSON; last in the list, to measure EMA's average.

    Args:
        path: of the file.
        evaluate: compute the metrics.
        drawings: folder of another artist's drawings, see :class:`OtherDrawings`.
    """

    def __init__(self, path: str, evaluate: bool = True, drawings: str | None = None) -> None:
        self.path, self.evaluate, self.drawings = Path(path), evaluate, drawings
        torch.set_num_threads(1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == WARM_UP:
            self.since = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        steps = trainer.global_step
        seconds = (time.process_time() - self.since) * steps / (steps - WARM_UP)
        measured: dict[str, Any] = {"steps": steps, "seconds": seconds}
        if self.evaluate:
            pl_module.eval()
            measured["metrics"] = metrics(pl_module.model, self.drawings)
        self.path.write_text(json.dumps(measured), encoding="utf-8")


class OtherDrawings(OpenMojiClasses):
    """Another artist's drawings of the same objects: a folder with files named HEXCODE.png, transparent or not."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        there = {key(path): path for path in folder.glob("*.png")}
        self.files = [(there[key(path)], label) for path, label in self.files if key(path) in there]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            drawing = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB"), label


def key(path: Path) -> str:
    """Return a file's code points, without variation selectors, which artists write or leave out."""
    return path.stem.upper().replace("-FE0F", "")


@torch.no_grad()
def metrics(model: CLIP, drawings: str | None) -> dict[str, dict[str, float]]:
    """Return top-1 and top-5 accuracies of both halves of each set."""
    sets: dict[str, LabelledImages] = {name: OpenMojiClasses(**options) for name, options in SETS.items()}
    if drawings:
        sets["other_artist"] = OtherDrawings(Path(drawings))
    found: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    for name, images in sets.items():
        classifier = zero_shot_classifier(model, images.class_names, ["{}"])
        features = model.encode([images[row][0] for row in range(len(images))])
        labels = torch.tensor(images.labels())
        for half, part in enumerate(found.values()):
            counted = accuracies(classification_counts(features[half::2] @ classifier, labels[half::2]))
            part.update({f"{name}/{metric}": counted[metric] for metric in ("top1", "top5")})
    return found
