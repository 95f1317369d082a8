"""A run's settings for TensorBoard's HParams page, which compares runs by settings and metrics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lit_clip.secrets import without_secrets
from lit_clip.training.lightning.strategies import leave_out_hp_metric

# Settings of the trainer that change what is learned.
OF_TRAINER = (
    *("max_epochs", "max_steps", "limit_train_batches", "overfit_batches", "precision", "devices", "num_nodes"),
    *("gradient_clip_val", "sync_batchnorm", "callbacks"),
)
# The page shows five settings and five metrics at first.
FIRST = ("model.optimizer.lr", "data.batch_size", "trainer.max_epochs", "model.architecture", "data.train")
FIRST_METRICS = ("val/loss", "val/image_to_text_recall@1", "val/text_to_image_recall@1")


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, Any], metrics: Iterable[str] | None = None) -> None:
    """Write a run's settings into the event files of its TensorBoard loggers.

    At the end of the run ``metrics`` names the curves whose last values are compared. Without that list, as of runs
    that were killed, the page offers all curves.
    """
    # Imports TensorFlow where that is installed.
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]  # generated
    from torch.utils.tensorboard.summary import hparams

    flat = flat_settings(settings)
    compared = [name for name in metrics or () if name.startswith(("val/", "zero_shot/", "linear_probe/"))]
    compared.sort(key=lambda name: (not name.endswith("/top1"), name))  # accuracies first
    ordered = dict.fromkeys([*(name for name in FIRST_METRICS if name in compared), *compared], 0.0)
    lists, beginning, end = hparams(flat, ordered)
    plugin = lists.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for setting in data.experiment.hparam_infos:
        setting.differs = setting.name in FIRST  # the page sorts these before the others
    plugin.content = data.SerializeToString()
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            leave_out_hp_metric(logger)
            writer: Any = logger.experiment._get_file_writer()
            for summary in (beginning,) if metrics is None else (lists, end):
                writer.add_summary(summary, 0)
            writer.flush()


def flat_settings(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return settings by dotted name: all of model and data, and the trainer's that affect training."""
    trainer = {name: settings.get("trainer", {}).get(name) for name in OF_TRAINER}
    callbacks = trainer.pop("callbacks") or []
    named = [_described(each) for each in (callbacks if isinstance(callbacks, list) else [callbacks])]
    chosen = {"seed_everything": settings.get("seed_everything"), "model": settings.get("model")}
    chosen |= {"data": settings.get("data"), "trainer": trainer | {"callbacks": ", ".join(sorted(named))}}
    return {name: without_secrets(value) if isinstance(value, str) else value for name, value in _flat(chosen)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    for key, value in values.items():
        name = f"{prefix}{key}" if key not in ("init_args", "class_path") else prefix.removesuffix(".")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield name, value if isinstance(value, bool | int | float) else str(value)


def _described(callback: Any) -> str:
    """Return a callback's class, with its settings unless the class is Lightning's."""
    path = callback["class_path"] if isinstance(callback, Mapping) else str(callback)
    given = callback.get("init_args") if isinstance(callback, Mapping) and not path.startswith("lightning.") else None
    settings = ", ".join(f"{name}={value}" for name, value in (given or {}).items() if value is not None)
    return path.rpartition(".")[2] + (f"({settings})" if settings else "")
