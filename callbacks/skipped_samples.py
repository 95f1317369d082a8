"""Count, list and limit the samples that the data module skips because they cannot be used."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_clip import distributed
from lit_clip.batch import JUDGED_AFTER, CaptionBatch
from lit_clip.errors import InputError
from lit_clip.tools.hashing import hash64
from lit_clip.tools.untrusted import Count, convert, entries
from lit_clip.training.lightning.run_folder import run_folder

FILE = "skipped.jsonl"
MOST_REASONS = 20  # logged separately


class Tally:
    """Number of drawn samples, including skipped ones, and of skipped samples by reason, over all ranks."""

    def __init__(self) -> None:
        self.drawn = 0
        self.counts: Counter[str] = Counter()
        self._drawn, self._skipped = 0, []  # this rank's, since the last join

    def add(self, batch: CaptionBatch) -> None:
        """Count a batch of this rank."""
        self._drawn += min(len(batch.images), batch.pairs) + len(batch.skipped)
        self._skipped += batch.skipped

    def join(self) -> list[tuple[str, str]]:
        """Sum the counts of all ranks, and return (where, reason) of each newly skipped sample; a collective."""
        reports = distributed.gather_objects([(self._drawn, self._skipped)])
        self._drawn, self._skipped = 0, []
        self.drawn += sum(drawn for drawn, _ in reports)
        skipped = [sample for _, samples in reports for sample in samples]
        self.counts.update(reason for _, reason in skipped)
        return skipped

    def too_many(self, limit: float, at_end: bool) -> bool:
        """Return whether more than the share ``limit`` of the samples was skipped, or at the end all samples."""
        skipped = self.counts.total()
        if at_end and skipped == self.drawn:
            return self.drawn > 0
        return self.drawn >= JUDGED_AFTER and skipped > limit * self.drawn

    def metrics(self, name: str) -> dict[str, float]:
        """Return the number of skipped samples, in total and by reason."""
        found = {name: float(self.counts.total())}
        for reason, count in self.counts.most_common(MOST_REASONS):
            key = re.sub(r"\W+", "_", reason.lower()).strip("_")
            found[f"{name}_{key}"] = float(count)
        return found

    def __str__(self) -> str:
        skipped = self.counts.total()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common(MOST_REASONS))
        of = f"{skipped:,} of {self.drawn:,} samples ({skipped / max(1, self.drawn):.1%})"
        return f"{of} could not be used: {reasons}"


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
        self._path: Path | None = None  # of the list; None before the first sample, and without a folder
        self._listed: set[bytes] | None = None  # samples in the list, of the run that is resumed too
        self._warned = False

    def _active(self, trainer: Any) -> bool:
        return getattr(trainer.datamodule, "on_error", "error") == "skip"

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        source = getattr(trainer.datamodule, "train_source", None)
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
            self._judge(trainer, self.training, "train", at_end=False)
        if logged:
            pl_module.log_dict(self.training.metrics("data/skipped"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active(trainer):
            self._judge(trainer, self.training, "train", at_end=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluation = Tally()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, *_: Any, **__: Any
    ) -> None:
        if self._active(trainer):
            self.evaluation.add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._active(trainer):
            return
        stage = "test" if trainer.testing else "val"
        self._judge(trainer, self.evaluation, stage, at_end=True)
        if not trainer.sanity_checking:
            pl_module.log_dict(self.evaluation.metrics(f"data/{stage}_skipped"))

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active(trainer) and self.training.counts:
            rank_zero_info(f"training: {self.training}{self._listed_in()}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._active(trainer):
            self._list(trainer, self.training.join(), "train")
            checkpoint["skipped_samples"] = {"drawn": self.training.drawn, "counts": dict(self.training.counts)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if saved := checkpoint.get("skipped_samples"):
            convert(saved, entries({"drawn": Count, "counts": dict[str, Count]}, total=True), "skipped_samples")
            self.training.drawn, self.training.counts = saved["drawn"], Counter(saved["counts"])

    def _list(self, trainer: Trainer, skipped: list[tuple[str, str]], stage: str) -> None:
        """Append new samples to the file on the first rank; all ranks have the same list."""
        if not skipped:
            return
        if not self._warned:
            where, reason = skipped[0]
            folder = run_folder(trainer)  # every rank must ask
            self._path, self._warned = folder and folder / FILE, True
            rank_zero_warn(f"{where}: skipped ({reason}); further ones are counted in data/skipped{self._listed_in()}")
        if trainer.is_global_zero and self._path:
            try:
                self._append(self._path, skipped, stage)
            except OSError as error:  # raising on this rank only would leave the others waiting
                rank_zero_warn(f"{self._path}: {error.strerror}; skipped samples are counted but not listed")
                self._path = None

    def _append(self, path: Path, skipped: list[tuple[str, str]], stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            if self._listed is None:
                file.seek(0)
                self._listed = {hash64(place) for place in map(_place, file) if place is not None}
            for where, reason in skipped:
                if (key := hash64(where)) not in self._listed:
                    self._listed.add(key)
                    file.write(json.dumps({"where": where, "reason": reason, "stage": stage}) + "\n")

    def _listed_in(self) -> str:
        return f", listed in {self._path}" if self._path else ""

    def _judge(self, trainer: Any, tally: Tally, stage: str, at_end: bool) -> None:
        self._list(trainer, tally.join(), stage)
        limit = float(getattr(trainer.datamodule, "max_skipped", 1.0))
        if tally.too_many(limit, at_end):
            raise InputError(
                f"{tally}{self._listed_in()}; fix or remove them, or raise data.bad_samples.max_skipped (now {limit:g})"
            )


def _place(line: str) -> str | None:
    try:
        where = json.loads(line)["where"]
        return where if isinstance(where, str) else None
    except (ValueError, KeyError, TypeError):  # the run was killed while it wrote this line
        return None
