"""Preemption: after a signal to any rank, all ranks save a complete checkpoint and exit with a code."""

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_clip import distributed
from lit_clip.errors import require
from lit_clip.tools.atomic import release
from lit_clip.tools.processes import is_launched
from lit_clip.training.lightning.checkpoint_io import save_whole
from lit_clip.training.lightning.loop_counts import validate_after_step, validation_due
from lit_clip.training.lightning.run_folder import run_folder
from lit_clip.training.lightning.signals import Signals, replace_signals
from lit_clip.training.plan import resume_command


class Preemption(Callback):
    """Save a complete checkpoint and end the run when any rank gets SIGTERM or SIGUSR1.

    The signal handler only records the signal. Ranks exchange their signals in the collective that averages a step's
    metrics, just before the optimiser, and on GPUs read the result one step later, without a wait. Then they save and
    raise a ``SystemExit`` with code 128 + the signal's number (143 for SIGTERM, on Linux 138 for SIGUSR1), whose text
    the first rank has written on standard error: what was saved, and how to resume. A rank that Lightning started
    itself exits with 0; otherwise Lightning would kill its parent.

    A validation is stopped and its results are discarded; with a sharded model, whose ranks compute each batch
    together, it finishes first. A run that is resumed from a checkpoint written before a due validation had finished
    begins with that validation (unless ``max_steps`` was reached).

    The checkpoint is ``last.ckpt`` if a ``ModelCheckpoint`` keeps one, else ``preempted.ckpt`` in its folder. Under
    SLURM with ``auto_requeue``, the requeue signal (SIGUSR1) saves and requeues as Lightning documents it.
    """

    def __init__(self) -> None:
        self._first_step: int | None = None
        self._validation_due = False  # a validation was due after the last step and has not finished
        self._signals: Signals | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning registers its handlers after this hook and before any other, and has no option for different ones.
        self._signals = replace_signals(trainer)
        on_exception = any(getattr(callback, "save_on_exception", False) for callback in trainer.checkpoint_callbacks)
        require(
            not on_exception or trainer.world_size == 1,
            "ModelCheckpoint.save_on_exception: a rank that fails would wait for the others to save; remove it (a "
            "signal saves anyway), and set every_n_train_steps",
        )
        self._first_step = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["validation_due"] = self._validation_due

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._validation_due = checkpoint.get("validation_due", False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        if self._agreed():
            raise SIGTERMException
        if self._validation_due and trainer.enable_validation:
            validate_after_step(trainer)
        self._validation_due = False

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._validation_due = validation_due(trainer)
        signals = self._handlers
        exchanged = trainer.world_size > 1 and signals.read(trainer.strategy.root_device)
        if bool(signals.agreed) if exchanged else self._agreed():
            # Lightning raises SIGTERMException when the step is complete and logged, and checks for it nowhere before.
            signals.received_sigterm = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A signal of this step may not have been read yet, and a validation may take longer than the grace period.
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self._handlers.agreed or (fitting and self._agreed()):
            raise SIGTERMException

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        # Ranks may have different numbers of batches, so there is no collective here: a rank with a signal jumps to the
        # end of the validation and meets the others there.
        if self._handlers.received and type(trainer.strategy) in (DDPStrategy, SingleDeviceStrategy):
            raise StopIteration

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._agreed():
            raise SIGTERMException

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_due = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        signals = self._signals
        if isinstance(exception, SIGTERMException) and signals and signals.agreed:
            outcome = self._save(trainer, signals)
            exception.code = 0 if is_launched() else 128 + signals.agreed
            if trainer.is_global_zero:
                signals.outcome = f"{signal.Signals(signals.agreed).name}: {outcome}"
                exception.args = (signals.outcome,)
        else:
            release()  # Lightning calls no teardown hook after an error, and a notebook lives on

    @property
    def _handlers(self) -> Signals:
        assert self._signals is not None, "set by setup"
        return self._signals

    def _agreed(self) -> bool:
        self._handlers.agreed = distributed.maximum(self._handlers.received)
        return bool(self._handlers.agreed)

    def _save(self, trainer: Trainer, signals: Signals) -> str:
        """Save a checkpoint if possible, and return a sentence about the outcome."""
        if signals.agreed == signals.requeue_signal:
            signals.requeue()
            return f"saved step {trainer.global_step}; SLURM was asked to run the job again and resume from there"
        if trainer.global_step == self._first_step or self._first_step is None:
            return "ended before the first step, so there is nothing to save"
        path = _checkpoint_path(trainer)
        if path is None:
            return f"ended after step {trainer.global_step}; nothing saved, because no ModelCheckpoint is configured"
        save_whole(trainer, path)
        folder = run_folder(trainer)  # every rank must ask
        return f"saved step {trainer.global_step}; resume with: {resume_command(path, folder)}"


def _checkpoint_path(trainer: Trainer) -> Path | None:
    """Return the path of a ``ModelCheckpoint``'s last state, or a new path beside it; never another run's file."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    callback = next((saver for saver in savers if saver.save_last), savers[0] if savers else None)
    if callback is None or not callback.dirpath:
        return None
    name = callback.CHECKPOINT_NAME_LAST if callback.save_last else "preempted"
    first = Path(callback.last_model_path or Path(callback.dirpath, f"{name}{callback.FILE_EXTENSION}")).absolute()
    ours = {Path(path).absolute() for path in (callback.last_model_path, trainer.ckpt_path) if path}
    path, version = first, 1
    while path.exists() and path not in ours:
        path, version = first.with_stem(f"{first.stem}-v{version}"), version + 1
    path = trainer.strategy.broadcast(path)
    if callback.save_last:
        callback.last_model_path = str(path)
    return path
