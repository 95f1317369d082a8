"""Training throughput, and a clock that counts only training time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.models.clip import CLIP
from lit_clip.models.flops import PairFlops, training_flops
from lit_clip.module import LitCLIP
from lit_clip.tools import hardware
from lit_clip.training.schedules import log_interval

# Lightning's names of the profiled actions that fetch a batch and write a checkpoint.
FETCH, SAVE = "[_TrainingEpochLoop].train_dataloader_next", "save_checkpoint"
# Of matrix products, by the number of bits in Lightning's name of the precision.
DTYPES = {"64": torch.float64, "32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


class TrainingClock:
    """A stopwatch that runs only during training and while training waits for a batch."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.start()

    def start(self) -> None:
        """Start from zero, with training waiting for its first batch."""
        self._seconds = self._waited = 0.0
        self._since = self._now()
        self._activities = {FETCH}

    def _advance(self) -> None:
        before, self._since = self._since, self._now()
        if self._activities <= {FETCH}:
            self._seconds += self._since - before
            self._waited += len(self._activities) * (self._since - before)

    def begin(self, activity: str) -> None:
        """Record the start of an activity: ``FETCH`` waits for a batch, all others are pauses."""
        self._advance()
        self._activities.add(activity)

    def end(self, activity: str) -> None:
        """Record the end of an activity; do nothing if it never began."""
        self._advance()
        self._activities.discard(activity)

    def lap(self) -> tuple[float, float]:
        """Return the seconds since the last lap, and the part spent waiting for a batch."""
        self._advance()
        lap = self._seconds, self._waited
        self._seconds = self._waited = 0.0
        return lap

    def follow(self, profiler: Any, activities: set[str]) -> None:
        """Note activities that Lightning reports to a profiler.

        This patches the one object instead of using a profiler of our own, because Lightning and users look for theirs.
        """
        start, stop = profiler.start, profiler.stop

        def started(action_name: str) -> None:
            start(action_name)
            if action_name in activities:
                self.begin(action_name)

        def stopped(action_name: str) -> None:
            if action_name in activities:
                self.end(action_name)
            stop(action_name)

        profiler.start, profiler.stop = started, stopped


@dataclass
class Count:
    """Work of one rank since the last logged step."""

    samples: int = 0  # drawn, skipped ones included
    pairs: int = 0  # encoded
    shared: int = 0  # pairs whose image is encoded for another pair
    texts: Any = None  # their tokens without padding, and the sum of their squared lengths; maybe still on a device
    time: tuple[float, float] = (0.0, 0.0)  # seconds of training, and the part of them spent waiting for data
    memory: int = 0  # peak so far, in bytes


def throughput(
    counts: list[Count], context_length: int, flops: PairFlops | None, peak: float | None
) -> dict[str, float]:
    """Return the metrics of :class:`Throughput`; MFU needs ``flops`` and the device's ``peak`` FLOP/s."""
    seconds = counts[0].time[0]  # ranks train in parallel
    pairs = sum(count.pairs for count in counts)
    tokens, squares = (sum(column) for column in zip(*(count.texts for count in counts), strict=True))
    metrics = {
        "train/samples_per_second": sum(count.samples for count in counts) / seconds,
        "train/data_wait_share": max(waited / trained for trained, waited in (count.time for count in counts)),
        "train/tokens_per_second": tokens / seconds,
        "train/padded_tokens_per_second": pairs * context_length / seconds,
    }
    if memory := max(count.memory for count in counts):
        metrics["train/peak_memory_gib"] = memory / 2**30
    if flops and peak:
        computed = flops.total(pairs, tokens, squares) - flops.image * sum(count.shared for count in counts)
        metrics["train/mfu"] = computed / (seconds * peak * len(counts))
    return metrics


class Throughput(Callback):
    """Log the throughput of all ranks since the last logged step, every ``log_every_n_steps``.

    Rates and shares are relative to training time, without validations, checkpoints, evaluations between steps
    (:class:`.SuiteEvaluation`) and the time between two epochs. Time is the host's; the device is not synchronised.

    - ``train/samples_per_second``: pairs. Not logged for the first steps of a resumed run, unless they are a whole
      interval.
    - ``train/data_wait_share``: share of the time, 0 to 1, in which the loop waited for a batch, on the rank that
      waited longest, the start of data workers included. A device may still be busy with the step before.
    - ``train/tokens_per_second``: tokens of the texts, start and end included; ``train/padded_tokens_per_second``:
      what an encoder that pads to the context length would have read instead.
    - ``train/mfu``: model FLOP utilisation, 0 to 1: matrix products, convolutions and attention (causal attention in
      full) of both encoders' passes for the encoded images and tokens, over what the devices could have done. Not
      counted are padding, what micro-batches and activation checkpointing compute again, gradients that are not
      needed, the loss, the optimiser and a teacher. The peak of a GPU is from Lightning's table, for the run's
      precision (dense; TF32 for float32 if ``torch.set_float32_matmul_precision`` allows it). Not logged if either is
      unknown, as on a CPU, and not with :class:`callbacks.FrozenFeatures`, which leaves layers out.
    - ``train/peak_memory_gib``: the largest peak of any rank in this process so far: of CUDA's allocator, never reset;
      on other devices of the process, without its data workers. Not logged on Windows without a GPU.
    """

    now: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._flops: PairFlops | None = None
        self._peak: float | None = None
        self._count = Count()

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        self._clock = TrainingClock(self.now)
        if stage == "fit":
            evaluations = [each.state_key for each in trainer.callbacks if getattr(each, "is_evaluation", False)]
            between_steps = {f"[Callback]{key}.on_train_batch_end" for key in evaluations}
            self._clock.follow(trainer.profiler, {FETCH, SAVE} | between_steps)
            self._peak = device_peak(trainer)
            self._flops = _counted(cast(LitCLIP, pl_module).model) if self._peak else None

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        for name in ("start", "stop"):  # of the clock
            vars(trainer.profiler).pop(name, None)

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_before = trainer.global_step
        self._clock.start()  # a run that is resumed within an epoch has no on_train_epoch_start
        self._count = Count()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.end("between epochs")
        self._clock.begin(FETCH)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.begin("between epochs")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.begin("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.end("validation")

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        model, interval = cast(LitCLIP, pl_module).model, log_interval(trainer)
        self._add(batch, model)
        if trainer.global_step % interval:
            return
        own, self._count = self._count, Count()
        own.texts = (0, 0) if own.texts is None else own.texts.tolist()
        own.time, own.memory = self._clock.lap(), peak_memory(trainer.strategy.root_device)
        if trainer.global_step - self._steps_before < interval:  # too few for a rate, on every rank
            return
        # Of frozen layers whose output is stored all would be counted, and nothing is computed.
        flops = None if model.frozen_prefixes else self._flops
        metrics = throughput(distributed.gather_objects([own]), model.context_length, flops, self._peak)
        pl_module.log_dict(metrics)

    def _add(self, batch: CaptionBatch, model: CLIP) -> None:
        count = self._count
        count.samples += batch.pairs + len(batch.skipped)
        count.pairs += batch.pairs
        count.shared += batch.pairs - len(batch.images)
        if batch.pairs:
            lengths = torch.tensor(batch.lengths) if batch.lengths else model.tokenizer.lengths(batch.tokens)
            sums = torch.stack([lengths.sum(), (lengths * lengths).sum()])
            count.texts = sums if count.texts is None else count.texts + sums.to(count.texts.device)


def _counted(model: CLIP) -> PairFlops | None:
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):  # an encoder may draw numbers
        flops = training_flops(model)
    if flops is None:
        rank_zero_warn("Throughput: the FLOPs of these encoders cannot be counted, so there is no train/mfu")
    return flops


def device_peak(trainer: Trainer) -> float | None:
    """Return the peak FLOP/s of this rank's device in the run's precision, from Lightning's table; None if unknown."""
    device, dtype = trainer.strategy.root_device, DTYPES.get(str(trainer.precision).partition("-")[0])
    return get_available_flops(device, dtype) if dtype and device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of tensors on a CUDA device, otherwise of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else hardware.peak_of_process()
