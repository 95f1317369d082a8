"""The paper's AdamW, the rule of weight decay, parameter groups, and the number of steps of a run."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_clip.errors import InputError, require
from lit_clip.tools.untrusted import shortened

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

OptimizerFactory = Callable[[Iterable], Optimizer]
"""Creates an optimiser of parameter groups."""
MAKE_BATCHES = (
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "training_step"),
    *("sources", "training_pairs", "train_dataloader"),
)
OURS = {"lightning", "lit_clip", "datamodules"}
Decays = Callable[[str, nn.Parameter], bool]
"""Returns whether a parameter, given with its name in the model, has weight decay."""


class PaperAdamW(torch.optim.AdamW):
    """AdamW; the defaults are the paper's for a ViT (table 18).

    Args:
        params: parameter groups.
        lr: learning rate at the end of the warm-up (table 20: 5e-4 for ViT-B at 32,768 pairs a step).
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: applied to weights, not to gains and biases.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)


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


def trial(optimizer: OptimizerFactory, option: str = "model.optimizer") -> Optimizer:
    """Create an optimiser of one 8 x 8 matrix, to see its class and settings before there is a run."""
    try:
        made = optimizer([nn.Parameter(torch.zeros(8, 8))])
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{option}: {' '.join(str(error).split())}") from error
    require(isinstance(made, Optimizer), f"{option}: creates a {type(made).__name__}, not a torch optimiser")
    require(made.defaults.get("lr") is not None, f"{option}: {type(made).__name__} has no learning rate; set its lr")
    return made


def moments(optimizer: OptimizerFactory) -> int | None:
    """Return how many numbers an optimiser keeps for each number of a weight matrix; None if that is not known."""
    made = trial(optimizer)
    (parameter,) = made.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    try:
        made.step()
    except Exception:  # some need a closure, or whatever else
        return None
    sizes = (value.numel() for value in made.state[parameter].values() if isinstance(value, torch.Tensor))
    return sum(size for size in sizes if size > 1) // parameter.numel()


def is_elementwise(optimizer: OptimizerFactory) -> bool:
    """Return whether an optimiser treats each number of a weight by itself, so that it can be given a flat shard.

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


def decay_groups(
    module: nn.Module, weight_decay: float, decays: Decays = EXCEPT_GAINS_AND_BIASES
) -> list[dict[str, Any]]:
    """Return a module's trainable parameters in two groups: with and without weight decay."""
    return _decay_groups([(name, p) for name, p in module.named_parameters() if p.requires_grad], weight_decay, decays)


def _decay_groups(
    named: Sequence[tuple[str, nn.Parameter]], weight_decay: float | None, decays: Decays
) -> list[dict[str, Any]]:
    answers = [decays(name, parameter) for name, parameter in named]
    groups = []
    for kind, decay in ((True, weight_decay), (False, 0.0)):
        params = [parameter for (_, parameter), answer in zip(named, answers, strict=True) if bool(answer) is kind]
        groups.append({"params": params} | ({} if weight_decay is None else {"weight_decay": decay}))
    return groups


def parameter_groups(
    module: nn.Module,
    layers: Iterable[tuple[str, float, Sequence[nn.Parameter]]],
    defaults: Mapping[str, Any],
    decays: Decays,
) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups, at most two for each layer; frozen parameters are in none.

    Args:
        module: whose parameters these are; without the prefix of LitCLIP's ``model`` in their names.
        layers: name, factor on the learning rate, parameters.
        defaults: the optimiser's own settings: learning rate at factor 1, and weight decay if it has any.
        decays: the rule of weight decay.

    Returns:
        Groups with ``name``, ``lr`` and ``weight_decay``; none is empty.
    """
    names = {id(parameter): name.removeprefix("model.") for name, parameter in module.named_parameters()}
    groups = []
    for layer, factor, parameters in layers:
        named = [(names[id(parameter)], parameter) for parameter in parameters if parameter.requires_grad]
        both = _decay_groups(named, defaults.get("weight_decay"), decays)
        for kind, group in zip(("", ", no decay"), both, strict=True):
            if group["params"]:
                groups.append({"name": layer + kind, "lr": defaults["lr"] * factor, **group})
    return groups


def batches_per_epoch(trainer: "Trainer") -> int | None:
    """Return each rank's training batches per epoch, within the trainer's limit; None if unknown."""
    steps: int | None = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    limit = trainer.limit_train_batches
    if steps is None:
        return None
    return int(steps * limit) if isinstance(limit, float) else min(steps, limit)


def even_batches(trainer: "Trainer", negatives: bool) -> int | None:
    """Return the number of pairs in each rank's every training batch, if the data module guarantees it; else None.

    It does if bad samples end the run (``on_error: error``) and its sampler divides global batches among the ranks.

    Args:
        trainer: the run's.
        negatives: whether hard negatives matter; then files must be known to have none, as their number may differ,
            and nobody's hook may add them.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if getattr(data, "on_error", None) != "error":
        return None
    if negatives and not (getattr(data, "negative_column", "unknown") is None and isinstance(data.train, str)):
        return None
    if negatives and _makes_batches(trainer.lightning_module, data):
        return None
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    world = getattr(sampler, "world", None)
    return getattr(sampler, "batch_size", None) if world == trainer.world_size else None


def _makes_batches(*owners: Any) -> bool:
    """Return whether a method of a module or data module by which a batch may get hard negatives is not one of ours."""
    methods = [getattr(owner, name, None) for owner in owners for name in MAKE_BATCHES]
    packages = {str(getattr(method, "__module__", "")).partition(".")[0] for method in methods if method is not None}
    return not packages <= OURS


def total_steps(trainer: "Trainer") -> int:
    """Return the optimiser steps of the whole run.

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
        bounds.append(epochs * per_epoch)
    return max(1, min(bounds, default=per_epoch * 1000))


def skip_step(module: nn.Module) -> None:
    """Remove all gradients, so that the optimiser step changes neither weights nor moments nor its step count."""
    for parameter in module.parameters():
        parameter.grad = None


def lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Give an optimiser's loaded state the strides of its parameters; fused kernels do not look at them.

    A checkpoint may come from a device on which the weights had another memory format.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def obeys_found_inf(optimizer: Optimizer, device: torch.device) -> bool:
    """Return whether an optimiser's step changes nothing if its ``found_inf``, a scalar on the device, is 1.

    Torch's gradient scaler uses this with fused kernels. Fused SGD is left out: it would begin with a momentum that
    nobody has set; and so are weights that FSDP keeps on the host, whose kernel would not wait for the scalar.
    """
    torchs = type(optimizer).step.__module__.startswith("torch.optim.") and isinstance(optimizer, torch.optim.Adam)
    groups = optimizer.param_groups
    return torchs and all(group["fused"] and p.device.type == device.type for group in groups for p in group["params"])
