"""Freezing and layer-wise learning rates for fine-tuning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.errors import require
from lit_clip.models.custom import CustomImageEncoder, CustomTextEncoder
from lit_clip.models.layers import HEAD, TOWERS, layer_groups, tower_encoder, tower_parameters
from lit_clip.tools.untrusted import check_fields, from_plain


@dataclass
class UnlockLast:
    """Freeze a tower except its head and its last blocks.

    Attributes:
        unlock_last: number of trainable blocks; 0: only the head is trainable.
    """

    unlock_last: int

    def __post_init__(self) -> None:
        check_fields(self, "model.freeze", {"unlock_last": (0, math.inf)})


@dataclass
class Freeze:
    """The frozen part of each tower.

    ``{image: all}`` is locked-image tuning (LiT, Zhai et al. 2022).

    Attributes:
        image: None for nothing, ``all``, or ``{unlock_last: n}``.
        text: None for nothing, ``all``, or ``{unlock_last: n}``.
        batch_norm: whether BatchNorm keeps its running statistics, and uses them, in trained layers too. Those of new
            images make a pretrained model forget at any learning rate (docs/finetuning.md).
    """

    image: Literal["all"] | UnlockLast | None = None
    text: Literal["all"] | UnlockLast | None = None
    batch_norm: bool = False

    def __post_init__(self) -> None:
        for tower in TOWERS:
            value = getattr(self, tower)
            if isinstance(value, Mapping):  # from a checkpoint
                setattr(self, tower, from_plain(UnlockLast, value, f"model.freeze.{tower}"))
        check_fields(self, "model.freeze", {})


@dataclass
class LayerDecay:
    """Each layer's learning rate as a fraction of the next layer's; the head has the full rate.

    Attributes:
        image: for the image tower, above 0 and at most 1.
        text: for the text tower, above 0 and at most 1.
    """

    image: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "model.layer_decay", {})
        for tower in TOWERS:
            value = getattr(self, tower)
            require(0 < value <= 1, f"model.layer_decay: {tower} {value} must be above 0 and at most 1")


def frozen_names(model: Any, freeze: Freeze) -> set[str]:
    """Return the names of the parameters to freeze."""
    frozen: set[str] = set()
    for tower in TOWERS:
        setting: str | UnlockLast | None = getattr(freeze, tower)
        if isinstance(setting, str):
            frozen |= tower_parameters(model, tower).keys()
        elif setting is not None:
            groups = layer_groups(model, tower)
            blocks = sum(group.name.startswith("blocks.") for group in groups)
            more = f"unlock_last {setting.unlock_last}, but the tower has {blocks} blocks"
            require(setting.unlock_last <= blocks, f"model.freeze.{tower}: {more}")
            first = len([group for group in groups if group.name != HEAD]) - setting.unlock_last
            frozen |= {name for group in groups[:first] for name in group.parameters}
    return frozen


def frozen_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that must stay in evaluation mode, by name.

    These are the modules whose parameters are all frozen, and modules without parameters (dropout) that come before the
    last of them in its tower: they belong to frozen layers.
    """
    modules = dict(model.named_modules())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def within(name: str, names: set[str]) -> bool:
        return any(member.startswith(f"{name}.") for member in names)

    result = [name for name in modules if name and within(name, frozen) and not within(name, trained)]
    for visual in (True, False):
        tower = [name for name in modules if f"{name}.".startswith("visual.") == visual]
        last = max((tower.index(name) for name in result if name in tower), default=-1)
        result += [name for name in tower[: last + 1] if next(modules[name].parameters(), None) is None]
    return {name: modules[name] for name in result}


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the BatchNorm layers, for ``Freeze.batch_norm``."""
    found = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    require(bool(found), "model.freeze.batch_norm: the encoders have no BatchNorm; leave it out")
    return found


def learning_rate_factors(model: Any, decay: LayerDecay | None) -> list[tuple[str, float, list[nn.Parameter]]]:
    """Return layers with the factor on their learning rate, largest first; each parameter of the model is in one."""
    everything: dict[str, nn.Parameter] = dict(model.named_parameters())
    if decay is None:
        return [("all", 1.0, list(everything.values()))]
    layers: list[tuple[str, float, list[nn.Parameter]]] = []
    for tower in TOWERS:
        if getattr(decay, tower) == 1 and isinstance(
            tower_encoder(model, tower), CustomImageEncoder | CustomTextEncoder
        ):
            members = tower_parameters(model, tower)  # its layers may be unknown, and need not be known
            layers.append((tower, 1.0, [everything.pop(name) for name in members]))
            continue
        groups = layer_groups(model, tower)
        for depth, group in enumerate(reversed(groups)):
            factor = getattr(decay, tower) ** (depth if groups[-1].name == HEAD else depth + 1)
            layers.append((f"{tower}.{group.name}", factor, [everything.pop(name) for name in group.parameters]))
    layers.append(("logits", 1.0, list(everything.values())))
    return sorted(layers, key=lambda layer: -layer[1])
