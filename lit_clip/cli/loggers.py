"""Loggers of other packages, which need not be installed, and their errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lit_clip.errors import InputError

# Lightning's loggers of other packages, and the packages' modules.
MODULES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "NeptuneLogger": "neptune"}
LOGGER_TYPE = "lightning.pytorch.loggers.logger.Logger"


def check_loggers(loggers: Any) -> None:
    """Check that the packages of the loggers are installed.

    Args:
        loggers: ``trainer.logger`` of a configuration.

    Raises:
        InputError: one is not.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        class_path = str(logger.get("class_path")) if hasattr(logger, "get") else ""
        module = MODULES.get(class_path.rpartition(".")[2])
        found = find_spec(module) if module else None
        if module and (found is None or found.origin is None):  # no origin: a folder, as W&B makes
            package = module.replace("_", "-")
            raise InputError(f"trainer.logger: {package} is not installed; pip install {package}")


@contextmanager
def logger_errors() -> Iterator[None]:
    """Raise what a logger's constructor has raised as an error in one line; jsonargparse keeps only the text.

    Raises:
        InputError: a logger cannot be created.
    """
    try:
        yield
    except ValueError as error:
        types, _, errors = str(error).partition("Errors:\n")
        if LOGGER_TYPE not in types or isinstance(error, InputError):
            raise
        raise InputError(f"trainer.logger: {errors.splitlines()[0].strip(' -')}") from error
