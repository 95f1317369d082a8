"""Training throughput: samples, tokens, model FLOP utilisation, memory, and time spent waiting for data."""

from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.models.clip import CLIP
from lit_clip.models.flops import PairFlops, training_flops
from lit_clip.module import LitCLIP
from lit_clip.tools import hardware
from .monitor import TrainingMonitor
from .training_clock import MEASURE, TimedCallback, log_interval

DTYPES = {  # of matrix products, by Lightning's name of the precision
    "64-true": torch.float64,
    "32-true": torch.float32,
    "16-true": torch.float16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
}


class Count(NamedTuple):
    """Work of one rank since the last logged step."""

    samples: int  # drawn, skipped ones included
    pairs: int  # encoded
    tokens: int  # of their texts, without padding
    squares: int  # sum of the texts' squared lengths
    seconds: float  # of training
    waited: float  # the part of them spent waiting for data
    memory: int  # peak so far, in bytes
    shared: int = 0  # pairs whose image is encoded for another pair


def throughput(
    counts: list[Count], context_length: int, flops: PairFlops | None, peak: float | None
) -> dict[str, float]:
    """Return the metrics of :class:`Throughput`; there is no MFU without ``flops`` and a device's ``peak`` FLOP/s."""
    seconds = counts[0].seconds  # ranks train in parallel
    samples, pairs, tokens, squares = (sum(column) for column in list(zip(*counts, strict=True))[:4])
    metrics = {
        "train/samples_per_second": samples / seconds,
        "train/data_wait_share": max(count.waited / count.seconds for count in counts),
        "train/tokens_per_second": tokens / seconds,
        "train/padded_tokens_per_second": pairs * context_length / seconds,
        "train/peak_memory_gib": max(count.memory for count in counts) / 2**30,
    }
    if flops and peak:
        computed = flops.total(pairs, tokens, squares) - flops.image * sum(count.shared for count in counts)
        metrics["train/mfu"] = computed / (seconds * peak * len(counts))
    return metrics


class Throughput(TimedCallback):
    """Log the throughput of all ranks since the last logged step, every ``log_every_n_steps``.

    Rates and shares are relative to training time, without validations, checkpoints and other evaluations (see
    :class:`callbacks.training_clock.TimedCallback`). Time is the host's; the device is not synchronised.

    - ``train/data_wait_share``: share of the time, 0 to 1, in which the loop waited for a batch, on the rank that
      waited longest. A device may still be busy with the step before.
    - ``train/tokens_per_second``: tokens of the texts, start and end included; ``train/padded_tokens_per_second``:
      what an encoder that pads to the context length would have read instead.
    - ``train/mfu``: model FLOP utilisation, 0 to 1: matrix products, convolutions and attention (causal attention in
      full) of both encoders' passes for the encoded images and tokens, over what the devices could have done. Not
      counted are padding, what micro-batches and activation checkpointing compute again, gradients that are not
      needed, the loss, the optimiser and a teacher. The peak of a GPU is from Lightning's table, for the run's
      precision (dense; TF32 for float32 if ``torch.set_float32_matmul_precision`` allows it). Not logged if either is
      unknown, as on a CPU, and not with :class:`callbacks.FrozenFeatures`, which leaves layers out.
    - ``train/peak_memory_gib``: the largest peak of any rank in this process so far: of CUDA's allocator, never reset;
      on other devices of the process, without its data workers.
    - ``train/samples_per_second``: pairs, unless a :class:`callbacks.TrainingMonitor` logs it.
    """

    def __init__(self) -> None:
        self._flops: list[PairFlops | None] = []  # one, once they are counted
        self._peak: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._samples = self._pairs = self._tokens = self._squares = self._shared = 0
        self._uncounted: Tensor | None = None  # tokens and squares of texts whose lengths are known on the device only

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._flops, self._peak = [], device_peak(trainer)
            if self._peak and not isinstance(trainer.strategy, SingleDeviceStrategy):  # which may shard the weights
                self._count_flops(trainer, cast(LitCLIP, pl_module).model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._clear()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        model = cast(LitCLIP, pl_module).model
        self._add(batch, model)
        if trainer.global_step % log_interval(trainer) == 0:
            own = self._count(trainer)
            if not self.is_whole_interval(trainer):  # the same on every rank
                return
            counts: list[Count] = distributed.gather_objects([own])
            flops = None
            if self._peak and not model.frozen_prefixes:  # whose layers would be counted, and are not computed
                with trainer.profiler.profile(MEASURE):  # pauses the clocks
                    flops = self._flops[0] if self._flops else self._count_flops(trainer, model)
            metrics = throughput(counts, model.context_length, flops, self._peak)
            if any(isinstance(callback, TrainingMonitor) for callback in trainer.callbacks):
                del metrics["train/samples_per_second"]
            pl_module.log_dict(metrics)

    def _count_flops(self, trainer: Trainer, model: CLIP) -> PairFlops | None:
        device = trainer.strategy.root_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # an encoder may draw random numbers
            self._flops = [training_flops(model)]
        if self._flops[0] is None:
            rank_zero_warn("Throughput: the FLOPs of these encoders cannot be counted, so there is no train/mfu")
        return self._flops[0]

    def _add(self, batch: CaptionBatch, model: CLIP) -> None:
        self._samples += batch.pairs + len(batch.skipped)
        self._pairs += batch.pairs
        self._shared += batch.pairs - len(batch.images)
        if batch.lengths:
            self._tokens += sum(batch.lengths)
            self._squares += sum(length * length for length in batch.lengths)
        elif len(batch.images):
            lengths = model.tokenizer.lengths(batch.tokens)
            sums = torch.stack([lengths.sum(), (lengths * lengths).sum()])
            self._uncounted = sums if self._uncounted is None else self._uncounted + sums

    def _count(self, trainer: Trainer) -> Count:
        tokens, squares = (0, 0) if self._uncounted is None else self._uncounted.tolist()
        tokens, squares = tokens + self._tokens, squares + self._squares
        memory = peak_memory(trainer.strategy.root_device)
        count = Count(self._samples, self._pairs, tokens, squares, *self.clock.lap(), memory, self._shared)
        self._clear()
        return count


def device_peak(trainer: Trainer) -> float | None:
    """Return the FLOP/s of this rank's device in the run's precision by Lightning's table; None if it has none."""
    device, dtype = trainer.strategy.root_device, DTYPES.get(str(trainer.precision))
    return get_available_flops(device, dtype) if dtype and device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Return the peak so far in bytes: of tensors on a CUDA device, on other devices of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else hardware.peak_of_process()
