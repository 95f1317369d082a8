"""Optimisers: the paper's; a run's, with its schedule, created, described, resumed; and groups by decay and rate."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_clip.errors import InputError, require
from lit_clip.models.rates import Layer, Rates, rated_layers
from lit_clip.tools.parts import Description, describe, describe_instance, plain
from lit_clip.tools.untrusted import convert, entries, like, shortened
from lit_clip.training.schedules import (
    ScheduleFactory,
    WarmupCosine,
    advance,
    create_schedule,
    needs_total_steps,
    total_steps,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


Decays = Callable[[str, nn.Parameter], bool]
"""Returns whether a parameter, given with its name in the model, has weight decay."""


class ExceptGainsAndBiases:
    """Weight decay on "all weights that are not gains or biases" (paper, section 2.5).

    As in open_clip, parameters with fewer than two dimensions have none: LayerNorm's, biases, the class token and
    ``logit_scale``; nor have those with certain names.

    Args:
        exempt: parts of names; ``bias`` also covers the tables of position biases of Swin and MPNet. open_clip's are
            ``[bias, ln, bn, logit_scale]``.
    """

    def __init__(self, exempt: Sequence[str] = ("bias",)) -> None:
        listed = isinstance(exempt, list | tuple) and all(isinstance(part, str) for part in exempt)
        require(listed, f"model.decay: exempt {shortened(exempt)} must be a list of texts")  # a text is one, of letters
        self.exempt = tuple(exempt)

    def __call__(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not any(part in name for part in self.exempt)


EXCEPT_GAINS_AND_BIASES = ExceptGainsAndBiases()


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float | None, decays: Decays = EXCEPT_GAINS_AND_BIASES
) -> list[dict[str, Any]]:
    """Return the trainable ones of named parameters in two groups: with and without weight decay."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    answers = [decays(name, parameter) for name, parameter in trained]
    groups = []
    for kind, decay in ((True, weight_decay), (False, 0.0)):
        params = [parameter for (_, parameter), answer in zip(trained, answers, strict=True) if bool(answer) is kind]
        groups.append({"params": params} | ({} if weight_decay is None else {"weight_decay": decay}))
    return groups


def parameter_groups(
    module: nn.Module,
    layers: Iterable[Layer],
    defaults: Mapping[str, Any],
    decays: Decays,
) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups, at most two per layer; frozen parameters are in none.

    Args:
        module: whose parameters these are.
        layers: the parameters, with factors of learning rate and weight decay.
        defaults: the optimiser's own settings: learning rate at factor 1, and weight decay if it has any.
        decays: the rule of weight decay, which is given names without the prefix of LitCLIP's ``model``.
    """
    names = {id(parameter): name.removeprefix("model.") for name, parameter in module.named_parameters()}
    groups, whole = [], defaults.get("weight_decay")
    for layer in layers:
        named = ((names[id(parameter)], parameter) for parameter in layer.parameters)
        factor = layer.rate.weight_decay
        none = f"model.rates.{layer.part}: weight_decay {factor:g} of none; set model.optimizer.weight_decay"
        require(bool(whole) or factor in (0, 1), none)
        both = decay_groups(named, whole and whole * factor, decays)
        for kind, group in zip(("", ", no decay"), both, strict=True):
            if group["params"]:
                groups.append({"name": layer.name + kind, "lr": defaults["lr"] * layer.rate.lr, **group})
    require(bool(groups), "model.freeze: freezes everything, so nothing is trained; leave a part out")
    return groups


OptimizerFactory = Callable[[Iterable], Optimizer]
"""Creates an optimiser of parameter groups; jsonargparse makes one of a class path and its arguments."""
Groups = Sequence[Mapping[str, Any]]
PARTS = ("optimizer", "lr_scheduler", "decay")  # the arguments of LitCLIP that are kept here


class PaperAdamW(torch.optim.AdamW):
    """AdamW with the paper's defaults for a ViT (table 18; table 20: 5e-4 for ViT-B at 32,768 pairs a step)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)


def probe_optimizer(optimizer: OptimizerFactory, option: str = "model.optimizer") -> Optimizer:
    """Create an optimiser of one 8 x 8 matrix, to learn its class and settings before a run."""
    try:
        made = optimizer([nn.Parameter(torch.zeros(8, 8))])
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{option}: {' '.join(str(error).split())}") from error
    require(isinstance(made, Optimizer), f"{option}: creates a {type(made).__name__}, not a torch optimiser")
    require(made.defaults.get("lr") is not None, f"{option}: {type(made).__name__} has no learning rate; set its lr")
    return made


def state_per_weight(optimizer: OptimizerFactory) -> int | None:
    """Return how many numbers an optimiser keeps for each number of a weight matrix; None if unknown."""
    made = probe_optimizer(optimizer)
    (parameter,) = made.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    try:
        made.step()
    except Exception:  # some need a closure
        return None
    sizes = (value.numel() for value in made.state[parameter].values() if isinstance(value, torch.Tensor))
    return sum(size for size in sizes if size > 1) // parameter.numel()


def is_elementwise(optimizer: OptimizerFactory) -> bool:
    """Return whether an optimiser treats each number of a weight separately, so that shards can be flat.

    Found by two steps on a matrix, and on the flat halves of its copy. Muon and LAMB need whole matrices.
    """
    generator = torch.Generator().manual_seed(0)
    matrix, *gradients = torch.randn(3, 8, 8, generator=generator)
    whole = [nn.Parameter(matrix.clone())]
    shards = [nn.Parameter(half.clone()) for half in matrix.flatten().chunk(2)]
    try:
        for parameters in (whole, shards):
            made = optimizer([{"params": parameters}])
            for gradient in gradients:
                for parameter, part in zip(parameters, gradient.flatten().chunk(len(parameters)), strict=True):
                    parameter.grad = part.reshape(parameter.shape).clone()
                made.step()
    except Exception:  # torch's Muon refuses anything but matrices
        return False
    return torch.allclose(whole[0].flatten(), torch.cat([*shards]), rtol=1e-5, atol=1e-7)


def skip_step(module: nn.Module) -> None:
    """Remove all gradients, so that the optimiser step changes no weights, moments or step count."""
    for parameter in module.parameters():
        parameter.grad = None


def lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Give an optimiser's loaded state its parameters' strides; fused kernels do not check them.

    A checkpoint may come from a device on which the weights had another memory format.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def obeys_found_inf(optimizer: Optimizer, device: torch.device) -> bool:
    """Return whether an optimiser's step changes nothing if ``found_inf``, a scalar on the device, is 1.

    Torch's gradient scaler uses this with fused kernels. Fused SGD is left out: it would begin with a momentum that
    nobody has set; and so are weights that FSDP keeps on the host, whose kernel would not wait for the scalar.
    """
    torchs = type(optimizer).step.__module__.startswith("torch.optim.") and isinstance(optimizer, torch.optim.Adam)
    groups = optimizer.param_groups
    return torchs and all(group["fused"] and p.device.type == device.type for group in groups for p in group["params"])


class Optimization:
    """The optimiser, the schedule and the weight decay rule of a run."""

    def __init__(
        self,
        optimizer: OptimizerFactory,
        lr_scheduler: ScheduleFactory,
        decay: Decays,
        rates: Rates | None = None,
    ) -> None:
        if not callable(decay):
            raise InputError(f"model.decay: {decay!r} is no function")
        self.optimizer, self._lr_scheduler, self._decay = optimizer, lr_scheduler, decay
        self.rates = rates
        self._resumed_steps: int | None = None  # of the whole run, from the checkpoint it resumes from
        if optimizer is not PaperAdamW or lr_scheduler is not WarmupCosine:  # what is set may be impossible
            _ = self.descriptions  # which makes them, and raises

    @cached_property
    def descriptions(self) -> dict[str, Description]:
        """Class and settings of optimiser, schedule and weight decay rule, as plain values."""
        return {
            "optimizer": describe(self.optimizer, probe_optimizer(self.optimizer)),
            "lr_scheduler": _describe_schedule(self._lr_scheduler, self.optimizer),
            "decay": describe_instance(self._decay),
        }

    def groups(self, module: Any) -> list[dict[str, Any]]:
        """Return the parameter groups of a module's ``model`` and ``loss``; the loss is rated as the head."""
        own = Layer("loss", "head", (self.rates or Rates()).of("head"), list(module.loss.parameters()))
        layers = [*rated_layers(module.model, self.rates), own]
        return parameter_groups(module, layers, probe_optimizer(self.optimizer).defaults, self._decay)

    def configure(self, groups: Groups, trainer: "Trainer") -> dict[str, Any]:
        """Return the optimiser and its schedule in Lightning's form.

        Torch's Adam, AdamW and SGD use their fused kernels unless ``fused`` or ``foreach`` is set. The groups say so,
        not the optimiser: Lightning takes an optimiser that is created fused for one that unscales gradients by itself,
        and refuses to clip them.
        """
        made = probe_optimizer(self.optimizer)  # a factory does not show its settings, an optimiser does
        fusable = isinstance(made, torch.optim.Adam | torch.optim.SGD)  # AdamW is an Adam
        fused = fusable and made.defaults.get("fused") is None and made.defaults.get("foreach") is None
        own = {"fused": True} if fused else {}
        try:  # each group has a rate of its own, in place of the factory's; not every schedule keeps the first one
            optimizer = self.optimizer([{**group, "initial_lr": group["lr"], **own} for group in groups])
        except (TypeError, ValueError) as error:
            torchs = isinstance(made, getattr(torch.optim, "Muon", ()))
            hint = "; timm.optim.Muon takes all parameters" if torchs else ""
            raise InputError(f"model.optimizer: {' '.join(str(error).split())}{hint}") from error
        if fusable:
            optimizer.register_load_state_dict_post_hook(lay_out_like_parameters)
        steps = self._resumed_steps or total_steps(trainer)  # Lightning has called resume before
        self._resumed_steps = None
        schedule = create_schedule(self._lr_scheduler, optimizer, steps)
        _check_rates(groups, optimizer.param_groups, type(schedule).__name__)
        how: dict[str, Any] = {"interval": "step"}
        if isinstance(schedule, ReduceLROnPlateau):
            monitor = getattr(schedule, "monitor", "val/loss")
            how = {"interval": "epoch", "frequency": trainer.check_val_every_n_epoch or 1, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **how}}

    def resume(self, checkpoint: Mapping[str, Any], groups: Groups, steps: int, name: str) -> None:
        """Overwrite a checkpoint's optimiser and schedule settings with this run's where they differ.

        A resumed run keeps its moments and its position; what an optimiser or a schedule has changed in the parameter
        groups stays unless the setting, or its default, is another one now.
        """
        self._resumed_steps = steps
        here, there = self.descriptions, checkpoint["parts"]
        former = there["optimizer"]["init_args"]
        changed = {k: value for k, value in here["optimizer"]["init_args"].items() if former.get(k) != value}
        factors = self.rates and plain(asdict(self.rates))
        rates = "lr" in changed or checkpoint["hyper_parameters"].get("rates") != factors
        defaults = probe_optimizer(self.optimizer).defaults
        for optimizer in checkpoint.get("optimizer_states", []):
            _check_state(optimizer, defaults, f"{name}: optimizer_states")
            _resume_groups(optimizer["param_groups"], groups, changed, rates, name)
        for schedule in checkpoint.get("lr_schedulers", []):
            self._check_schedule(schedule, groups, steps, f"{name}: lr_schedulers")
            same = there["lr_scheduler"] == here["lr_scheduler"] and schedule.get("total_steps") in (None, steps)
            if not same:
                self._start_schedule(schedule, checkpoint, groups, steps)
            elif rates and "base_lrs" in schedule:
                schedule["base_lrs"] = [group["lr"] for group in groups]

    def _check_schedule(self, saved: Mapping[str, Any], groups: Groups, steps: int, where: str) -> None:
        """Check a saved schedule's values against a new one's; torch would load them unchecked."""
        optimizer = self.optimizer([{**group, "params": [nn.Parameter(torch.zeros(8, 8))]} for group in groups])
        fresh = create_schedule(self._lr_scheduler, optimizer, steps).state_dict()
        convert(saved, entries({key: like(value) for key, value in fresh.items()}), where)
        for key in ("base_lrs", "_last_lr"):
            if len(saved.get(key, groups)) != len(groups):
                raise InputError(f"{where}.{key}: {shortened(saved[key])} must be {len(groups)} rates")

    def _start_schedule(
        self, schedule: dict[str, Any], checkpoint: Mapping[str, Any], groups: Groups, steps: int
    ) -> None:
        """Replace a saved schedule by this run's at the same step, as if it had been used from the start.

        Most of torch's schedules change a rate from the rate before, and would go on from the old schedule's.
        """
        position = schedule["last_epoch"] if "_step_count" in schedule else checkpoint["global_step"]
        optimizer = self.optimizer([{**group, "params": [nn.Parameter(torch.zeros(8, 8))]} for group in groups])
        before = [dict(group) for group in optimizer.param_groups]
        made = create_schedule(self._lr_scheduler, optimizer, steps)
        advance(made, position)
        schedule.clear()
        schedule |= made.state_dict()
        for saved in checkpoint.get("optimizer_states", []):
            for group, old, new in zip(saved["param_groups"], before, optimizer.param_groups, strict=True):
                changed = {key: new[key] for key in new if key != "params" and (key not in old or old[key] != new[key])}
                group |= {"lr": new["lr"]} | changed  # and the momentum, of some


def _describe_schedule(schedule: ScheduleFactory, optimizer: Callable[..., Any]) -> Description:
    """Return the class and settings of the schedule that a factory creates, without the run's number of steps."""
    option = "model.lr_scheduler"
    try:
        made = create_schedule(schedule, probe_optimizer(optimizer), 1000)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{option}: {' '.join(str(error).split())}") from error
    require(hasattr(made, "step"), f"{option}: creates a {type(made).__name__}, not a learning rate schedule")
    description = describe(schedule, made)
    for position in ("last_epoch", *(["total_steps"] if needs_total_steps(schedule) else [])):
        description["init_args"].pop(position, None)
    return description


def _check_rates(groups: Groups, scheduled: Groups, schedule: str) -> None:
    """Raise :class:`InputError` if a schedule replaced the groups' rates by a single one, as ``OneCycleLR`` does."""
    both = zip(groups, scheduled, strict=True)
    factors = [there.get("initial_lr", there["lr"]) / here["lr"] for here, there in both if here["lr"]]
    kept = not factors or math.isclose(min(factors), max(factors), rel_tol=1e-6)
    one = f"model.lr_scheduler: {schedule} has one rate for all parts"
    require(kept, f"{one}; leave out model.rates, or use another schedule")


def _resume_groups(
    saved: list[dict[str, Any]], groups: Groups, changed: Mapping[str, Any], rates: bool, name: str
) -> None:
    there, here = (
        [(group["name"].partition(",")[0], len(group["params"])) for group in each] for each in (saved, groups)
    )
    if there != here:
        raise InputError(
            f"{name}: resume with the model.freeze, parts of model.rates, lora and decay of the run that wrote it"
        )
    for group, ours in zip(saved, groups, strict=True):
        if rates:  # otherwise they are the schedule's: torch's OneCycleLR has an initial_lr of its own
            first = group.get("initial_lr", group["lr"]) or 1.0  # 0 where a rate of 0 froze it
            group["lr"] *= ours["lr"] / first  # what the schedule has made of it stays
            group["initial_lr"] = ours["lr"]
        group |= {key: value for key, value in changed.items() if key in group and key != "lr"}
        group["name"] = ours["name"]
        if "weight_decay" in ours:  # a group's need not be the one of the settings
            group["weight_decay"] = ours["weight_decay"]


def _check_state(saved: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Check a saved optimiser's settings against a new one's; take flags, which no run changes, from the new one."""
    group = entries({"name": str, "params": list[object], "lr": object}, total=True)
    convert(saved, entries({"state": dict[object, object], "param_groups": list[group]}, total=True), where)
    for group in saved["param_groups"]:
        for key in defaults.keys() & group.keys():
            if isinstance(defaults[key], bool):
                group[key] = defaults[key]
            else:
                kind = bool | None if key in ("foreach", "fused") else like(defaults[key])
                convert({key: group[key]}, dict[str, kind], where)
