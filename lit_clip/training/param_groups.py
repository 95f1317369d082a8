"""Parameter groups: which parameters have weight decay, and each layer's learning rate."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lit_clip.errors import require
from lit_clip.models.rates import Layer
from lit_clip.tools.untrusted import shortened

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
        named = [(names[id(parameter)], parameter) for parameter in layer.parameters if parameter.requires_grad]
        factor = layer.rate.weight_decay
        none = f"model.rates.{layer.part}: weight_decay {factor:g} of none; set model.optimizer.weight_decay"
        require(bool(whole) or factor in (0, 1), none)
        both = _decay_groups(named, whole and whole * factor, decays)
        for kind, group in zip(("", ", no decay"), both, strict=True):
            if group["params"]:
                groups.append({"name": layer.name + kind, "lr": defaults["lr"] * layer.rate.lr, **group})
    require(bool(groups), "model.freeze: freezes everything, so nothing is trained; leave a part out")
    return groups
