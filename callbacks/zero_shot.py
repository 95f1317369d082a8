"""Zero-shot classification after every validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import to_pil_image

from callbacks.figures import Prediction, prediction_grid
from callbacks.tensorboard import show
from lit_clip import collectives
from lit_clip.errors import require
from lit_clip.module import LitCLIP
from lit_clip.preemption import shield_worker
from lit_clip.preprocess import pixels
from lit_clip.zero_shot import (
    LabelledImages,
    LabelledPixels,
    ZeroShotSet,
    accuracies,
    classification_counts,
    collate_labelled,
    guessing_accuracies,
    zero_shot_classifier,
)


class ZeroShot(Callback):
    """Evaluates any number of sets at the end of every validation, under ``fit`` and ``validate`` alike.

    Logs ``zero_shot/<set>/top1``, ``top5`` and ``mean_per_class``, each a fraction over every image counted once,
    whatever the number of ranks, which divide the prompts and the images; ``ModelCheckpoint`` can monitor them. Shows
    some images with their nearest names in TensorBoard and as ``zero_shot_<set>.png`` beside the logs.

    Args:
        sets: by name.
        batch_size: images encoded at once on each rank.
        num_workers: processes that read images.
        examples: how many images to show of each set, evenly spread over it.
    """

    needs_whole_weights = True  # it encodes pictures outside of the steps for which FSDP puts the weights together

    def __init__(
        self, sets: dict[str, ZeroShotSet], batch_size: int = 256, num_workers: int = 0, examples: int = 24
    ) -> None:
        require(batch_size >= 1, f"ZeroShot.batch_size: {batch_size} must be at least 1")
        require(num_workers >= 0, f"ZeroShot.num_workers: {num_workers} must be at least 0")
        require(examples >= 0, f"ZeroShot.examples: {examples} must be at least 0")
        for name in sets:
            require("/" not in name, f"ZeroShot.sets: {name!r} is part of metric and file names; leave out the slash")
        self.sets, self.batch_size, self.num_workers, self.examples = sets, batch_size, num_workers, examples

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluate(trainer, cast(LitCLIP, pl_module))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, cast(LitCLIP, pl_module))

    def _evaluate(self, trainer: Trainer, module: LitCLIP) -> None:
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        with trainer.precision_plugin.forward_context():
            for name, zero_shot_set in self.sets.items():
                images = zero_shot_set.images
                classifier = _classifier(module, images.class_names, zero_shot_set.templates)
                counts = self._counts(module, images, classifier)
                guessing = guessing_accuracies(counts)
                for metric, value in accuracies(counts).items():
                    key = f"zero_shot/{name}/{metric}"
                    module.log(key, value)
                    module.baselines[key] = guessing[metric]
                if self.examples and trainer.is_global_zero:
                    sheet = self._contact_sheet(module, images, classifier)
                    show(trainer, f"zero_shot/{name}", sheet)
                    if log_dir:
                        Path(log_dir).mkdir(parents=True, exist_ok=True)
                        sheet.save(Path(log_dir) / f"zero_shot_{name}.png")

    def _counts(self, module: LitCLIP, images: LabelledImages, classifier: Tensor) -> Tensor:
        rank, world = collectives.rank_and_world()
        loader = DataLoader(
            Subset(LabelledPixels(images, pixels(module.preprocessing)), range(rank, len(images), world)),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            collate_fn=collate_labelled,
        )
        counts = torch.zeros(3, classifier.shape[1], dtype=torch.float64)
        for batch in loader:
            counts += classification_counts(_logits(module, batch.images, classifier), batch.labels)
        return collectives.sum_over_ranks(counts, module.device)

    def _contact_sheet(self, module: LitCLIP, images: LabelledImages, classifier: Tensor) -> Image.Image:
        shown = min(self.examples, len(images))
        dataset = LabelledPixels(images, pixels(module.preprocessing))
        batch = collate_labelled([dataset[i * len(images) // shown] for i in range(shown)])
        scores, nearest = _logits(module, batch.images, classifier).topk(min(5, classifier.shape[1]), dim=1)
        names: Sequence[str] = images.class_names
        return prediction_grid(
            [
                Prediction(
                    to_pil_image(image), names[int(label)], [(names[i], s) for i, s in zip(ids, row, strict=True)]
                )
                for image, label, ids, row in zip(
                    batch.images, batch.labels, nearest.tolist(), scores.tolist(), strict=True
                )
            ]
        )


def _classifier(module: LitCLIP, class_names: list[str], templates: Sequence[str]) -> Tensor:
    """The classifier ``[D, C]`` of all classes; each rank encodes the prompts of its share of them."""
    mine = class_names[collectives.share(len(class_names))]
    weights_CD = torch.zeros(0, module.model.config.embed_dim, device=module.device)
    if mine:
        weights_CD = zero_shot_classifier(module.model, mine, templates).T.contiguous()
    return collectives.gather_uneven(weights_CD).T


def _logits(module: LitCLIP, images: Tensor, classifier: Tensor) -> Tensor:
    """uint8 ``[B, 3, S, S]`` -> cosine similarities ``[B, C]``."""
    features = module.model.encode_image(module.model.normalize(images.to(module.device)), normalize=True)
    with torch.autocast(module.device.type, enabled=False):
        return features @ classifier
