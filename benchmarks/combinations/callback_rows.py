"""Rows of Lightning's callbacks, loggers and profilers."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, callbacks, loggers, profilers

from benchmarks.combinations.checks import RESUMED, SAME, file, shows, stopped_at
from benchmarks.combinations.rows import (
    CALLBACKS,
    LOGGERS,
    callback,
    columns,
    csv_logger,
    option,
    refused,
    using,
    works,
)
from benchmarks.combinations.runs import Run


@shows("logs CPU statistics")
def logs_cpu(run: Run) -> None:
    assert "cpu_percent" in columns(run)


works(
    CALLBACKS,
    "DeviceStatsMonitor",
    SAME,
    RESUMED,
    trainer=lambda folder: {"callbacks": [callbacks.DeviceStatsMonitor(cpu_stats=True)], **csv_logger(folder)},
)


@shows("stops where the metric does not improve, also when resumed")
def stops_early(run: Run) -> None:
    assert run.trainer.global_step == 8
    assert run.resumed().trainer.global_step == 8


works(
    CALLBACKS,
    "EarlyStopping",
    stops_early,
    quick=[1],
    trainer=callback(lambda folder: callbacks.EarlyStopping("val/loss", min_delta=100, patience=1), max_epochs=10),
)
works(CALLBACKS, "LambdaCallback", SAME, RESUMED, trainer=using(callbacks.LambdaCallback))
works(CALLBACKS, "Callback", SAME, RESUMED, trainer=using(Callback))


@shows("logs the learning rate of each group")
def logs_rates(run: Run) -> None:
    assert "lr-" in columns(run)


works(
    CALLBACKS,
    "LearningRateMonitor",
    SAME,
    logs_rates,
    trainer=lambda folder: {"callbacks": [callbacks.LearningRateMonitor()], **csv_logger(folder)},
)
works(
    CALLBACKS,
    "ModelCheckpoint",
    SAME,
    RESUMED,
    file("last.ckpt"),
    trainer=callback(
        lambda folder: callbacks.ModelCheckpoint(folder, save_last=True, monitor="val/loss", save_top_k=2)
    ),
    covers=["Checkpoint"],
)
for name in ("ModelSummary", "RichModelSummary", "RichProgressBar", "TQDMProgressBar"):
    bar = name.endswith("Bar")
    works(
        CALLBACKS,
        name,
        SAME,
        trainer=callback(
            lambda folder, name=name: getattr(callbacks, name)(),
            **({"enable_progress_bar": True} if bar else {"enable_model_summary": True}),
        ),
    )


class Writer(callbacks.BasePredictionWriter):
    """Write each prediction's keys."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.keys: list[str] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, *_: Any) -> None:
        assert prediction["image"].shape == (len(prediction["keys"]), 16)
        self.keys += prediction["keys"]


@shows("writes each pair once")
def writes(run: Run) -> None:
    writer = next(each for each in run.trainer.callbacks if isinstance(each, Writer))
    run.trainer.predict(run.module, run.data, return_predictions=False)
    assert len(set(writer.keys)) == len(writer.keys) == 16 / run.trainer.world_size


works(CALLBACKS, "BasePredictionWriter", SAME, writes, trainer=using(Writer))
works(
    CALLBACKS,
    "ThroughputMonitor",
    SAME,
    RESUMED,
    trainer=lambda folder: {
        "callbacks": [callbacks.ThroughputMonitor(lambda batch: len(batch.images), window_size=2)],
        **csv_logger(folder),
    },
)
works(CALLBACKS, "Timer: 1 day", SAME, RESUMED, trainer=callback(lambda folder: callbacks.Timer("01:00:00:00")))
works(
    CALLBACKS,
    "Timer: no time left",
    stopped_at(0),
    trainer=callback(lambda folder: callbacks.Timer(datetime.timedelta(0))),
    covers=["Timer"],
)
works(
    CALLBACKS,
    "GradientAccumulationScheduler: 1",
    SAME,
    trainer=callback(lambda folder: callbacks.GradientAccumulationScheduler({0: 1})),
)
refused(
    CALLBACKS,
    "GradientAccumulationScheduler: 2",
    "adds no negatives",
    trainer=callback(lambda folder: callbacks.GradientAccumulationScheduler({1: 2})),
    covers=["GradientAccumulationScheduler"],
)
works(
    CALLBACKS,
    "OnExceptionCheckpoint",
    SAME,
    RESUMED,
    ranks=[1],
    trainer=callback(lambda folder: callbacks.OnExceptionCheckpoint(folder)),
)
refused(
    CALLBACKS,
    "OnExceptionCheckpoint",
    "would wait for the others",
    (2,),
    trainer=callback(lambda folder: callbacks.OnExceptionCheckpoint(folder)),
)


class Unfreeze(callbacks.BaseFinetuning):
    """Train the image encoder from the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.visual)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.visual, optimizer)


REFUSED: dict[str, tuple[Callable[[Path], Callback], str]] = {
    "StochasticWeightAveraging": (lambda folder: callbacks.StochasticWeightAveraging(1e-3), "use callbacks.EMA"),
    "WeightAveraging": (lambda folder: callbacks.WeightAveraging(), "use callbacks.EMA"),
    "EMAWeightAveraging": (lambda folder: callbacks.EMAWeightAveraging(), "use callbacks.EMA"),
    "LearningRateFinder": (lambda folder: callbacks.LearningRateFinder(), "set model.optimizer.lr"),
    "BatchSizeFinder": (lambda folder: callbacks.BatchSizeFinder(), "set model.micro_batch_size"),
    "BackboneFinetuning": (lambda folder: callbacks.BackboneFinetuning(), "set model.freeze"),
    "BaseFinetuning": (lambda folder: Unfreeze(), "set model.freeze"),
    "ModelPruning": (lambda folder: callbacks.ModelPruning("l1_unstructured", amount=0.5), "prune"),
    "SpikeDetection": (lambda folder: callbacks.SpikeDetection(), "use callbacks.NonFiniteSteps"),
}
for name, (make, line) in REFUSED.items():
    refused(CALLBACKS, name, line, trainer=callback(make))


# Loggers and profilers.

works(LOGGERS, "CSVLogger", SAME, RESUMED, file("metrics.csv"), trainer=csv_logger)
works(
    LOGGERS,
    "TensorBoardLogger",
    SAME,
    RESUMED,
    file("events.out.*"),
    trainer=lambda folder: {"logger": loggers.TensorBoardLogger(folder), "log_every_n_steps": 1},
)
works(
    LOGGERS,
    "TensorBoardLogger and CSVLogger",
    SAME,
    file("events.out.*"),
    file("metrics.csv"),
    trainer=lambda folder: {"logger": [loggers.TensorBoardLogger(folder), loggers.CSVLogger(folder)]},
    covers=["logger"],
)
for name in ("simple", "advanced", "pytorch"):
    works(LOGGERS, f"profiler: {name}", SAME, trainer=option(profiler=name), covers=["profiler"])
for name in ("SimpleProfiler", "AdvancedProfiler", "PyTorchProfiler", "PassThroughProfiler"):
    written = [] if name == "PassThroughProfiler" else [file("*profile*")]
    works(
        LOGGERS,
        name,
        SAME,
        *written,
        trainer=lambda folder, name=name: {
            "profiler": getattr(profilers, name)(folder, "profile")
            if name != "PassThroughProfiler"
            else profilers.PassThroughProfiler()
        },
    )
