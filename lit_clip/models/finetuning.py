"""What fine-tuning freezes, and what is trained at a rate of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lit_clip.errors import InputError, require
from lit_clip.models.layers import HEAD, TOWERS, layer_groups


@dataclass
class UnlockLast:
    """All of a tower is frozen but its head and its last blocks.

    Attributes:
        unlock_last: how many blocks; 0: the head alone learns.
    """

    unlock_last: int

    def __post_init__(self) -> None:
        require(self.unlock_last >= 0, f"model.freeze: unlock_last {self.unlock_last} must be at least 0")


@dataclass
class Freeze:
    """What does not learn.

    ``{image: all}`` is locked-image tuning (LiT, Zhai et al. 2022).

    Attributes:
        image: of the image tower: None for nothing, ``all``, or ``{unlock_last: n}``.
        text: likewise.
    """

    image: Literal["all"] | UnlockLast | None = None
    text: Literal["all"] | UnlockLast | None = None

    def __post_init__(self) -> None:
        for tower in TOWERS:
            value = getattr(self, tower)
            if isinstance(value, Mapping):  # as a checkpoint holds it
                setattr(self, tower, UnlockLast(**value))


@dataclass
class LayerDecay:
    """The learning rate of each layer relative to the one behind it; a tower's head has the full rate.

    Attributes:
        image: of the image tower, above 0 and at most 1.
        text: of the text tower.
    """

    image: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        for tower in TOWERS:
            value = getattr(self, tower)
            require(0 < value <= 1, f"model.layer_decay: {tower} {value} must be above 0 and at most 1")


def frozen_names(model: Any, freeze: Freeze) -> set[str]:
    """Names of the parameters that do not learn.

    Raises:
        InputError: more blocks to be unlocked than there are.
    """
    frozen: set[str] = set()
    for tower in TOWERS:
        wish: str | UnlockLast | None = getattr(freeze, tower)
        if wish is None:
            continue
        groups = layer_groups(model, tower)
        if isinstance(wish, UnlockLast):
            blocks = sum(group.name.startswith("blocks.") for group in groups)
            if wish.unlock_last > blocks:
                raise InputError(
                    f"model.freeze.{tower}: unlock_last {wish.unlock_last}, but the tower has {blocks} blocks"
                )
            first = len([group for group in groups if group.name != HEAD]) - wish.unlock_last
            groups = groups[:first]
        frozen |= {name for group in groups for name in group.parameters}
    return frozen


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that stay in evaluation mode.

    Those whose parameters are all frozen; and those without parameters (dropout) up to the last of them, within its
    tower: they belong to layers that are frozen.
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
    return [modules[name] for name in result]


def learning_rate_factors(model: Any, decay: LayerDecay | None) -> list[tuple[str, float, list[nn.Parameter]]]:
    """Layers with the factor on their learning rate, the largest first; together each parameter of the model once."""
    everything: dict[str, nn.Parameter] = dict(model.named_parameters())
    if decay is None:
        return [("all", 1.0, list(everything.values()))]
    layers: list[tuple[str, float, list[nn.Parameter]]] = []
    for tower in TOWERS:
        groups = layer_groups(model, tower)
        for depth, group in enumerate(reversed(groups)):
            factor = getattr(decay, tower) ** (depth if groups[-1].name == HEAD else depth + 1)
            layers.append((f"{tower}.{group.name}", factor, [everything.pop(name) for name in group.parameters]))
    layers.append(("logits", 1.0, list(everything.values())))
    return sorted(layers, key=lambda layer: -layer[1])
