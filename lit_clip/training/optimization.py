"""A run's optimiser, schedule and rule of weight decay, whichever they are: created, described, and resumed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_clip.errors import InputError, require
from lit_clip.tools.parts import Description, describe, describe_instance
from lit_clip.tools.untrusted import check_entries, factory_of, is_like, is_trusted, shortened
from lit_clip.training.optim import (
    Decays,
    ExceptGainsAndBiases,
    OptimizerFactory,
    PaperAdamW,
    lay_out_like_parameters,
    parameter_groups,
    total_steps,
    trial,
)
from lit_clip.training.schedules import ScheduleFactory, advance, create_schedule, needs_total_steps

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Groups = Sequence[Mapping[str, Any]]
# The arguments of LitCLIP that are a class with its own arguments, and what a checkpoint may name there.
KINDS: dict[str, type] = {"optimizer": Optimizer, "lr_scheduler": LRScheduler, "decay": ExceptGainsAndBiases}


class Optimization:
    """The optimiser, the schedule and the rule of weight decay of a run.

    Each part may be given as a description from a checkpoint; it is then imported when training starts.

    Args:
        optimizer: creates the optimiser of parameter groups.
        lr_scheduler: creates the schedule of the optimiser.
        decay: which parameters have weight decay.

    Attributes:
        descriptions: class and arguments of each, as plain values.

    Raises:
        InputError: a part cannot be created with its settings.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | Description,
        lr_scheduler: ScheduleFactory | Description,
        decay: Decays | Description,
    ) -> None:
        self._optimizer, self._lr_scheduler, self._decay = optimizer, lr_scheduler, decay
        require(
            isinstance(decay, Mapping) or callable(decay),
            f"model.decay: {decay!r} is no function",
        )
        usable = not isinstance(optimizer, Mapping) or is_trusted(optimizer, Optimizer)
        self.descriptions = {
            "optimizer": dict(optimizer) if isinstance(optimizer, Mapping) else describe(optimizer, trial(optimizer)),
            "lr_scheduler": dict(lr_scheduler)
            if isinstance(lr_scheduler, Mapping)
            else _describe_schedule(lr_scheduler, self.optimizer if usable else PaperAdamW),
            "decay": dict(decay) if isinstance(decay, Mapping) else describe_instance(decay),
        }

    @property
    def optimizer(self) -> OptimizerFactory:
        """The optimiser's factory.

        Raises:
            InputError: a checkpoint names it, and may not.
        """
        return factory_of(self._optimizer, "model.optimizer", Optimizer)

    @property
    def lr(self) -> float:
        """The learning rate at factor 1."""
        return float(trial(self.optimizer).defaults["lr"])

    def groups(
        self, module: nn.Module, layers: Iterable[tuple[str, float, Sequence[nn.Parameter]]]
    ) -> list[dict[str, Any]]:
        """Return a module's parameter groups, see :func:`lit_clip.training.optim.parameter_groups`."""
        decay = (
            factory_of(self._decay, "model.decay", ExceptGainsAndBiases)()
            if isinstance(self._decay, Mapping)
            else self._decay
        )
        return parameter_groups(module, layers, trial(self.optimizer).defaults, decay)

    def configure(self, groups: Groups, trainer: "Trainer") -> dict[str, Any]:
        """Return the optimiser and its schedule in Lightning's form.

        Torch's Adam, AdamW and SGD use their fused kernels unless ``fused`` or ``foreach`` is set. The groups say so,
        not the optimiser: Lightning takes an optimiser that is created fused for one that unscales gradients by itself,
        and refuses to clip them.

        Raises:
            InputError: the optimiser does not take these parameters.
        """
        made = trial(self.optimizer)
        fusable = isinstance(made, torch.optim.Adam | torch.optim.SGD)  # AdamW is an Adam
        fused = fusable and made.defaults.get("fused") is None and made.defaults.get("foreach") is None
        try:
            optimizer = self.optimizer([{**group, "fused": True} if fused else dict(group) for group in groups])
        except (TypeError, ValueError) as error:
            torchs = isinstance(made, getattr(torch.optim, "Muon", ()))
            hint = "; timm.optim.Muon takes all parameters" if torchs else ""
            raise InputError(f"model.optimizer: {' '.join(str(error).split())}{hint}") from error
        if fusable:
            optimizer.register_load_state_dict_post_hook(lay_out_like_parameters)
        schedule = create_schedule(
            factory_of(self._lr_scheduler, "model.lr_scheduler", LRScheduler), optimizer, total_steps(trainer)
        )
        how: dict[str, Any] = {"interval": "step"}
        if isinstance(schedule, ReduceLROnPlateau):
            monitor = getattr(schedule, "monitor", "val/loss")
            how = {"interval": "epoch", "frequency": trainer.check_val_every_n_epoch or 1, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **how}}

    def resume(self, checkpoint: Mapping[str, Any], groups: Groups, layer_decay: Any, steps: int, name: str) -> None:
        """Overwrite a checkpoint's settings of the optimiser and schedule with this run's where they differ.

        A resumed run keeps its moments and its position; what an optimiser or a schedule has changed in the parameter
        groups stays unless it is set differently now.

        Args:
            checkpoint: changed in place.
            groups: this run's.
            layer_decay: this run's, as in the hyper-parameters.
            steps: optimiser steps of this run.
            name: of the checkpoint, for messages.

        Raises:
            InputError: the checkpoint has another optimiser or other parameter groups.
        """
        hparams, here = checkpoint["hyper_parameters"], self.descriptions
        there = hparams.get("optimizer") or {}
        former = there.get("class_path", "another optimiser")
        if former != here["optimizer"]["class_path"]:
            raise InputError(
                f"{name}: was trained with {former}, and this run has {here['optimizer']['class_path']}; "
                "resume with the same model.optimizer, or start from its weights with model.pretrained"
            )
        settings = here["optimizer"]["init_args"]
        changed = {key: value for key, value in settings.items() if there.get("init_args", {}).get(key) != value}
        rates = "lr" in changed or hparams.get("layer_decay") != layer_decay
        defaults = trial(self.optimizer).defaults
        for optimizer in checkpoint.get("optimizer_states", []):
            _check_state(optimizer, defaults, f"{name}: optimizer_states")
            _resume_groups(optimizer["param_groups"], groups, changed, rates, name)
        for schedule in checkpoint.get("lr_schedulers", []):
            self._check_schedule(schedule, groups, steps, f"{name}: lr_schedulers")
            same = hparams.get("lr_scheduler") == here["lr_scheduler"] and schedule.get("total_steps") in (None, steps)
            if not same:
                self._start_schedule(schedule, checkpoint, groups, steps)
            elif rates and "base_lrs" in schedule:
                schedule["base_lrs"] = [group["lr"] for group in groups]

    def _check_schedule(self, saved: Mapping[str, Any], groups: Groups, steps: int, where: str) -> None:
        """Check a saved schedule's values against a new one's, which torch would overwrite with whatever they are."""
        optimizer = self.optimizer([{**group, "params": [nn.Parameter(torch.zeros(8, 8))]} for group in groups])
        factory = factory_of(self._lr_scheduler, "model.lr_scheduler", LRScheduler)
        fresh = create_schedule(factory, optimizer, steps).state_dict()
        for key, value in fresh.items():
            theirs = saved.get(key, value)
            possible = is_like(theirs, value) and (key not in ("base_lrs", "_last_lr") or len(theirs) == len(value))
            require(possible, f"{where}: {key} {shortened(theirs)} is not possible")

    def _start_schedule(
        self, schedule: dict[str, Any], checkpoint: Mapping[str, Any], groups: Groups, steps: int
    ) -> None:
        """Replace a saved schedule by this run's at the same step, as if the whole run had had it.

        Torch's schedules change a rate when they are stepped, most of them from the rate before; the first resumed step
        would have the old schedule's rate, and many schedules would go on from it.
        """
        position = schedule["last_epoch"] if "_step_count" in schedule else checkpoint["global_step"]
        optimizer = self.optimizer([{**group, "params": [nn.Parameter(torch.zeros(8, 8))]} for group in groups])
        before = [dict(group) for group in optimizer.param_groups]
        factory = factory_of(self._lr_scheduler, "model.lr_scheduler", LRScheduler)
        made = create_schedule(factory, optimizer, steps)
        advance(made, position)
        schedule.clear()
        schedule |= made.state_dict()
        for saved in checkpoint.get("optimizer_states", []):
            for group, old, new in zip(saved["param_groups"], before, optimizer.param_groups, strict=True):
                changed = {key: new[key] for key in new if key != "params" and (key not in old or old[key] != new[key])}
                group |= {"lr": new["lr"]} | changed  # and the momentum, of some


def _describe_schedule(schedule: ScheduleFactory, optimizer: Callable[..., Any]) -> Description:
    """Return the class and the settings of the schedule that a factory creates; not the run's number of steps."""
    option = "model.lr_scheduler"
    try:
        made = create_schedule(schedule, trial(optimizer), 1000)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{option}: {' '.join(str(error).split())}") from error
    require(hasattr(made, "step"), f"{option}: creates a {type(made).__name__}, not a learning rate schedule")
    description = describe(schedule, made)
    for position in ("last_epoch", *(["total_steps"] if needs_total_steps(schedule) else [])):
        description["init_args"].pop(position, None)
    return description


def _resume_groups(
    saved: list[dict[str, Any]], groups: Groups, changed: Mapping[str, Any], rates: bool, name: str
) -> None:
    if [_shape(group) for group in saved] != [_shape(group) for group in groups]:
        raise InputError(f"{name}: resume with the model.freeze, layer_decay, lora and decay of the run that wrote it")
    for group, ours in zip(saved, groups, strict=True):
        if rates:  # otherwise they are the schedule's: torch's OneCycleLR has an initial_lr of its own
            group["lr"] *= ours["lr"] / (group["initial_lr"] or 1.0)
            group["initial_lr"] = ours["lr"]
        group |= {key: value for key, value in changed.items() if key in group and key != "lr"}
        group["name"] = ours["name"]
        if "weight_decay" in ours:  # that of a group need not be that of the settings
            group["weight_decay"] = ours["weight_decay"]


def _check_state(saved: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Check a saved optimiser's settings against a new one's; flags, which no run changes, are the new one's."""
    _need(saved, {"state": dict[object, object], "param_groups": list[dict[str, object]]}, where)
    for group in saved["param_groups"]:
        _need(group, {"name": str, "params": list[object], "lr": object}, where)
        for key in defaults.keys() & group.keys():
            value, sample = group[key], defaults[key]
            if isinstance(sample, bool):
                group[key] = sample
            elif key in ("foreach", "fused"):
                require(value is None or isinstance(value, bool), f"{where}: {key} {shortened(value)} is no flag")
            else:
                possible = is_like(value, sample) and (not isinstance(sample, tuple) or len(value) == len(sample))
                require(possible, f"{where}: {key} {shortened(value)} is not possible")


def _need(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    check_entries(values, types, where)
    for name in types:
        require(name in values, f"{where}: lacks {name}")


def _shape(group: Mapping[str, Any]) -> tuple[str, int]:
    """Return a parameter group's layer and its number of parameters."""
    return group["name"].partition(",")[0], len(group["params"])
