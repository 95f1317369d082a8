"""Log images to every logger that can show them."""

from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor


def log_image(trainer: Trainer, tag: str, image: Image.Image) -> None:
    """Log an image as ``tag`` at the current step, on the first rank.

    TensorBoard, MLflow and loggers with W&B's ``log_image(key, images, step)`` get it; others, such as CSV, do not.
    """
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(image), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, image, key=tag, step=trainer.global_step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=trainer.global_step)


def shown_bands(images: Tensor) -> Tensor:
    """Return the first three bands of ``[..., C, H, W]``; if there are fewer, the first band three times."""
    return images[..., :3, :, :] if images.shape[-3] >= 3 else images[..., [0, 0, 0], :, :]
