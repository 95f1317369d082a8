"""Samples that the data module skips because they cannot be used: counted, listed in a file, and limited."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_clip import distributed
from lit_clip.batch import JUDGED_AFTER, CaptionBatch
from lit_clip.errors import InputError
from lit_clip.tools.hashing import hash64
from lit_clip.tools.untrusted import check_entries
from lit_clip.training.lightning.run_folder import run_folder

FILE = "skipped.jsonl"
MOST_REASONS = 20  # logged separately


class _Report(NamedTuple):
    """A rank's counts since its last report."""

    drawn: int
    skipped: list[tuple[str, str]]  # where, reason


class Tally:
    """Number of samples drawn, and of those skipped for each reason, over all ranks.

    Attributes:
        drawn: samples, including skipped ones.
        counts: skipped samples by reason.
    """

    def __init__(self) -> None:
        self.drawn = 0
        self.counts: Counter[str] = Counter()
        self._drawn, self._skipped = 0, []  # this rank's, since the last join

    def add(self, batch: CaptionBatch) -> None:
        """Count a batch of this rank."""
        self._drawn += len(batch.images) + len(batch.skipped)
        self._skipped += batch.skipped

    def join(self) -> list[tuple[str, str]]:
        """Sum the counts of all ranks and return (where, reason) of every newly skipped sample; a collective."""
        reports: list[_Report] = distributed.gather_objects([_Report(self._drawn, self._skipped)])
        self._drawn, self._skipped = 0, []
        self.drawn += sum(report.drawn for report in reports)
        skipped = [sample for report in reports for sample in report.skipped]
        self.counts.update(reason for _, reason in skipped)
        return skipped

    @property
    def skipped(self) -> int:
        """Number of skipped samples."""
        return self.counts.total()

    def too_many(self, limit: float, at_end: bool) -> bool:
        """Return whether more than a share ``limit`` of the samples was skipped, or, at the end, all of them."""
        if at_end and self.skipped == self.drawn:
            return self.drawn > 0
        return self.drawn >= JUDGED_AFTER and self.skipped > limit * self.drawn

    def metrics(self, name: str) -> dict[str, float]:
        """Return the number of skipped samples, in total and by reason."""
        reasons = self.counts.most_common(MOST_REASONS)
        return {name: float(self.skipped)} | {f"{name}_{slug(reason)}": float(count) for reason, count in reasons}

    def __str__(self) -> str:
        share = f"{self.skipped:,} of {self.drawn:,} samples ({self.skipped / max(1, self.drawn):.1%})"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common(MOST_REASONS))
        return f"{share} could not be used: {reasons}"


def slug(reason: str) -> str:
    """Return a reason in the form of a metric's name."""
    return re.sub(r"\W+", "_", reason.lower()).strip("_")


class SkippedSamples(Callback):
    """Count, list and limit the samples that a data module with ``on_error: skip`` leaves out.

    ``data/skipped`` and ``data/skipped_<reason>`` are the training samples skipped so far, on all ranks and in all
    epochs, logged every ``log_every_n_steps``; ``data/val_skipped`` those of one validation. ``skipped.jsonl`` in the
    run's folder lists each sample once. The run fails on all ranks when more than the data module's ``max_skipped`` of
    at least ``JUDGED_AFTER`` training samples, or of a validation's, were skipped, or all samples of an epoch.
    """

    counts_skipped_samples = True

    def __init__(self) -> None:
        self.training, self.evaluation = Tally(), Tally()
        self._file: _File | None = None

    def _active(self, trainer: Any) -> bool:
        return getattr(trainer.datamodule, "on_error", "error") == "skip"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        source = getattr(_data(trainer), "train_source", None)
        if self._active(trainer) and source is not None:  # skipped when the source was opened, the same on each rank
            self._list(trainer, source.left_out.listed, "opening")

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        if not self._active(trainer):
            return
        self.training.add(batch)
        step = trainer.global_step
        logged = trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0
        if logged or step & (step - 1) == 0:  # 1, 2, 4, 8, ...: data that are all bad are reported soon
            self._join_training(trainer)
            self._judge(trainer, self.training, at_end=False)
        if logged:
            pl_module.log_dict(self.training.metrics("data/skipped"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active(trainer):
            self._join_training(trainer)
            self._judge(trainer, self.training, at_end=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluation = Tally()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, *_: Any, **__: Any
    ) -> None:
        if self._active(trainer):
            self.evaluation.add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluation = Tally()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, *_: Any, **__: Any
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation(trainer, pl_module, "test")

    def _end_evaluation(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._active(trainer):
            return
        self._list(trainer, self.evaluation.join(), stage)
        self._judge(trainer, self.evaluation, at_end=True)
        if not trainer.sanity_checking:
            pl_module.log_dict(self.evaluation.metrics(f"data/{stage}_skipped"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active(trainer) and self.training.skipped:
            rank_zero_info(f"training: {self.training}{self._listed_in()}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._active(trainer):
            self._join_training(trainer)
            checkpoint["skipped_samples"] = {"drawn": self.training.drawn, "counts": dict(self.training.counts)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if saved := checkpoint.get("skipped_samples"):
            check_entries(saved, {"drawn": int, "counts": dict[str, int]}, "skipped_samples")
            self.training.drawn, self.training.counts = saved["drawn"], Counter(saved["counts"])

    def _join_training(self, trainer: Trainer) -> None:
        self._list(trainer, self.training.join(), "train")

    def _list(self, trainer: Trainer, skipped: list[tuple[str, str]], stage: str) -> None:
        """Append new samples to the file, on the first rank; all ranks have the same list."""
        if not skipped:
            return
        if self._file is None:
            where, reason = skipped[0]
            folder = run_folder(trainer)  # every rank must ask
            self._file = _File(folder / FILE if folder else None)
            listed = self._listed_in()
            rank_zero_warn(f"{where}: skipped ({reason}); further ones are counted in data/skipped{listed}")
        if trainer.is_global_zero:
            self._file.append(skipped, stage)

    def _listed_in(self) -> str:
        return f", listed in {self._file.path}" if self._file and self._file.path else ""

    def _judge(self, trainer: Trainer, tally: Tally, at_end: bool) -> None:
        limit = float(getattr(_data(trainer), "max_skipped", 1.0))
        if tally.too_many(limit, at_end):
            raise InputError(
                f"{tally}{self._listed_in()}; fix or remove them, or raise data.bad_samples.max_skipped (now {limit:g})"
            )


class _File:
    """The list of skipped samples, each of them once, also when a run is resumed.

    Args:
        path: None for no file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: set[bytes] | None = None

    def append(self, skipped: Iterable[tuple[str, str]], stage: str) -> None:
        """Append the samples that are not in the file yet."""
        if self.path is None:
            return
        try:
            if self._known is None:
                self._known = self._read(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for where, reason in skipped:
                    if (key := hash64(where)) not in self._known:
                        self._known.add(key)
                        file.write(json.dumps({"where": where, "reason": reason, "stage": stage}) + "\n")
        except OSError as error:  # raising on this rank only would leave the others waiting
            rank_zero_warn(f"{self.path}: {error.strerror}; skipped samples are counted but not listed")
            self.path = None

    @staticmethod
    def _read(path: Path) -> set[bytes]:
        known: set[bytes] = set()
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    try:
                        known.add(hash64(json.loads(line)["where"]))
                    except (ValueError, KeyError, TypeError):  # the run was killed while it wrote this line
                        continue
        return known


def _data(trainer: Any) -> Any:
    return trainer.datamodule
