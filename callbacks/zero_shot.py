"""Zero-shot classification during training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from callbacks.log_image import log_image
from callbacks.periodic import PeriodicEvaluation, PeriodicResult, from_first_rank
from callbacks.suite_sets import check_folds, chosen_entries, named, open_sets
from lit_clip import distributed
from lit_clip.errors import require
from lit_clip.evaluation.data import LabelledImages
from lit_clip.evaluation.prompts import Prompts, prompts_of, prompts_of_set, text_classifier
from lit_clip.evaluation.report.prediction_grid import Prediction, prediction_grid
from lit_clip.evaluation.scores import baselines, comparable, evaluate_scores, mean_over_folds
from lit_clip.evaluation.set_encoding import Encoded, SetEncoder
from lit_clip.evaluation.suite import Metric, SuiteEntry, check_name
from lit_clip.evaluation.targets import Targets
from lit_clip.evaluation.zero_shot import ZeroShotSet
from lit_clip.models.patches import as_image
from lit_clip.models.preprocess import pixels
from lit_clip.module import LitCLIP
from lit_clip.tools.images import OnError
from lit_clip.training.lightning.run_folder import run_folder
from lit_clip.weights.fingerprint import text_sha256

__all__ = ["ZeroShot", "ZeroShotSet"]


@dataclass
class _OpenedSet:
    """A set with everything that its evaluation needs.

    Attributes:
        folds: images of each fold, over which results are averaged.
        prompts: prompts of its classes.
        metric: its main metric.
    """

    folds: list[LabelledImages]
    prompts: Prompts
    metric: Metric = "top1"


class ZeroShot(PeriodicEvaluation):
    """Evaluates zero-shot classification on any number of sets, under ``fit``, ``validate`` and ``test``.

    Logs ``zero_shot/<set>/<metric>``: the set's own metric and, if each image has one class, ``top1``, ``top5`` and
    ``mean_per_class``. They are fractions in which every image counts once. Ranks divide the prompts
    and the images. Prompts are encoded again only if the text tower has changed. Some images with their most similar
    class names are logged as an image and saved as ``zero_shot_<set>.png`` in the run's folder.

    Args:
        sets: sets by name.
        suite: further sets, from one or several suite files of ``lit-clip evaluate``.
        data_root: folder that the suite's paths are relative to. Sets that are not there are skipped with a warning.
        only: names of the suite's sets to evaluate; None: all.
        every_n_epochs: see :class:`callbacks.periodic.PeriodicEvaluation`.
        every_n_steps: see :class:`callbacks.periodic.PeriodicEvaluation`.
        batch_size: images encoded at once on each rank.
        num_workers: data workers of each rank; None: a share of the cores, and none for a small set.
        examples: number of images to show of each set, evenly spread over it.
        on_error: for an image that cannot be read, stop with an error or skip it with a warning.
    """

    def __init__(
        self,
        sets: dict[str, ZeroShotSet] | None = None,
        suite: str | list[str] | None = None,
        data_root: str = ".",
        only: list[str] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
        examples: int = 24,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps)
        require(examples >= 0, f"ZeroShot.examples: {examples} must be at least 0")
        self.sets, self.data_root, self.examples = sets or {}, data_root, examples
        self.entries = chosen_entries(suite, only, ["zero_shot"], "ZeroShot")
        for name in self.sets:
            check_name(name, "ZeroShot.sets")
            require(name not in self.entries, f"ZeroShot.sets: {name!r} is in the suite too; rename one")
        self._reader = SetEncoder(batch_size, num_workers, on_error, "ZeroShot")
        self._opened: dict[str, _OpenedSet] | None = None
        self._classifiers: dict[str, Tensor] = {}
        self._text_weights = ""  # hash of the text tower that made the classifiers

    @property
    def state_key(self) -> str:
        return self._generate_state_key(sets=sorted([*self.sets, *self.entries]))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._reader.processes = trainer.num_devices
        if self._opened is None:
            self._opened = {name: _from_argument(zero_shot_set) for name, zero_shot_set in self.sets.items()}
            for name, folds in open_sets(self.entries, ["test"], self.data_root, "ZeroShot").items():
                with named(name):
                    opened = _from_suite(self.entries[name], [fold["test"] for fold in folds])
                    check_folds(folds, opened.metric, len(opened.prompts.names), self._reader.on_error)
                    self._opened[name] = opened

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> PeriodicResult:
        folder = run_folder(trainer)  # every rank must ask
        text_weights = text_sha256(module.model)
        if distributed.maximum(int(text_weights != self._text_weights)):
            self._classifiers, self._text_weights = {}, text_weights
        result = PeriodicResult()
        for name, opened in (self._opened or {}).items():
            if name not in self._classifiers:
                self._classifiers[name] = text_classifier(module.model, opened.prompts).cpu()
            scores = self._scores(module, name, opened)
            scale = float(module.model.logit_scale.detach().exp())
            with named(name):
                of_set = from_first_rank(partial(_metrics, opened, scores, scale))
            result.metrics |= {f"zero_shot/{name}/{metric}": value for metric, value in of_set.metrics.items()}
            result.baselines |= {f"zero_shot/{name}/{metric}": value for metric, value in of_set.baselines.items()}
            if self.examples and trainer.is_global_zero:
                self._show(trainer, module, name, folder, scores[0])
        return result

    def _scores(self, module: LitCLIP, name: str, opened: _OpenedSet) -> list[Encoded]:
        """Return the cosine similarities ``[N, C]`` of every fold; folds with the same images are encoded once."""
        encoded_by_stamp: dict[str, Encoded] = {}
        results = []
        for number, images in enumerate(opened.folds):
            stamp = images.stamp() if len(opened.folds) > 1 else ""
            if stamp not in encoded_by_stamp:
                title = name if len(opened.folds) == 1 else f"{name} {number + 1}/{len(opened.folds)}"
                encoded = self._reader.encode(module.model, images, lambda x: module.model.encode_image(x, True), title)
                with torch.autocast("cpu", enabled=False):
                    scores = encoded.features @ self._classifiers[name]
                encoded_by_stamp[stamp] = Encoded(encoded.rows, scores)
            results.append(encoded_by_stamp[stamp])
        return results

    def _show(self, trainer: Trainer, module: LitCLIP, name: str, folder: Path | None, scores: Encoded) -> None:
        assert self._opened is not None
        sheet = _contact_sheet(module, self._opened[name], scores, self.examples)
        log_image(trainer, f"zero_shot/{name}", sheet)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / f"zero_shot_{name}.png")


def _from_argument(zero_shot_set: ZeroShotSet) -> _OpenedSet:
    images, templates = zero_shot_set.images, zero_shot_set.templates
    assert not isinstance(templates, str)  # ensured by __post_init__
    return _OpenedSet([images], prompts_of(None, templates, images.class_names))


def _from_suite(entry: SuiteEntry, folds: Sequence[object]) -> _OpenedSet:
    labelled = [fold for fold in folds if isinstance(fold, LabelledImages)]
    require(len(labelled) == len(folds), f"{type(folds[0]).__name__} has no classes, which zero-shot needs")
    return _OpenedSet(labelled, prompts_of_set(entry, labelled[0]), entry.metric)


def _metrics(opened: _OpenedSet, folds: Sequence[Encoded], scale: float) -> PeriodicResult:
    """Compute the metrics, averaged over folds, and the baselines in the first fold, with the model's ``scale``."""
    metric, classes = opened.metric, len(opened.prompts.names)
    targets = [Targets.of(images, scores.rows, classes) for images, scores in zip(opened.folds, folds, strict=True)]
    ranking = [comparable(metric, scale * scores.features) for scores in folds]
    values = [evaluate_scores(metric, scores, truth) for scores, truth in zip(ranking, targets, strict=True)]
    return PeriodicResult(mean_over_folds(values), baselines(metric, targets[0]))


def _contact_sheet(module: LitCLIP, opened: _OpenedSet, scores: Encoded, examples: int) -> Image.Image:
    """Draw some images of the first fold, evenly spread, with their most similar class names."""
    names, images, transform = opened.prompts.names, opened.folds[0], pixels(module.preprocessing)
    shown, labels = min(examples, len(scores.rows)), images.labels()
    predictions = []
    for number in [i * len(scores.rows) // shown for i in range(shown)]:
        row = scores.rows[number]
        frames = images.images(row)
        best = scores.features[number].topk(min(5, len(names)))
        nearest = [(names[i], s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        truth = names[labels[row]] if labels[row] >= 0 else ""
        predictions.append(Prediction(to_pil_image(as_image(transform(frames[len(frames) // 2]))), truth, nearest))
    return prediction_grid(predictions)
