"""Retrieval during training, on sets of a suite."""

from functools import partial

from lightning.pytorch import LightningModule, Trainer

from callbacks.periodic import PeriodicEvaluation, PeriodicResult, from_first_rank
from callbacks.suite_sets import chosen_entries, named, open_sets
from lit_clip.errors import require
from lit_clip.evaluation.data import CaptionedImages
from lit_clip.evaluation.prompts import text_classifier
from lit_clip.evaluation.retrieval import caption_texts, evaluate_pairs
from lit_clip.evaluation.set_encoding import SetEncoder
from lit_clip.module import LitCLIP
from lit_clip.tools.images import OnError


class Retrieval(PeriodicEvaluation):
    """Evaluates the retrieval sets of a suite, such as Flickr30k and COCO, under ``fit``, ``validate`` and ``test``.

    Logs ``retrieval/<set>/<metric>``, the metrics of ``lit-clip evaluate``. Ranks divide the images and the captions;
    the first rank compares them while the others wait.

    Args:
        suite: one or several suite files of ``lit-clip evaluate``; sets of other tasks are left out.
        data_root: folder that the suite's paths are relative to. Sets that are not there are skipped with a warning.
        only: names of the suite's sets to evaluate; None: all.
        every_n_epochs: see :class:`callbacks.periodic.PeriodicEvaluation`.
        every_n_steps: see :class:`callbacks.periodic.PeriodicEvaluation`.
        batch_size: images encoded at once on each rank.
        num_workers: data workers of each rank.
        on_error: for an image that cannot be read, stop with an error or skip it with a warning.

    Raises:
        InputError: no set of the suite has the task, or a set has no captions.
    """

    def __init__(
        self,
        suite: str | list[str],
        data_root: str = ".",
        only: list[str] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps)
        self.data_root = data_root
        self.entries = chosen_entries(suite, only, "retrieval", "Retrieval")
        require(bool(self.entries), "Retrieval.suite: no set has the task retrieval")
        self._reader = SetEncoder(batch_size, num_workers, on_error, "Retrieval")
        self._opened: dict[str, CaptionedImages] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(sets=sorted(self.entries))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._opened is None:
            self._opened = {}
            for name, folds in open_sets(self.entries, ["test"], self.data_root, "Retrieval").items():
                images = folds[0]["test"]
                with named(name):
                    require(isinstance(images, CaptionedImages), f"{type(images).__name__} has no captions")
                    assert isinstance(images, CaptionedImages)
                    self._opened[name] = images

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> PeriodicResult:
        result, model = PeriodicResult(), module.model
        for name, images in (self._opened or {}).items():
            encoded = self._reader.encode(model, images, lambda pixels: model.encode_image(pixels, True), name)
            prompts, pairs = caption_texts(images, encoded.rows, self.entries[name].templates)
            text_TD = text_classifier(model, prompts).T.cpu().contiguous()
            of_set = from_first_rank(partial(evaluate_pairs, encoded.features, text_TD, pairs))
            result.metrics |= {f"retrieval/{name}/{metric}": value for metric, value in of_set.metrics.items()}
            result.baselines |= {f"retrieval/{name}/{metric}": value for metric, value in of_set.baselines.items()}
        return result
