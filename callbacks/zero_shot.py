"""Zero-shot classification beside validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from callbacks.figures import Prediction, prediction_grid
from callbacks.periodic import PeriodicEvaluation, PeriodicResult, of_first_rank
from callbacks.suite_sets import check_folds, chosen_entries, named, open_sets
from callbacks.tensorboard import show
from lit_clip import distributed
from lit_clip.errors import require
from lit_clip.evaluation.data import LabelledImages
from lit_clip.evaluation.prompts import Prompts, prompts_of, text_classifier
from lit_clip.evaluation.scores import baselines, evaluate_scores, mean_over_folds
from lit_clip.evaluation.set_encoding import Encoded, SetEncoder
from lit_clip.evaluation.suite import Metric, SuiteEntry, check_name
from lit_clip.evaluation.targets import Targets
from lit_clip.evaluation.zero_shot import ZeroShotSet
from lit_clip.models.preprocess import pixels
from lit_clip.module import LitCLIP
from lit_clip.tools.images import OnError
from lit_clip.weights.fingerprint import text_sha256

__all__ = ["ZeroShot", "ZeroShotSet"]


@dataclass
class _Set:
    """A set as it is evaluated.

    Attributes:
        folds: its images; results of several folds are averaged.
        prompts: of its classes.
        metric: what it is judged by.
    """

    folds: list[LabelledImages]
    prompts: Prompts
    metric: Metric = "top1"


class ZeroShot(PeriodicEvaluation):
    """Recognises the classes of any number of sets from their names, under ``fit`` and ``validate`` alike.

    Logs ``zero_shot/<set>/<metric>``: the set's own metric and, where each image has one class, ``top1``, ``top5``
    and ``mean_per_class``; fractions over every image counted once, whatever the number of ranks, which divide the
    prompts and the images. Texts are encoded again only when the text tower has changed. Shows some images with
    their nearest names in TensorBoard and as ``zero_shot_<set>.png`` beside the logs.

    Args:
        sets: by name.
        suite: the entries of a suite besides, as ``lit-clip evaluate`` takes them: one YAML file or several.
        data_root: the folder that a suite's sets are below. Those that are not are left out, with a warning.
        only: these sets of the suite.
        every_n_epochs: see :class:`callbacks.periodic.PeriodicEvaluation`.
        every_n_steps: likewise.
        batch_size: images encoded at once on each rank.
        num_workers: processes that read images.
        examples: how many images to show of each set, evenly spread over it.
        on_error: what an image that cannot be read does: error ends the run, skip leaves it out with a warning.
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
        num_workers: int = 0,
        examples: int = 24,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps)
        require(examples >= 0, f"ZeroShot.examples: {examples} must be at least 0")
        self.sets, self.data_root, self.examples = sets or {}, data_root, examples
        self.entries = chosen_entries(suite, only, "zero_shot", "ZeroShot")
        for name in self.sets:
            check_name(name, "ZeroShot.sets")
            require(name not in self.entries, f"ZeroShot.sets: {name!r} is in the suite too; call one otherwise")
        self._reader = SetEncoder(batch_size, num_workers, on_error, "ZeroShot")
        self._opened: dict[str, _Set] | None = None
        self._classifiers: dict[str, Tensor] = {}
        self._texts = ""  # hash of the text tower that they are of

    @property
    def state_key(self) -> str:
        return self._generate_state_key(sets=sorted([*self.sets, *self.entries]))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._opened is None:
            self._opened = {name: _given(one) for name, one in self.sets.items()}
            for name, folds in open_sets(self.entries, ["test"], self.data_root, "ZeroShot").items():
                with named(name):
                    one = self._opened[name] = _of_suite(self.entries[name], [fold["test"] for fold in folds])
                    check_folds(folds, one.metric, len(one.prompts.names), self._reader.on_error)

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> PeriodicResult:
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        texts = text_sha256(module.model)
        if distributed.maximum(int(texts != self._texts)):
            self._classifiers, self._texts = {}, texts
        found = PeriodicResult()
        for name, one in (self._opened or {}).items():
            if name not in self._classifiers:
                self._classifiers[name] = text_classifier(module.model, one.prompts).cpu()
            scores = self._scores(module, name, one)
            with named(name):
                of_set = of_first_rank(partial(_judge, one, scores))
            found.metrics |= {f"zero_shot/{name}/{metric}": value for metric, value in of_set.metrics.items()}
            found.baselines |= {f"zero_shot/{name}/{metric}": value for metric, value in of_set.baselines.items()}
            if self.examples and trainer.is_global_zero:
                self._show(trainer, module, name, log_dir, scores[0])
        return found

    def _scores(self, module: LitCLIP, name: str, one: _Set) -> list[Encoded]:
        """Cosine similarities ``[N, C]`` of every fold; folds with the same images are encoded once."""
        known: dict[str, Encoded] = {}
        results = []
        for number, images in enumerate(one.folds):
            stamp = images.stamp() if len(one.folds) > 1 else ""
            if stamp not in known:
                title = name if len(one.folds) == 1 else f"{name} {number + 1}/{len(one.folds)}"
                encoded = self._reader.encode(module.model, images, lambda x: module.model.encode_image(x, True), title)
                with torch.autocast("cpu", enabled=False):
                    known[stamp] = Encoded(encoded.rows, encoded.features @ self._classifiers[name])
            results.append(known[stamp])
        return results

    def _show(self, trainer: Trainer, module: LitCLIP, name: str, log_dir: str | None, scores: Encoded) -> None:
        assert self._opened is not None
        sheet = _contact_sheet(module, self._opened[name], scores, self.examples)
        show(trainer, f"zero_shot/{name}", sheet)
        if log_dir:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            sheet.save(Path(log_dir) / f"zero_shot_{name}.png")


def _given(one: ZeroShotSet) -> _Set:
    assert not isinstance(one.templates, str)  # __post_init__ has seen to it
    return _Set([one.images], prompts_of(None, one.templates, one.images.class_names))


def _of_suite(entry: SuiteEntry, folds: Sequence[object]) -> _Set:
    labelled = [fold for fold in folds if isinstance(fold, LabelledImages)]
    require(len(labelled) == len(folds), f"{type(folds[0]).__name__} has no classes, which zero-shot needs")
    templates = entry.templates or getattr(labelled[0], "templates", None)
    return _Set(labelled, prompts_of(entry.class_names, templates, labelled[0].class_names), entry.metric)


def _judge(one: _Set, folds: Sequence[Encoded]) -> PeriodicResult:
    """Metrics, the means over folds, and the baseline in the first."""
    targets = [
        Targets.of(images, scores.rows, len(one.prompts.names)) for images, scores in zip(one.folds, folds, strict=True)
    ]
    found = [evaluate_scores(one.metric, fold.features, known) for fold, known in zip(folds, targets, strict=True)]
    return PeriodicResult(mean_over_folds(found), baselines(one.metric, targets[0]))


def _contact_sheet(module: LitCLIP, one: _Set, scores: Encoded, examples: int) -> Image.Image:
    """Some images of the first fold, evenly spread, with their nearest names."""
    names, images, transform = one.prompts.names, one.folds[0], pixels(module.preprocessing)
    shown, labels = min(examples, len(scores.rows)), images.labels()
    predictions = []
    for number in [i * len(scores.rows) // shown for i in range(shown)]:
        row = scores.rows[number]
        several = images.images(row)
        best = scores.features[number].topk(min(5, len(names)))
        nearest = [(names[i], s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        truth = names[labels[row]] if labels[row] >= 0 else ""
        predictions.append(Prediction(to_pil_image(transform(several[len(several) // 2])), truth, nearest))
    return prediction_grid(predictions)
