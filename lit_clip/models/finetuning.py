"""Freezing for fine-tuning: trainable parameters, and modules that stay in evaluation mode."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.errors import InputError, require
from lit_clip.models.layers import HEAD, SCALARS, TOWERS, layer_groups, tower_parameters
from lit_clip.tools.untrusted import Count, check_fields, from_plain


@dataclass
class UnlockLast:
    """Freeze a tower except its head and its last blocks.

    Attributes:
        unlock_last: number of trainable blocks; 0: only the head is trainable.
    """

    unlock_last: Count

    def __post_init__(self) -> None:
        check_fields(self, "model.freeze")


@dataclass
class Freeze:
    """The frozen part of each tower.

    ``{image: all}`` is locked-image tuning (LiT, Zhai et al. 2022).

    Attributes:
        image: None for nothing, ``all``, or ``{unlock_last: n}``.
        text: None for nothing, ``all``, or ``{unlock_last: n}``.
        head: whether the heads of both encoders, which are all behind their blocks, are frozen.
        temperature: whether ``logit_scale`` and ``logit_bias`` are frozen.
        batch_norm: whether BatchNorm keeps its running statistics, and uses them, in trained layers too. Those of new
            images make a pretrained model forget at any learning rate (docs/finetuning.md).
    """

    image: Literal["all"] | UnlockLast | None = None
    text: Literal["all"] | UnlockLast | None = None
    head: bool = False
    temperature: bool = False
    batch_norm: bool = False

    def __post_init__(self) -> None:
        for tower in TOWERS:
            value = getattr(self, tower)
            if isinstance(value, Mapping):  # from a checkpoint
                setattr(self, tower, from_plain(UnlockLast, value, f"model.freeze.{tower}"))
            if self.head and getattr(self, tower) == UnlockLast(0):
                problem = "unlock_last 0 with head: true trains nothing; set it to all"
                raise InputError(f"model.freeze.{tower}: {problem}")
        check_fields(self, "model.freeze")


def frozen_names(model: Any, freeze: Freeze) -> set[str]:
    """Return the names of the parameters to freeze."""
    if model.stretched_from is not None and freeze.text == "all":
        texts = f"the text encoder reads padding and must be trained for more than {model.stretched_from} tokens"
        raise InputError(f"model.context_length: {texts}, but model.freeze.text is all; leave one of them out")
    frozen = _frozen_heads(model, freeze)
    if freeze.temperature:
        frozen |= {name for name, _ in model.named_parameters() if name in SCALARS}
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


def _frozen_heads(model: Any, freeze: Freeze) -> set[str]:
    frozen: set[str] = set()
    for tower in TOWERS:
        if freeze.head and getattr(freeze, tower) != "all":
            groups = layer_groups(model, tower)
            frozen |= {name for group in groups if group.name == HEAD for name in group.parameters}
    return frozen


def frozen_modules(model: nn.Module, freeze: Freeze | None = None) -> dict[str, nn.Module]:
    """Return the modules that must stay in evaluation mode, by name.

    These are the modules whose parameters are all frozen, and modules without parameters (dropout) that come before the
    last of them in its tower, apart from a frozen head: they belong to frozen layers.
    """
    heads = _frozen_heads(model, freeze or Freeze())
    modules = dict(model.named_modules())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def within(name: str, names: set[str]) -> bool:
        return any(member.startswith(f"{name}.") for member in names)

    result = [name for name in modules if name and within(name, frozen) and not within(name, trained)]
    for visual in (True, False):
        tower = [name for name in modules if f"{name}.".startswith("visual.") == visual]
        last = max((tower.index(name) for name in result if name in tower and not within(name, heads)), default=-1)
        result += [name for name in tower[: last + 1] if next(modules[name].parameters(), None) is None]
    return {name: modules[name] for name in result}


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the BatchNorm layers, for ``Freeze.batch_norm``."""
    found = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    require(bool(found), "model.freeze.batch_norm: the encoders have no BatchNorm; leave it out")
    return found


def changing_weights(model: nn.Module, frozen: Collection[str]) -> set[str]:
    """Return the names of weights that training changes: trainable parameters, and trained modules' statistics.

    ``frozen`` are the names of the modules that stay in evaluation mode.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name for name, _ in model.named_buffers() if name.rpartition(".")[0] not in frozen}
