"""The towers of a model as ordered layers: what fine-tuning freezes, and what learns at a rate of its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.errors import InputError, require

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")
EMBEDDINGS, HEAD = "embeddings", "head"
_BARE_HEADS = {"proj", "text_projection"}  # parameters of the tower itself, registered before any block


class LayerGroup(NamedTuple):
    """Consecutive parameters of a tower.

    Attributes:
        name: ``embeddings``, ``blocks.0``, ``blocks.1``, ... or ``head``.
        parameters: by their name within the model.
    """

    name: str
    parameters: dict[str, nn.Parameter]


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


def tower_parameters(model: nn.Module, tower: Tower) -> dict[str, nn.Parameter]:
    """A tower's parameters by their name within the model; temperature and bias belong to neither.

    The paper's text tower has no module of its own: its parts lie on the model.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("visual.") == (tower == "image") and name not in ("logit_scale", "logit_bias")
    }


def layer_groups(model: Any, tower: Tower) -> list[LayerGroup]:
    """A tower from its input to its output: embeddings, then each block, then the head.

    A block is a residual block, of the four stages of a ResNet too. timm's towers are cut as timm says
    (``group_matcher``), which counts the norm behind the last block to that block. A Hugging Face encoder's blocks are
    its longest list of layers. The head is all that comes behind the blocks: norms, pooling, projection.

    Args:
        model: a :class:`lit_clip.CLIP`.
        tower: which.

    Returns:
        Groups that together hold each parameter of the tower once; none is empty.
    """
    parameters = tower_parameters(model, tower)
    trunk = getattr(model.visual, "trunk", None) if tower == "image" else None
    names = _timm_layers(trunk, "visual.trunk.") if trunk is not None else _layers(model, parameters)
    groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in dict.fromkeys([EMBEDDINGS, *names.values()])}
    groups[HEAD] = groups.pop(HEAD, {})
    for name, parameter in parameters.items():
        groups[names.get(name, HEAD)][name] = parameter
    return [LayerGroup(name, members) for name, members in groups.items() if members]


def _layers(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Parameter name -> group name, blocks in their order."""
    prefixes = _block_prefixes(model, parameters)
    block_of = {
        name: f"blocks.{i}" for i, prefix in enumerate(prefixes) for name in parameters if name.startswith(prefix)
    }
    last = max((i for i, name in enumerate(parameters) if name in block_of), default=-1)
    result = {}
    for i, name in enumerate(parameters):
        owner, _, bare = name.rpartition(".")
        # An embedding behind the blocks is used before or in them: CLIP's of tokens, MPNet's of relative positions.
        behind = i > last and not isinstance(model.get_submodule(owner), nn.Embedding)
        result[name] = block_of.get(name, HEAD if behind or bare in _BARE_HEADS else EMBEDDINGS)
    order = [EMBEDDINGS, *(f"blocks.{i}" for i in range(len(prefixes))), HEAD]
    return dict(sorted(result.items(), key=lambda item: order.index(item[1])))


def _block_prefixes(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    visual = next(iter(parameters)).startswith("visual.")
    if visual and hasattr(model.visual, "layer4"):
        stages = [f"visual.layer{stage}" for stage in range(1, 5)]
        return [f"{stage}.{i}." for stage in stages for i, _ in enumerate(model.get_submodule(stage).children())]
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith("visual.") == visual
    }
    require(bool(lists), f"the {'image' if visual else 'text'} tower has no list of blocks to count")
    name = max(lists, key=lambda name: lists[name])
    return [f"{name}.{i}." for i in range(len(cast(nn.ModuleList, model.get_submodule(name))))]


def tower_blocks(model: Any, tower: Tower) -> list[nn.Module]:
    """The modules that are a tower's blocks, as :func:`layer_groups` counts them, in their order.

    Of timm's, whose blocks are known by the names of their parameters, the largest modules within a block; one that
    stands alone between stages (the downsampling of a ConvNeXt) is among them.
    """
    parameters = tower_parameters(model, tower)
    if tower == "text" or not hasattr(model.visual, "trunk"):
        return [model.get_submodule(prefix[:-1]) for prefix in _block_prefixes(model, parameters)]
    names = _timm_layers(model.visual.trunk, "visual.trunk.")
    return _whole_blocks(model.visual.trunk, "visual.trunk", names)


def _whole_blocks(module: nn.Module, prefix: str, names: Mapping[str, str]) -> list[nn.Module]:
    """The largest modules whose parameters are all of one block; a lone layer or norm is none."""
    children = list(module.named_children())
    if not children or isinstance(module, _BatchNorm):  # timm's has its activation as a child
        return []
    owners = {names.get(f"{prefix}.{name}", HEAD) for name, _ in module.named_parameters()}
    stage = isinstance(module, nn.ModuleList | nn.Sequential) and all(list(child.children()) for _, child in children)
    if len(owners) == 1 and next(iter(owners)).startswith("blocks.") and not stage:
        return [module]
    return [block for name, child in children for block in _whole_blocks(child, f"{prefix}.{name}", names)]


def _timm_layers(trunk: Any, prefix: str) -> dict[str, str]:
    from timm.models import group_parameters

    layers: list[list[str]] = list(group_parameters(trunk, trunk.group_matcher(coarse=False)).values())
    result = {prefix + name: EMBEDDINGS for name in layers[0]}
    for i, names in enumerate(layers[1:]):
        # What the matcher knows nothing of comes last: attention pooling, a final norm. Blocks are numbered, it is not.
        head = i == len(layers) - 2 and not any(re.search(r"\.\d+\.", name) for name in names)
        result |= {prefix + name: HEAD if head else f"blocks.{i}" for name in names}
    return result


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
