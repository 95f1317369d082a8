"""How fast training is, how near to what the device could do, and what holds it up."""

from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.monitor import TrainingMonitor
from callbacks.training_clock import TimedCallback, log_interval
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.models.clip import CLIP
from lit_clip.models.flops import PairFlops, matmul_peak, training_flops
from lit_clip.module import LitCLIP
from lit_clip.tools import hardware

DTYPES = {  # of the matrix products, by Lightning's precision
    "64-true": torch.float64,
    "32-true": torch.float32,
    "16-true": torch.float16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
}


class Count(NamedTuple):
    """What one rank did since the last logged step.

    Attributes:
        samples: that were drawn, the skipped ones with them.
        pairs: that were encoded.
        tokens: of their texts, without padding.
        squares: the sum of the texts' squared lengths.
        seconds: of training.
        waited: seconds of them for data.
        memory: bytes at the most, so far.
    """

    samples: int
    pairs: int
    tokens: int
    squares: int
    seconds: float
    waited: float
    memory: int


def throughput(
    counts: list[Count], context_length: int, flops: PairFlops | None, peak: float | None
) -> dict[str, float]:
    """The metrics of :class:`Throughput`.

    Args:
        counts: of every rank; they train side by side, so the first one's time is that of all.
        context_length: tokens of a text with its padding.
        flops: of the model; None: not known, and no MFU.
        peak: FLOP/s of one device; likewise.
    """
    seconds = counts[0].seconds
    samples, pairs, tokens, squares = (sum(column) for column in list(zip(*counts, strict=True))[:4])
    metrics = {
        "train/samples_per_second": samples / seconds,
        "train/data_wait_share": max(count.waited / count.seconds for count in counts),
        "train/tokens_per_second": tokens / seconds,
        "train/padded_tokens_per_second": pairs * context_length / seconds,
        "train/peak_memory_gib": max(count.memory for count in counts) / 2**30,
    }
    if flops and peak:
        metrics["train/mfu"] = flops.total(pairs, tokens, squares) / (seconds * peak * len(counts))
    return metrics


class Throughput(TimedCallback):
    """Logs, every ``log_every_n_steps``, over all ranks, how fast training is since the last time.

    All but the memory is over the time that training took, without validations, checkpoints and other evaluations (see
    :class:`callbacks.training_clock.TimedCallback`), on the host's clock, which never waits for the device.

    - ``train/data_wait_share``: the share of that time, 0 to 1, in which the loop waited for a batch, of the rank that
      waited the longest. A device may still be busy with the step before.
    - ``train/tokens_per_second``: tokens that texts have, start and end included;
      ``train/padded_tokens_per_second``: those that a tower of the full context length would have read instead.
    - ``train/mfu``, model FLOP utilisation, 0 to 1: the arithmetic that the model asks for over what the devices could
      have done in that time. Counted are the matrix products, convolutions and attention of the forward and backward
      pass of both towers, for the encoded images and the tokens that texts have; whatever was computed on padding, or
      again because of ``micro_batch_size`` and ``gradient_checkpointing``, is not (so it is MFU, not HFU), nor is the
      causal half of attention taken off. A frozen tower has its forward pass alone, and no layer a gradient that nobody
      asks for. The loss, the optimiser and a teacher to distil are not counted. What a device could do is Lightning's
      table of GPUs for the run's precision (dense; float32 is TF32's if ``torch.set_float32_matmul_precision`` allows
      that); of a CPU, or a GPU that is not in it, the fastest matrix product found in half a second at the start on the
      first rank's device, while the others wait: more than 1 means that it was busy then. Not logged where either is
      unknown.
    - ``train/peak_memory_gib``: the most that a rank has had so far in this process: of CUDA's allocator, never reset;
      elsewhere of the process, without its data workers.
    - ``train/samples_per_second``, if no :class:`callbacks.TrainingMonitor` does.
    """

    def __init__(self) -> None:
        self._flops: PairFlops | None = None
        self._peak: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._samples = self._pairs = self._tokens = self._squares = 0
        self._uncounted: Tensor | None = None  # tokens and squares of texts whose lengths only the device knows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._flops = training_flops(cast(LitCLIP, pl_module).model)
            if self._flops is None:
                rank_zero_warn("Throughput: the FLOPs of these encoders cannot be counted, so there is no train/mfu")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = distributed.rank_and_world()[0] == 0
        (self._peak,) = distributed.gather_objects([device_peak(trainer)] if first else [])

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
            counts: list[Count] = distributed.gather_objects([self._count(trainer)])
            metrics = throughput(counts, model.context_length, self._flops, self._peak)
            if any(isinstance(one, TrainingMonitor) for one in trainer.callbacks):
                del metrics["train/samples_per_second"]
            pl_module.log_dict(metrics)

    def _add(self, batch: CaptionBatch, model: CLIP) -> None:
        self._samples += len(batch.images) + len(batch.skipped)
        self._pairs += len(batch.images)
        if batch.lengths:
            self._tokens += sum(batch.lengths)
            self._squares += sum(length * length for length in batch.lengths)
        elif len(batch.images):
            lengths = model.tokenizer.lengths(batch.tokens)
            sums = torch.stack([lengths.sum(), (lengths * lengths).sum()])
            self._uncounted = sums if self._uncounted is None else self._uncounted + sums

    def _count(self, trainer: Trainer) -> Count:
        """What this rank did since the last time."""
        tokens, squares = (0, 0) if self._uncounted is None else self._uncounted.tolist()
        tokens, squares = tokens + self._tokens, squares + self._squares
        memory = peak_memory(trainer.strategy.root_device)
        count = Count(self._samples, self._pairs, tokens, squares, *self.clock.lap(), memory)
        self._clear()
        return count


def device_peak(trainer: Trainer) -> float | None:
    """FLOP/s of this rank's device in the run's precision: known, or measured; None: no precision of ours."""
    device, dtype = trainer.strategy.root_device, DTYPES.get(str(trainer.precision))
    if dtype is None:
        return None
    known = get_available_flops(device, dtype) if device.type == "cuda" else None
    return known or matmul_peak(device, dtype)


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a CUDA device, elsewhere of this process in hardware."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else hardware.peak_of_process()
