"""A callback that prints a run's progress for the program that reads its output."""

from typing import Any

from lightning.pytorch import Callback


class Marks(Callback):
    """Print ``mark epoch E``, ``mark step 1`` and ``mark trained E``, each on its own line."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        say(f"epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            say("step 1")
        if batch_idx + 1 == trainer.num_training_batches:
            say(f"trained {trainer.current_epoch}")


def say(what: str) -> None:
    print(f"\nmark {what}", flush=True)
