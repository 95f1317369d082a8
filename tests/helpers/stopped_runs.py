"""Runs that are stopped at any steps and resumed, beside the run that nothing stops; also one rank of two."""

import json
import os
import signal
import sys
import zlib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from callbacks import EMA, FrozenFeatures, HardBatches, TrainingMonitor, defaults
from datamodules import BatchOptions, Captions
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.checkpoint_io import WholeCheckpointIO, newest_checkpoint
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine

IMAGE = VisionTransformerConfig(image_size=8, patch_size=4, width=64, layers=1, heads=1)
CONFIG = CLIPConfig(8, IMAGE, TextTransformerConfig(context_length=16, width=8, layers=1, heads=1))
PAIRS, STEPS = 21, 5  # in the table, and in an epoch of 4 pairs a step: one pair is left out
TIMES = ("second", "hours", "time")  # in names of metrics that no two runs share


class Stop(NamedTuple):
    """Where a run ends before its end.

    Attributes:
        how: ``kill`` ends it by an error, ``save`` after it has saved a checkpoint there, ``term`` by SIGTERM.
        hook: ``step``, ``validation`` or ``epoch``: before a step, in a validation, at an epoch's end.
        step: optimiser steps before it; the first hook from there on.
    """

    how: str
    hook: str
    step: int


class Settings(NamedTuple):
    """Options of a run and of its resumed parts.

    Attributes:
        trainer: of Lightning's trainer.
        saver: of ``ModelCheckpoint``.
        part: ``ema``, ``hard batches``, ``stored features`` or nothing.
        micro_batch_size: of the module.
    """

    trainer: Mapping[str, Any] = {}
    saver: Mapping[str, Any] = {}
    part: str = ""
    micro_batch_size: int | None = None


class _Killed(Exception):  # noqa: N818  # no error of anything
    pass


class _Recorder(Callback):
    """Record each step's samples and rates, and the epochs of validations; stop the run where it is to be stopped."""

    def __init__(self, stop: Stop | None, folder: Path) -> None:
        self.stop, self.folder = stop, folder
        self.steps: dict[int, Any] = {}

    def _stop(self, hook: str, trainer: Trainer) -> None:
        if self.stop is not None and self.stop.hook == hook and trainer.global_step >= self.stop.step:
            if self.stop.how == "save":
                trainer.save_checkpoint(self.folder / f"by_hand_{trainer.global_step}.ckpt")
            if self.stop.how != "term":
                raise _Killed
            self.stop = None
            if distributed.rank_and_world()[0] == 0:  # a signal to one rank ends all of them
                os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: CaptionBatch, batch_idx: int) -> None:
        self._stop("step", trainer)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        place = [trainer.current_epoch, batch_idx, *batch.keys]
        self.steps[trainer.global_step] = (place, int(batch.images.long().sum()), rates)  # pixels: the augmentation

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps[-1 - trainer.current_epoch] = ("the end of an epoch", trainer.global_step)
        self._stop("epoch", trainer)


class _Points(DummyLogger):
    """Keeps each logged value by its name and step."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[tuple[str, int | None], float] = {}

    @property
    def log_dir(self) -> None:
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        names = [name for name in metrics if not any(word in name for word in TIMES)]
        self.points |= {(name, step): metrics[name] for name in names}


class Part(NamedTuple):
    """A run, or a part of one.

    Attributes:
        steps: what was trained on, by step, and the ends of epochs that callbacks have seen.
        points: what was logged, by name and step.
        end: ``done``, ``killed`` or ``terminated``.
        state: of its end: weights, moments, rates, counters, callbacks.
    """

    steps: dict[int, Any]
    points: dict[tuple[str, int | None], float]
    end: str
    state: dict[str, Any]


def fit(folder: Path, table: str, settings: Settings, stop: Stop | None, resumed: Path | None) -> Part:
    """Train to the end, or to a stop."""
    seed_everything(1, verbose=False)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    hard, stored = settings.part == "hard batches", settings.part == "stored features"
    module = LitCLIP(
        CONFIG,
        optimizer=partial(PaperAdamW, lr=1e-2),
        lr_scheduler=partial(WarmupCosine, warmup_steps=2),
        freeze=Freeze(UnlockLast(0), None) if stored else Freeze(),
        micro_batch_size=settings.micro_batch_size,
    )
    batches = BatchOptions(hard=0.5) if hard else None
    augmentation: Any = {"augmentation": []} if stored else {}
    data = Captions(table, table, global_batch_size=4, num_workers=0, batches=batches, **augmentation)
    recorder, logger = _Recorder(stop, folder), _Points()
    parts: dict[str, list[Callback]] = {
        "ema": [EMA(0.5, start_step=2)],
        "hard batches": [HardBatches()],
        "stored features": [FrozenFeatures(str(folder.parent / "features"))],
    }
    saver = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **settings.saver)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        callbacks=defaults(recorder, *parts.get(settings.part, []), TrainingMonitor(), saver),
        logger=logger,
        plugins=[WholeCheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"max_epochs": 4, **settings.trainer},
    )
    end = "done"
    try:
        trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    except _Killed:
        end = "killed"
    except SystemExit:
        end = "terminated"
    state = _state(trainer, folder / "end" / "end.ckpt") if end == "done" else {}
    return Part(recorder.steps, logger.points, end, state)


def _state(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Return all that a checkpoint of a run's end holds, but its files and what no two runs share."""
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    saved["callbacks"] = {name: state for name, state in saved["callbacks"].items() if "ModelCheckpoint" not in name}
    # A run that has ended before and is resumed draws no number.
    return {name: value for name, value in saved.items() if name not in ("random_states", "hyper_parameters")}


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Return where two nested values differ in any bit."""
    if isinstance(ours, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [where]
    if isinstance(ours, Mapping):
        odd = [f"{where}: only one has {key}" for key in sorted(map(str, ours.keys() ^ theirs.keys()))]
        return odd + [
            each for key in ours.keys() & theirs for each in differences(ours[key], theirs[key], f"{where}/{key}")
        ]
    if isinstance(ours, list | tuple) and len(ours) == len(theirs):
        return [
            each for i, pair in enumerate(zip(ours, theirs, strict=True)) for each in differences(*pair, f"{where}/{i}")
        ]
    return [] if ours == theirs or (ours != ours and theirs != theirs) else [f"{where}: {ours} and {theirs}"]


@cache
def _whole(folder: Path, table: str, settings: str) -> Part:
    return fit(folder / f"whole_{zlib.crc32(settings.encode())}", table, _settings(settings), None, None)


def _settings(text: str) -> Settings:
    return Settings(*json.loads(text))


def check(folder: Path, table: str, settings: str, stops: list[list[Any]]) -> list[str]:
    """Return where a run that is stopped and resumed differs from the one that nothing stops; empty: nowhere.

    Both are given as JSON: the values of :class:`Settings`, and those of each :class:`Stop`.
    """
    whole = _whole(folder, table, settings)
    assert whole.end == "done"
    places = folder / f"stopped_{len([*folder.glob('stopped_*')])}"
    places = Path(distributed.gather_objects([str(places)])[0])
    steps, points, found = {}, {}, []
    resumed: Path | None = None
    for stop in [*(Stop(*each) for each in stops), None]:
        part = fit(places, table, _settings(settings), stop, resumed)
        again = {point: value for point, value in part.points.items() if point in points}
        found += [f"logged again {each}" for each in differences(again, {point: points[point] for point in again})]
        steps |= part.steps
        points |= part.points
        if part.end == "done":
            found += differences(part.state, whole.state, "state")
            break
        distributed.gather_objects([part.end])  # all have written
        resumed = newest_checkpoint([places])
    return found + differences(steps, whole.steps, "steps") + differences(points, whole.points, "points")


def main() -> None:
    """Check several runs on one rank of several, and write what differs."""
    folder, table, cases = sys.argv[1:]
    found = [check(Path(folder), table, *case) for case in json.loads(cases)]
    rank, _ = distributed.rank_and_world()
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.exit_process()


if __name__ == "__main__":
    main()
