"""What a run reached and where its files are, printed when training ends."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_clip.training.lightning.run_folder import curves, run_folder
from lit_clip.training.summary import print_next_steps, print_summary


class PrintResults(Callback):
    """Print a run's last metrics, beside baselines and first values, and its files; warn of steps that none holds."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if trainer.is_global_zero:
            print_summary(trainer.callback_metrics, module.baselines, module.before)
        saver = trainer.checkpoint_callback
        last = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")
        folder = run_folder(trainer)  # every rank must ask
        _warn_of_unsaved_steps(trainer)
        if last and trainer.is_global_zero:
            print_next_steps(Path(last), folder, curves(trainer.loggers, trainer.ckpt_path), _best(trainer))


def _best(trainer: Trainer) -> dict[str, Path]:
    """Return the best checkpoint by each metric, with its value, that a ``ModelCheckpoint`` watches."""
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    found = [each for each in savers if each.monitor and each.best_model_path]
    # After a resume a best checkpoint of the run before has no score.
    scores = ["" if each.best_model_score is None else f" ({float(each.best_model_score):.4g})" for each in found]
    return {f"{each.monitor}{score}": Path(each.best_model_path) for each, score in zip(found, scores, strict=True)}


def _warn_of_unsaved_steps(trainer: Trainer) -> None:
    """Warn of last steps that no checkpoint holds: Lightning saves after a validation, and none may be due then."""
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    if not savers or any(each.monitor or not each.save_top_k for each in savers):  # the best are wanted, or none
        return
    saved, done = max(each._last_global_step_saved for each in savers), trainer.global_step
    if saved < done and (saved or not trainer.ckpt_path):  # otherwise the steps before are in that checkpoint
        rank_zero_warn(
            f"ModelCheckpoint: no checkpoint holds the last {done - saved} of {done} steps; set "
            "its every_n_train_steps, or validate at the end of the run"
        )
