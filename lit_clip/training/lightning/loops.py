"""State of Lightning's loops and connectors that has no public name."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger


def validation_due(trainer: Trainer) -> bool:
    """Return whether the training loop validates after the step that has just ended."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validate_after_step(trainer: Trainer) -> None:
    """Validate as the training loop does after a step, and log at that step."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.val_loop.restarting = False
    trainer.validating = True
    first_iteration = trainer._logger_connector._first_loop_iter
    loop.val_loop.run()
    loop.val_loop._has_run = False  # otherwise the training loop takes the current epoch for a finished one
    trainer._logger_connector._first_loop_iter = first_iteration
    trainer.training = True


def divides_samples(trainer: Trainer) -> bool:
    """Return whether Lightning would divide a loader's samples among ranks once more."""
    return trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler


def leave_out_hp_metric(logger: TensorBoardLogger) -> None:
    """Have a logger write no list of metrics by itself, which would hold ``hp_metric`` alone."""
    logger._default_hp_metric = False


def mlflow_address(logger: MLFlowLogger) -> str:
    """Return the address of the store that a logger writes to."""
    return str(logger._tracking_uri)
