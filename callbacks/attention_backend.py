"""The attention kernels of a run: torch's backends in the order that computes the model's own attention fastest."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import require
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.training.micro_batches import split_batch

Backend = Literal["fastest", "flash", "efficient", "cudnn", "math"]
# Of equally fast orders the one nearest to this is taken. `math`, which computes every call, is the last.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
SECONDS = 0.1  # of measuring a call with a backend


class AttentionBackend(Callback):
    """Compute attention with the fastest of torch's backends during ``fit``, validations included.

    Before its first step the model encodes that step's batch, or the first micro-batch of it, without gradients. Each
    backend then computes the attention calls that this made, forward and backward, on the first rank. Torch takes for
    each call the first backend of a list that can compute it; the list with the least time for all calls is set on all
    ranks, and named in one line. Most models have three kinds of calls: an image's tokens without a mask, its class
    token alone, and texts in rows with a mask, which flash attention cannot compute.

    Backends round differently, and times vary: name a backend if a run must be repeated bit by bit. Attention by
    ``torch.nn.MultiheadAttention`` is not measured, but set too.

    Args:
        backend: ``fastest``, or the one that computes all calls that it can; the fastest others compute the rest.

    Attributes:
        order: the names of the backends that may be used, by priority; empty before the first step.
    """

    changes_model = True  # before others measure it

    def __init__(self, backend: Backend = "fastest") -> None:
        names = ", ".join(get_args(Backend))
        require(backend in get_args(Backend), f"AttentionBackend.backend: {backend!r} must be one of {names}")
        self.backend: Backend = backend
        self.order: list[str] = []
        self._set = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: CaptionBatch, batch_idx: int) -> None:
        if self.order:
            return
        shards = RankCounts(0, (len(batch.images),))
        part = split_batch(pl_module.model, batch, shards, pl_module.hparams["micro_batch_size"])[0]
        with evaluation_mode(pl_module):  # draws no random number and changes no statistics
            calls = recorded(lambda: trainer.strategy.predict_step(part, 0))
        with trainer.precision_plugin.forward_context():
            measured = [call.measured() for call in calls] if trainer.is_global_zero else []
        measured = trainer.strategy.broadcast(measured)
        device = trainer.strategy.root_device
        self.order = best_order(measured, self.backend, device.type)
        self._set.enter_context(sdpa_kernel([BACKENDS[name] for name in self.order], set_priority=True))
        # Compiled graphs keep the backends that they were compiled with, and torch's cache of them does not know it.
        torch.compiler.reset()
        tag = f"{torch.compiler.config.cache_key_tag} attention: {self.order}"
        config: Any = torch.compiler.config  # typed as a module
        self._set.enter_context(config.patch(cache_key_tag=tag))
        rank_zero_info(f"callbacks.AttentionBackend: {_sentence(self.order, measured)}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        self._set.close()
        self.order = []


class Measured(NamedTuple):
    """The times of one kind of attention call.

    Attributes:
        times: number of such calls in a batch.
        seconds: of a call, forward and backward, by name of the backend; without those that cannot compute it.
    """

    times: int
    seconds: Mapping[str, float]


@dataclass
class AttentionCall:
    """A call of :func:`torch.nn.functional.scaled_dot_product_attention`.

    Attributes:
        inputs: queries, keys and values.
        attend: the call for other values.
        times: number of calls with such arguments.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    attend: Callable[..., Tensor]
    times: int = 1

    def measured(self) -> Measured:
        """Measure the call with each backend."""
        seconds = {name: self._seconds(backend) for name, backend in BACKENDS.items()}
        return Measured(self.times, {name: value for name, value in seconds.items() if value is not None})

    def _seconds(self, backend: SDPBackend) -> float | None:
        inputs = [tensor.detach().requires_grad_() for tensor in self.inputs]

        def run() -> None:
            out = self.attend(*inputs)
            torch.autograd.grad(out, inputs, out)

        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        try:
            with sdpa_kernel(backend), torch.enable_grad(), warnings.catch_warnings(action="ignore"):  # of the reasons
                run()
                return timer.blocked_autorange(min_run_time=SECONDS).median
        except RuntimeError:  # no such kernel for these arguments, or no memory for it
            return None


class _Recorder(TorchFunctionMode):
    """Collects the attention calls that are made while it is active, by their shapes, types and options."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, AttentionCall] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._note(*args, **kwargs)
        return func(*args, **kwargs)

    def _note(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        inputs, named = (query, key, value), sorted(kwargs.items())
        everything = (*inputs, *args, *(name for name, _ in named), *(option for _, option in named))
        kind = tuple((each.shape, each.dtype) if isinstance(each, Tensor) else each for each in everything)
        if kind in self.calls:
            self.calls[kind].times += 1
        else:
            attend = partial(F.scaled_dot_product_attention, **kwargs)
            self.calls[kind] = AttentionCall(inputs, lambda q, k, v: attend(q, k, v, *args))


def recorded(run: Callable[[], Any]) -> list[AttentionCall]:
    """Return the attention calls of a function, which compiled modules make in eager mode."""
    with _Recorder() as recorder, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        run()
    return list(recorder.calls.values())


def best_order(measured: Sequence[Measured], backend: Backend, device: str) -> list[str]:
    """Return the fastest order of backends, up to the last one that may be used.

    Args:
        measured: all kinds of calls.
        backend: the first one, or ``fastest``.
        device: its name, for error messages.
    """
    require(bool(measured), "callbacks.AttentionBackend: the model has no attention; remove the callback")
    usable = [name for name in BACKENDS if any(name in call.seconds for call in measured)]
    require(
        backend in ("fastest", *usable),
        f"callbacks.AttentionBackend.backend: {backend} can compute none of the model's attention on this {device} "
        f"device; choose one of fastest, {', '.join(usable)}",
    )

    def seconds(order: tuple[str, ...]) -> float:
        first = (next((call.seconds[name] for name in order if name in call.seconds), math.inf) for call in measured)
        return sum(call.times * value for call, value in zip(measured, first, strict=True))

    best = min((order for order in permutations(usable) if backend in ("fastest", order[0])), key=seconds)
    # Not beyond math, which computes every call: on a CPU torch knows no order, and would take flash before it.
    return list(best[: best.index("math") + 1] if "math" in best else best)


def _sentence(order: Sequence[str], measured: Sequence[Measured]) -> str:
    times = []
    for name in BACKENDS:
        calls = [call for call in measured if name in call.seconds]
        some = f" ({len(calls)} of {len(measured)} kinds of calls)" if len(calls) < len(measured) else ""
        if calls:
            times.append(f"{name} {1000 * sum(call.times * call.seconds[name] for call in calls):.3g}{some}")
    return f"{', else '.join(order)}; milliseconds of a batch's attention, forward and backward: {', '.join(times)}"
