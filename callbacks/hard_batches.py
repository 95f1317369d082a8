"""Hard batches: the model encodes the training images, and each batch is filled with nearest neighbours."""

from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_clip.distributed import gather_objects, rank_and_world
from lit_clip.embedding.index import nearest_others
from lit_clip.embedding.reading import encoded_batches, in_batches
from lit_clip.errors import require
from lit_clip.models.running import evaluation_mode
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.fsdp import whole_weights

NEAREST = 32  # neighbours of an image


class HardBatches(Callback):
    """Encode the training images with the current model every few epochs; ``data.batches.hard`` then uses neighbours.

    An epoch's order is fixed when it begins, so neighbours change between epochs only. Checkpoints hold them, 128 bytes
    for each image, so that a resumed run continues with the same batches. For frozen image encoders give
    ``data.batches.features`` instead, which need to be computed only once.

    Args:
        every_n_epochs: how often the images are encoded anew; the first time before the first step.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        require(every_n_epochs >= 1, f"HardBatches.every_n_epochs: {every_n_epochs} must be at least 1")
        self.every_n_epochs = every_n_epochs
        self._epoch = -1  # that the neighbours were found before
        self._images, self._nearest = np.zeros(0, np.int32), np.zeros((0, 0), np.int32)

    def state_dict(self) -> dict[str, Any]:
        arrays = {"images": self._images, "nearest": self._nearest}
        return {"epoch": self._epoch, **{name: torch.from_numpy(array) for name, array in arrays.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch = int(state_dict["epoch"])
        self._images, self._nearest = (state_dict[name].cpu().numpy() for name in ("images", "nearest"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = cast(Any, trainer).datamodule
        batches = getattr(data, "batches", None)
        wanted = batches is not None and batches.hard > 0 and batches.features is None
        require(
            wanted, "HardBatches: set data.batches.hard to a share such as 0.5, and leave data.batches.features out"
        )
        stored = any(type(each).__name__ == "FrozenFeatures" for each in cast(Any, trainer).callbacks)
        require(not stored, "HardBatches: not together with FrozenFeatures; set data.batches.features instead")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = cast(Any, trainer).datamodule
        epoch = data.position.epoch
        has_ended = epoch == trainer.max_epochs and self._epoch >= 0
        if self._epoch != epoch - epoch % self.every_n_epochs and not has_ended:
            self._find(trainer, cast(LitCLIP, pl_module), epoch)
        data.use_neighbours(self._images, self._nearest)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        steps_done = 0 <= trainer.max_steps <= trainer.global_step
        ends = trainer.should_stop or steps_done or epoch == trainer.max_epochs
        if epoch % self.every_n_epochs == 0 and not ends:
            self._find(trainer, cast(LitCLIP, pl_module), epoch)
            cast(Any, trainer).datamodule.use_neighbours(self._images, self._nearest)

    def _find(self, trainer: Trainer, module: LitCLIP, epoch: int) -> None:
        """Encode the images on all ranks; the batches are the same for any number of ranks."""
        data, (rank, world) = cast(Any, trainer).datamodule, rank_and_world()
        images, found = data.neighbour_images(), []
        settings = data.evaluation_batch_size, data.num_workers
        batches = in_batches(range(len(images)), data.evaluation_batch_size)[rank::world]
        title = None if rank else "encoding images for hard batches"
        with evaluation_mode(module), whole_weights(module), trainer.precision_plugin.forward_context():
            for batch, features in encoded_batches(module.model, images, *settings, batches=batches, title=title):
                found += zip(batch.rows, features.cpu().numpy(), strict=True)
        every = sorted(gather_objects(found), key=lambda each: each[0])
        require(len(every) > 1, "HardBatches: fewer than two training images can be read")
        self._images = np.array([image for image, _ in every], dtype=np.int32)
        self._nearest = nearest_others(np.stack([feature for _, feature in every]), NEAREST)
        self._epoch = epoch - epoch % self.every_n_epochs
