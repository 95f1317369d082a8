"""Learning rate schedules: warm-up, then constant, a cosine, or constant with a cooldown at the end.

They are functions of the number of optimiser steps, so a resumed run may change any of their settings, or the schedule.
"""

import inspect
import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError, require
from lit_clip.tools.parts import unwrapped

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

POSITION = ("last_epoch", "_step_count")  # torch's names; an "epoch" is an optimiser step here
ScheduleFactory = Callable[[Optimizer], LRScheduler]
"""Creates a schedule, which is stepped after each optimiser step.

One with an argument ``total_steps`` is given the number of steps of the run, unless that is set.
"""


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate factor at an optimiser step (0 first): linear to 1, then a cosine to 0.

    The paper states warm-up over 2,000 iterations and cosine decay; that the warm-up is linear and the end 0
    follow open_clip.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class _Warmup(LambdaLR):
    """A schedule that starts with a linear warm-up."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        require(warmup_steps >= 0, f"model.lr_scheduler.warmup_steps: {warmup_steps} must be at least 0")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self.factor)

    @abstractmethod
    def factor(self, step: int) -> float:
        """Return the learning rate factor at an optimiser step, 0 first."""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in POSITION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at a position with this run's settings."""
        self.__dict__.update({name: state_dict[name] for name in POSITION})
        self._last_lr = [rate * self.factor(self.last_epoch) for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class WarmupConstant(_Warmup):
    """Linear warm-up over ``warmup_steps`` optimiser steps, then the full learning rate."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 2000) -> None:
        super().__init__(optimizer, warmup_steps)

    def factor(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


class WarmupCosine(_Warmup):
    """Linear warm-up, then a cosine to 0 at the end of the run, as in the paper; see :func:`warmup_cosine`.

    Args:
        optimizer: whose learning rates are changed.
        warmup_steps: optimiser steps of warm-up (table 18: 2,000).
        total_steps: optimiser steps until the learning rate is 0; None: those of the run.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 2000, total_steps: int | None = None) -> None:
        self.total_steps = _known(total_steps)
        super().__init__(optimizer, warmup_steps)

    def factor(self, step: int) -> float:
        return warmup_cosine(step, self.warmup_steps, self.total_steps)


class WarmupStableDecay(_Warmup):
    """Linear warm-up, a constant learning rate, and a cooldown to 0 at the end of the run (WSD, Hu et al. 2024).

    Any checkpoint of the constant part can be cooled down: resume it with another ``trainer.max_steps``.

    Args:
        optimizer: whose learning rates are changed.
        cooldown_steps: optimiser steps of the cooldown, the last ones of the run.
        warmup_steps: optimiser steps of warm-up.
        shape: of the cooldown: ``linear`` as in open_clip, or ``1-sqrt`` of its progress (Hägele et al. 2024).
        total_steps: optimiser steps until the learning rate is 0; None: those of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cooldown_steps: int,
        warmup_steps: int = 2000,
        shape: Literal["linear", "1-sqrt"] = "linear",
        total_steps: int | None = None,
    ) -> None:
        require(cooldown_steps >= 0, f"model.lr_scheduler.cooldown_steps: {cooldown_steps} must be at least 0")
        require(shape in ("linear", "1-sqrt"), f"model.lr_scheduler.shape: {shape!r} must be 'linear' or '1-sqrt'")
        self.cooldown_steps, self.shape, self.total_steps = cooldown_steps, shape, _known(total_steps)
        super().__init__(optimizer, warmup_steps)

    def factor(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = (step - self.total_steps + self.cooldown_steps) / max(1, self.cooldown_steps)
        progress = min(1.0, max(0.0, progress))
        return warmup * (1 - (progress if self.shape == "linear" else math.sqrt(progress)))


def _known(total_steps: int | None) -> int:
    if total_steps is None:
        raise InputError(
            "model.lr_scheduler: total_steps is not set, and a function without that argument hides it from the run; "
            "pass the class or functools.partial of it, with the other settings alone"
        )
    require(
        total_steps >= 0,
        "trainer.max_steps: not set, and the data do not tell their length, which the schedule needs; set it, or "
        "another model.lr_scheduler",
    )
    return total_steps


def needs_total_steps(schedule: Callable[..., Any]) -> bool:
    """Return whether a factory has an unset argument ``total_steps``."""
    target, arguments = unwrapped(schedule)
    return arguments.get("total_steps") is None and "total_steps" in inspect.signature(target).parameters


def create_schedule(schedule: Callable[..., Any], optimizer: Optimizer, total_steps: int) -> Any:
    """Create a schedule; pass the run's ``total_steps`` if it :func:`needs_total_steps`."""
    return schedule(optimizer, **{"total_steps": total_steps} if needs_total_steps(schedule) else {})


def advance(schedule: Any, steps: int) -> None:
    """Move a new schedule, and its optimiser's parameter groups, forward by some optimiser steps."""
    if isinstance(schedule, _Warmup):
        schedule.load_state_dict({"last_epoch": steps, "_step_count": steps + 1})
    elif not isinstance(schedule, ReduceLROnPlateau):  # which follows a metric, and not the steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: the optimiser has made no step
            for _ in range(steps):
                schedule.step()


def log_interval(trainer: Any) -> int:
    """Return the number of steps from one logged step to the next."""
    return trainer.log_every_n_steps or sys.maxsize  # 0 means never; a connector sets it


def samples_of(trainer: "Trainer", module: Any, batch: CaptionBatch) -> int:
    """Return the number of pairs in a step over all ranks; skipped pairs count if a sample is a pair."""
    if batch.image_of is None:  # every rank has the same number
        return (len(batch.images) + len(batch.skipped)) * trainer.world_size
    step = getattr(module, "last_step", None)
    return step.pairs if step else 0


def batches_per_epoch(trainer: "Trainer") -> int | None:
    """Return each rank's training batches per epoch, within the trainer's limit; None if unknown."""
    steps: int | None = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    limit = trainer.limit_train_batches
    if steps is None:
        return None
    return int(steps * limit) if isinstance(limit, float) else min(steps, limit)


def total_steps(trainer: "Trainer", epochs_before: int = 0, steps_before: int = 0) -> int:
    """Return the optimiser steps of the whole run; -1 if the length of the data is unknown.

    Epochs before the one in which a run resumes count with the steps that they took, perhaps of another batch size.
    Counted from the data module's ``steps_per_epoch`` where it has one: Lightning's ``estimated_stepping_batches`` sets
    up the data loaders early, and a loader that was resumed would lose its position.
    """
    batches = batches_per_epoch(trainer)
    if batches is None:
        return int(trainer.estimated_stepping_batches)
    per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    epochs = trainer.max_epochs
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if epochs is not None and epochs >= 0:
        bounds.append(steps_before + max(0, epochs - epochs_before) * per_epoch)
    return max(1, min(bounds, default=per_epoch * 1000))


def known_steps(trainer: "Trainer") -> int | None:
    """Return :func:`total_steps`; None if the length of the data is unknown, or only time limits the run."""
    limited = trainer.max_steps >= 0 or (trainer.max_epochs is not None and trainer.max_epochs >= 0)
    steps = total_steps(trainer, *resumed_after(trainer)) if limited else -1
    return steps if steps >= 0 else None


def resumed_after(trainer: "Trainer") -> tuple[int, int]:
    """Return the complete epochs before the run was resumed, and their steps, maybe with another batch size."""
    return getattr(getattr(trainer, "lightning_module", None), "resumed_after", (0, 0))
