"""The batch size at which an encoder is fastest, found by trying."""

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from lit_clip import distributed
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import height_width
from lit_clip.tools import hardware
from lit_clip.tools.console import stderr

BatchSize = int | Literal["auto"]

FIRST, MOST = 8, 1024
NOT_TRIED = "no larger batch is tried"
WORTH = 0.05  # more samples a second, for twice the memory
LONG_BATCH = 1.0  # seconds: what a batch costs beside its samples no longer counts
SPARED = 0.5  # of the memory that there is, for everything else
TIMES, AT_LEAST = 3, 0.3  # that a batch is timed, and for how many seconds


class Choice(NamedTuple):
    """A batch size, and what is in the way of a larger one."""

    batch_size: int
    reason: str


def fastest_batch_size(
    seconds: Callable[[int], float], first: int = FIRST, most: int = MOST, why_most: str = NOT_TRIED
) -> Choice:
    """Double the batch while that makes the encoder faster and memory permits.

    Args:
        seconds: how long a batch of so many takes; raises ``torch.OutOfMemoryError`` if it does not fit.
        first: the size to begin with.
        most: no size is larger.
        why_most: for who asks.

    Raises:
        InputError: not even one fits.
    """
    size, took = _first_that_fits(seconds, min(first, most))
    if size < min(first, most):
        return Choice(size, f"memory is too small for {2 * size}")
    while took < LONG_BATCH:
        if 2 * size > most:
            return Choice(size, f"{most} is the most: {why_most}")
        try:
            twice = seconds(2 * size)
            if 2 * took / twice - 1 < WORTH:  # once more: another program may have run beside it
                twice = min(twice, seconds(2 * size))
        except torch.OutOfMemoryError:
            return Choice(size, f"memory is too small for {2 * size}")
        faster = 2 * took / twice - 1
        if faster < WORTH:
            return Choice(size, f"{size / took:.0f} a second, {2 * size / twice:.0f} with {2 * size}")
        size, took = 2 * size, twice
    return Choice(size, f"it takes {took:.1f} seconds, {size / took:.0f} a second")


def _first_that_fits(seconds: Callable[[int], float], size: int) -> tuple[int, float]:
    while True:
        try:
            return size, seconds(size)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise InputError("--batch_size auto: there is not memory enough for a single sample") from error
            size //= 2


class Trial:
    """Runs an encoder on batches and says how long they take: ``seconds`` of :func:`fastest_batch_size`.

    A device says itself when its memory is full. A CPU's system would swap, or end the process: there a batch is not
    tried for which twice what half of it took, by the process's peak, is more than half of what is available to each of
    the machine's processes.

    Args:
        encode: what is run, on a batch of inputs on its device.
        inputs: makes a batch of so many, on the CPU.
        device: where ``encode`` wants it.
        processes: on this machine, which will all run it; one tries it out.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], object],
        inputs: Callable[[int], Tensor],
        device: torch.device,
        processes: int = 1,
    ) -> None:
        self.encode, self.inputs, self.device = encode, inputs, device
        self._available = hardware.available() // processes
        self._needed = 0  # of the last batch

    def __call__(self, batch_size: int) -> float:
        on_cpu = self.device.type == "cpu"
        if on_cpu and 2 * self._needed > SPARED * self._available:
            raise torch.OutOfMemoryError(f"a batch of {batch_size} would need {2 * self._needed:,} bytes")
        now, before = hardware.of_process(), hardware.peak_of_process()
        seconds: list[float] = []
        try:
            batch = self.inputs(batch_size).to(self.device)
            self._seconds(batch)  # warms up
            while len(seconds) < TIMES or sum(seconds) < AT_LEAST:
                seconds.append(self._seconds(batch))
        except RuntimeError as error:
            if is_oom_error(error) or "ALLOC_FAILED" in str(error):  # of a CPU, of CUDA's libraries
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # of sizes that will not come again
        peak = hardware.peak_of_process()
        self._needed = peak - now if peak > before else 0  # it has had as much before
        return min(seconds)

    def _seconds(self, batch: Tensor) -> float:
        since = time.perf_counter()
        self.encode(batch)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - since


def image_batch_size(model: CLIP, trainer: Trainer, num_workers: int, images: int | None = None) -> int:
    """At which the image encoder is fastest, see :func:`automatic_batch_size`.

    Args:
        model: the encoder.
        trainer: likewise.
        num_workers: of each process; each of them keeps two batches ready in the memory that it shares.
        images: how many there are for all processes, whose workers should all have some of them; None: many.
    """
    height, width = height_width(model.preprocessing.image_size)
    limits, shared = [(MOST, NOT_TRIED)], hardware.available_to_workers()
    if num_workers and shared is not None:
        workers = num_workers * trainer.num_devices  # of this machine
        room = int(SPARED * shared) // (workers * 2 * 3 * height * width * 4)
        limits.append((room, f"{workers} data workers share the memory of {hardware.SHARED}; fewer of them leave more"))
    if images is not None:
        readers = trainer.world_size * max(1, num_workers)
        limits.append((images // readers, f"there are {images} images for {readers} to read"))
    most, why = min(limits)

    def inputs(size: int) -> Tensor:
        return torch.rand(size, 3, height, width, generator=torch.Generator().manual_seed(0))

    return automatic_batch_size(model, trainer, model.encode_image, inputs, max(1, most), why)


def automatic_batch_size(
    model: CLIP,
    trainer: Trainer,
    encode: Callable[[Tensor], object],
    inputs: Callable[[int], Tensor],
    most: int = MOST,
    why_most: str = NOT_TRIED,
) -> int:
    """What :func:`fastest_batch_size` finds on the first rank, on all ranks alike, and said on standard error.

    Args:
        model: is put on the device and back.
        trainer: whose processes have been started; its device and precision are those of the encoder.
        encode: of the model.
        inputs: see :class:`Trial`.
        most: see :func:`fastest_batch_size`; of all ranks that of the first counts.
        why_most: likewise.

    Raises:
        InputError: on all ranks, not even one sample fits; on all but the first, it failed there.
    """
    found: list[Choice | str] = []
    failed: Exception | None = None
    if distributed.rank_and_world()[0] == 0:
        device, before = trainer.strategy.root_device, model.device
        model.to(device).eval()
        try:
            with torch.inference_mode(), trainer.precision_plugin.forward_context():
                trial = Trial(encode, inputs, device, trainer.num_devices)
                found.append(fastest_batch_size(trial, most=most, why_most=why_most))
        except Exception as error:  # the others wait for an answer
            failed = error
            found.append(str(error) if isinstance(error, InputError) else f"--batch_size auto: {error}")
        finally:
            model.to(before)
        if isinstance(found[0], Choice):
            stderr().print(f"--batch_size {found[0].batch_size}: {found[0].reason}", markup=False)
    (choice,) = distributed.gather_objects(found)
    if failed:
        raise failed
    if isinstance(choice, str):
        raise InputError(choice)
    return choice.batch_size
