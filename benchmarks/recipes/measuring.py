"""Measure a run from within: its processor time and memory, and at its end what the model has learned."""

import copy
import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor

from callbacks import ZeroShot
from datamodules import OpenMojiClasses
from lit_clip.commands.wise_ft import InterpolatedModels
from lit_clip.evaluation.targets import accuracies, classification_counts
from lit_clip.evaluation.zero_shot import ZeroShotSet, zero_shot_classifier
from lit_clip.models.clip import CLIP

WARM_UP = 5  # steps that are not measured
FEW = 20  # classes, up to which a top-5 accuracy says little
Metrics = dict[str, dict[str, float]]  # half -> "set/metric" -> value


class Measuring(Callback):
    """Write steps, processor seconds, memory and metrics as JSON; last in the list, to measure EMA's average.

    The metrics are those of the sets of the config's ``ZeroShot``, which itself has nothing to do: top-1 and top-5
    among all classes, and recall@1 and @10 among the classes that a set has images of.

    Args:
        path: of the file.
        evaluate: compute the metrics.
        drawings: folder of another artist's drawings, see :class:`OtherDrawings`.
        alphas: measure interpolations between the model before the first step (0) and after the last (1) too.
    """

    def __init__(
        self, path: str, evaluate: bool = True, drawings: str | None = None, alphas: Sequence[float] = ()
    ) -> None:
        self.path, self.evaluate, self.drawings, self.alphas = Path(path), evaluate, drawings, alphas
        torch.set_num_threads(1)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.alphas and self.evaluate:
            self.before = copy.deepcopy(pl_module.model)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == WARM_UP:
            self.since = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        steps = trainer.global_step
        seconds = (time.process_time() - self.since) * steps / (steps - WARM_UP)
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        measured: dict[str, Any] = {"steps": steps, "seconds": seconds, "megabytes": megabytes}
        if self.evaluate:
            pl_module.eval()
            sets = self.sets(trainer)
            measured["metrics"] = metrics(pl_module.model, sets)
            if self.alphas:
                models = InterpolatedModels(self.before.eval(), pl_module.model)
                measured["interpolated"] = {alpha: metrics(models.at(alpha), sets) for alpha in self.alphas}
        self.path.write_text(json.dumps(measured), encoding="utf-8")

    def sets(self, trainer: Any) -> dict[str, ZeroShotSet]:
        """Return the sets to measure by name."""
        sets = next(callback.sets for callback in trainer.callbacks if isinstance(callback, ZeroShot))
        if self.drawings:
            return {**sets, "other_artist": ZeroShotSet(OtherDrawings(Path(self.drawings)), ["{}"])}
        return sets


class OtherDrawings(OpenMojiClasses):
    """Another artist's drawings of the same objects: files named HEXCODE.png or .webp, transparent or not."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        there = {key(path): path for path in folder.iterdir() if path.suffix in (".png", ".webp")}
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
def metrics(model: CLIP, sets: Mapping[str, ZeroShotSet]) -> Metrics:
    """Return top-1 of both halves of each set, and top-5 of those with many classes."""
    found: Metrics = {"validation": {}, "test": {}}
    for name, each in sets.items():
        images = each.images
        classifier = zero_shot_classifier(model, images.class_names, each.templates)
        features = model.encode([images[row][0] for row in range(len(images))])
        labels = torch.tensor(images.labels())
        for half, part in enumerate(found.values()):
            counted = accuracies(classification_counts(features[half::2] @ classifier, labels[half::2]))
            kept = ("top1", "top5") if len(images.class_names) > FEW else ("top1",)
            part.update({f"{name}/{metric}": counted[metric] for metric in kept})
            if len(images.class_names) > FEW:
                part.update(among_its_own(f"{name}, own", features[half::2] @ classifier, labels[half::2], labels))
    return found


def among_its_own(name: str, similarities: Tensor, labels: Tensor, every_label: Tensor) -> dict[str, float]:
    """Return recall@1 and @10 among the classes that the whole set has images of."""
    present = every_label.unique()
    right = similarities.gather(1, labels[:, None])
    before = (similarities[:, present] > right).sum(dim=1)
    return {f"{name}/recall{k}": float((before < k).double().mean()) for k in (1, 10)}
