"""Zero-shot classification during training."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from lit_clip import distributed
from lit_clip.errors import require
from lit_clip.evaluation.classification import nearest_classes
from lit_clip.evaluation.data import LabelledImages
from lit_clip.evaluation.open_set import Fold, OpenSet
from lit_clip.evaluation.prompts import Prompts
from lit_clip.evaluation.suite import SuiteEntry, check_name
from lit_clip.evaluation.zero_shot import ZeroShotSet
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import text_sha256
from lit_clip.models.patches import as_image
from lit_clip.models.preprocess import pixels
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import Evaluation
from .log_image import Prediction, log_image, prediction_grid, shown_bands
from .suite_evaluation import SuiteEvaluation

__all__ = ["ZeroShot", "ZeroShotSet"]


class ZeroShot(SuiteEvaluation):
    """Evaluate zero-shot classification on any number of sets, under ``fit``, ``validate`` and ``test``.

    Logs ``zero_shot/<set>/<metric>``: the set's own metric and, if each image has one class, ``top1``, ``top5`` and
    ``mean_per_class``. They are fractions in which every image counts once. Prompts are encoded again only if the text
    tower has changed. Some images with their most similar class names are logged as an image and saved as
    ``zero_shot_<set>.png`` in the run's folder.

    Args:
        sets: sets by name.
        suite: further sets, from one or several suite files of ``lit-clip evaluate``.
        data_root: folder that the suite's paths are relative to.
        only: names of the suite's sets to evaluate; None: all.
        examples: number of images to show of each set, evenly spread over it.
        options: see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("zero_shot",)
    needs_suite = False

    def __init__(
        self,
        sets: dict[str, ZeroShotSet] | None = None,
        suite: str | list[str] | None = None,
        data_root: str = ".",
        only: list[str] | None = None,
        *,
        examples: int = 24,
        **options: Any,
    ) -> None:
        super().__init__(suite, data_root, only, **options)
        require(examples >= 0, f"ZeroShot.examples: {examples} must be at least 0")
        self.sets, self.examples = sets or {}, examples
        own: dict[str, SuiteEntry] = {}
        for name, each in self.sets.items():
            check_name(name, "ZeroShot.sets")
            require(
                isinstance(each, ZeroShotSet),
                f"ZeroShot.sets: {name!r} is a {type(each).__name__}; give a lit_clip.callbacks.ZeroShotSet(images, "
                "templates), or name the set in a suite file",
            )
            require(name not in self.entries, f"ZeroShot.sets: {name!r} is in the suite too; rename one")
            own[name] = SuiteEntry({"class_path": type(each.images).__name__}, templates=list(each.templates))
        self.entries = own | self.entries
        self._classifiers: dict[str, Tensor] = {}
        self._text_weights = ""  # hash of the text tower that made the classifiers

    def _open(self, name: str, entry: SuiteEntry) -> list[Fold]:
        if name in self.sets:
            return [Fold({"test": self.sets[name].images})]
        return super()._open(name, entry)

    def classifier(self, model: CLIP, prompts: Prompts) -> Tensor:
        if prompts.sha256 not in self._classifiers:
            self._classifiers[prompts.sha256] = super().classifier(model, prompts)
        return self._classifiers[prompts.sha256]

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> Evaluation:
        text_weights = text_sha256(module.model)
        if distributed.maximum(int(text_weights != self._text_weights)):
            self._classifiers, self._text_weights = {}, text_weights
        return super().evaluate(trainer, module)

    def show(self, trainer: Trainer, module: LitCLIP, opened: OpenSet) -> None:
        if not self.examples or not trainer.is_global_zero:
            return
        sheet = _contact_sheet(module, opened, self.examples)
        log_image(trainer, f"zero_shot/{opened.name}", sheet)
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            sheet.save(self._folder / f"zero_shot_{opened.name}.png")


def _contact_sheet(module: LitCLIP, opened: OpenSet, examples: int) -> Image.Image:
    """Draw evenly spread images with their most similar class names."""
    images, features = opened.folds[0].images["test"], opened.folds[0].features["test"]
    assert opened.prompts is not None
    assert opened.classifier is not None
    assert isinstance(images, LabelledImages)
    names, labels, transform = opened.prompts.names, images.labels(), pixels(module.preprocessing)
    shown, predictions = min(examples, len(features.rows)), []
    for number in [i * len(features.rows) // shown for i in range(shown)]:
        row = features.rows[number]
        frames = images.images(row)
        nearest = nearest_classes(names, torch.from_numpy(features.after[number]) @ opened.classifier)
        truth = names[labels[row]] if labels[row] >= 0 else ""
        image = shown_bands(as_image(transform(frames[len(frames) // 2])))
        predictions.append(Prediction(to_pil_image(image), truth, nearest))
    return prediction_grid(predictions)
