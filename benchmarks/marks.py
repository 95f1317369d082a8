"""A callback that prints a run's progress for the program that reads its output."""

from typing import Any

from lightning.pytorch import Callback


class Marks(Callback):
    """Print ``mark epoch E``, ``mark step 1``, ``mark trained E`` and losses, each on its own line.

    ``mark train loss L`` is the mean of an epoch's steps, ``mark val loss L`` that of the validation after it.
    """

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.losses: list[float] = []
        say(f"epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == 1:
            say("step 1")
        if batch_idx + 1 == trainer.num_training_batches:
            say(f"trained {trainer.current_epoch}")
            say(f"train loss {sum(self.losses) / len(self.losses)}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        say(f"val loss {float(trainer.callback_metrics['val/loss'])}")


def say(what: str) -> None:
    print(f"\nmark {what}", flush=True)
