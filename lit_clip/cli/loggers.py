"""Loggers from other packages, which may not be installed, and their errors."""

import os
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from lit_clip.errors import InputError
from lit_clip.secrets import plain_without_secrets

# Lightning's loggers of other packages, and the packages' modules.
MODULES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "NeptuneLogger": "neptune"}
PATIENCE, TRIALS = 8.0, 2  # seconds for a server to answer, and how often it is asked
LOGGER_TYPE = "lightning.pytorch.loggers.logger.Logger"


def check_loggers(loggers: Any) -> None:
    """Check that the packages of the loggers are installed."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        class_path = str(logger.get("class_path")) if hasattr(logger, "get") else ""
        module = MODULES.get(class_path.rpartition(".")[2])
        found = find_spec(module) if module else None
        if module and (found is None or found.origin is None):  # no origin: a folder, as W&B makes
            package = module.replace("_", "-")
            raise InputError(f"trainer.logger: {package} is not installed; pip install {package}")
        if module == "mlflow":
            address = logger.init_args.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI", "")
            check_answers(str(address))


def check_answers(address: str) -> None:
    """Check that a server answers at MLflow's address; MLflow's client would retry for minutes."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    for trial in reversed(range(TRIALS)):
        try:
            urlopen(server, timeout=PATIENCE).close()  # noqa: S310  # of http or https
            return
        except (HTTPError, HTTPException, ValueError):  # an answer, or what MLflow's own client has to judge
            return
        except OSError as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLError):  # somebody is there
                return
            if not trial:
                raise InputError(
                    f"trainer.logger: {address} does not answer ({cause}); start the MLflow server or correct "
                    "tracking_uri"
                ) from error
            time.sleep(1)


@contextmanager
def logger_errors() -> Iterator[None]:
    """Raise an error of a logger's constructor as one line; jsonargparse keeps only its text."""
    try:
        yield
    except ValueError as error:
        types, _, errors = str(error).partition("Errors:\n")
        if LOGGER_TYPE not in types or isinstance(error, InputError):
            raise
        raise InputError(f"trainer.logger: {errors.splitlines()[0].strip(' -')}") from error


def log_no_secrets(loggers: Iterable[Any]) -> None:
    """Make loggers write ``***`` instead of secrets in hyper-parameters."""
    for logger in loggers:
        logger.log_hyperparams = partial(_log_no_secrets, logger.log_hyperparams)


def _log_no_secrets(log: Callable[..., Any], params: Any, *others: Any, **options: Any) -> Any:
    return log(plain_without_secrets(params if isinstance(params, Mapping) else vars(params)), *others, **options)
