"""Save the random number generators of every rank with a checkpoint, and restore them on resume."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_clip import distributed
from lit_clip.errors import require
from lit_clip.training.lightning.resume_checks import restoring


class RandomStates(Callback):
    """Save every rank's random states in checkpoints, so that a resumed run draws the same numbers.

    States are restored when training starts; callbacks behind this one must not draw numbers in ``on_train_start``.
    They are left as they are if the number of ranks has changed.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []  # one for each rank

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = distributed.gather_objects([random_states()])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("random_states", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank, world = distributed.rank_and_world()
        if len(self._saved) == world:
            with restoring(str(trainer.ckpt_path)):
                restore_random_states(self._saved[rank])
        self._saved = []


def random_states() -> dict[str, Any]:
    """Return the states of the generators of Python, numpy, torch and every GPU, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the states of :func:`random_states`; skip the GPUs if their number has changed."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, *rest = states["numpy"]
    require(
        0 <= position <= len(keys), f"random_states: numpy's position {position} must be within its {len(keys)} keys"
    )
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, *rest))  # which does not look, and crashes
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
