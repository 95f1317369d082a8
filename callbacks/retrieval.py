"""Retrieval and caption choice during training, on sets of a suite."""

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.periodic import PeriodicEvaluation, PeriodicResult, from_first_rank
from callbacks.suite_sets import check_images, chosen_entries, named, open_sets
from lit_clip.errors import require
from lit_clip.evaluation.caption_choice import EncodedChoices, encode_choices, evaluate_choices
from lit_clip.evaluation.caption_texts import caption_texts
from lit_clip.evaluation.data import CaptionChoices, CaptionedImages, ImageSet
from lit_clip.evaluation.prompts import Prompts, text_classifier
from lit_clip.evaluation.set_encoding import Encoded, SetEncoder
from lit_clip.evaluation.suite import Metric, Task
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import evaluate_pairs
from lit_clip.tools.images import OnError

TASKS: tuple[Task, ...] = ("retrieval", "caption_choice")


class Retrieval(PeriodicEvaluation):
    """Evaluates the sets of a suite that have captions, such as COCO and SugarCrepe, under ``fit`` and ``validate``.

    Logs ``retrieval/<set>/<metric>`` and, for sets of right and wrong captions, ``caption_choice/<set>/<metric>``: the
    metrics of ``lit-clip evaluate``. Ranks divide the images and the captions; the first rank compares them while the
    others wait.

    Args:
        suite: one or several suite files of ``lit-clip evaluate``; sets of other tasks are left out.
        data_root: folder that the suite's paths are relative to. Sets that are not there are skipped with a warning.
        only: names of the suite's sets to evaluate; None: all.
        every_n_epochs: see :class:`callbacks.periodic.PeriodicEvaluation`.
        every_n_steps: see :class:`callbacks.periodic.PeriodicEvaluation`.
        batch_size: images encoded at once on each rank.
        num_workers: data workers of each rank; None: a share of the cores, and none for a small set.
        on_error: for an image that cannot be read, stop with an error or skip it with a warning.
    """

    def __init__(
        self,
        suite: str | list[str],
        data_root: str = ".",
        only: list[str] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps)
        self.data_root = data_root
        self.entries = chosen_entries(suite, only, TASKS, "Retrieval")
        require(bool(self.entries), f"Retrieval.suite: no set has the task {' or '.join(TASKS)}")
        self._reader = SetEncoder(batch_size, num_workers, on_error, "Retrieval")
        self._opened: dict[str, ImageSet] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(sets=sorted(self.entries))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._reader.processes = trainer.num_devices
        if self._opened is None:
            self._opened = {}
            for name, folds in open_sets(self.entries, ["test"], self.data_root, "Retrieval").items():
                self._opened[name] = folds[0]["test"]
                with named(name):
                    self._check(name, folds[0]["test"])

    def _check(self, name: str, images: ImageSet) -> None:
        """Raise :class:`InputError` for what would otherwise stop a run after its first epoch."""
        check_images(images, self._reader.on_error)
        entry, rows = self.entries[name], range(len(images))
        for task in self._tasks(name):
            kind = CaptionedImages if task == "retrieval" else CaptionChoices
            require(isinstance(images, kind), f"{type(images).__name__} has no captions for {task}")
            if isinstance(images, CaptionChoices):
                choices = encode_choices(images, rows, entry.templates, lambda p: torch.zeros(1, len(p.names)))
                evaluate_choices(entry.metric, np.zeros((len(images), 1)), choices)
            elif isinstance(images, CaptionedImages):
                caption_texts(images, rows, entry.templates)

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> PeriodicResult:
        result, model = PeriodicResult(), module.model
        for name, images in (self._opened or {}).items():
            encoded = self._reader.encode(model, images, lambda pixels: model.encode_image(pixels, True), name)
            for task in self._tasks(name):
                with named(name):
                    of_set = self._judge(module, name, task, images, encoded)
                prefix = f"{task}/{name}"
                result.metrics |= {f"{prefix}/{metric}": value for metric, value in of_set.metrics.items()}
                result.baselines |= {f"{prefix}/{metric}": value for metric, value in of_set.baselines.items()}
        return result

    def _tasks(self, name: str) -> list[Task]:
        return [task for task in TASKS if task in (self.entries[name].tasks or ())]

    def _judge(self, module: LitCLIP, name: str, task: Task, images: ImageSet, encoded: Encoded) -> PeriodicResult:
        entry = self.entries[name]

        def encode(prompts: Prompts) -> Tensor:
            return text_classifier(module.model, prompts).cpu()

        if isinstance(images, CaptionChoices) and task == "caption_choice":
            choices = encode_choices(images, encoded.rows, entry.templates, encode)
            return from_first_rank(lambda: _of_choices(entry.metric, encoded, choices))
        assert isinstance(images, CaptionedImages)
        prompts, pairs = caption_texts(images, encoded.rows, entry.templates)
        text_TD = encode(prompts).T.contiguous()
        return from_first_rank(lambda: PeriodicResult(*evaluate_pairs(encoded.features, text_TD, pairs)))


def _of_choices(metric: Metric, encoded: Encoded, choices: EncodedChoices) -> PeriodicResult:
    found = evaluate_choices(metric, encoded.features.numpy(), choices)
    return PeriodicResult(found["metrics"], {metric: found["baseline"]})
