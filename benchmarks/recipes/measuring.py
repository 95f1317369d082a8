"""Measure a run from within: its processor time, and at its end what the model has learned."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

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
    """Write steps, processor seconds and metrics as JSON; last in the list, so that the weights are EMA's average.

    Args:
        path: of the file.
        evaluate: compute the metrics.
    """

    def __init__(self, path: str, evaluate: bool) -> None:
        self.path, self.evaluate = Path(path), evaluate
        torch.set_num_threads(1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.since = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        seconds = (time.process_time() - self.since) * trainer.global_step / (trainer.global_step - WARM_UP)
        measured: dict[str, Any] = {"steps": trainer.global_step, "seconds": seconds}
        if self.evaluate:
            pl_module.eval()
            measured["metrics"] = metrics(pl_module.model)
        self.path.write_text(json.dumps(measured), encoding="utf-8")


@torch.no_grad()
def metrics(model: CLIP) -> dict[str, dict[str, float]]:
    """Return accuracies of both halves of each set by name."""
    found: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    for name, options in SETS.items():
        images: LabelledImages = OpenMojiClasses(**options)
        classifier = zero_shot_classifier(model, images.class_names, ["{}"])
        features = model.encode([images[row][0] for row in range(len(images))])
        labels = torch.tensor(images.labels())
        for half, part in enumerate(found.values()):
            scores = features[half::2] @ classifier
            counted = accuracies(classification_counts(scores, labels[half::2]))
            part.update({f"{name}/{metric}": counted[metric] for metric in ("top1", "top5")})
    return found
