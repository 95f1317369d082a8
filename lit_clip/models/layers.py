"""A model's towers as ordered layers, for freezing, layer-wise learning rates, LoRA and compilation."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.errors import InputError, require

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")
EMBEDDINGS, HEAD = "embeddings", "head"
SCALARS = ("logit_scale", "logit_bias")  # temperature and bias, which belong to no encoder
_BARE_HEADS = {"proj", "text_projection"}  # head parameters that lie on the tower itself, before any block


class LayerGroup(NamedTuple):
    """One layer of a tower: ``embeddings``, ``blocks.0``, ``blocks.1``, ... or ``head``; names as in the model."""

    name: str
    parameters: dict[str, nn.Parameter]


def tower_parameters(model: nn.Module, tower: Tower) -> dict[str, nn.Parameter]:
    """Return a tower's parameters by name within the model; temperature and bias belong to no tower.

    The paper's text tower is not a module: its parts lie on the model.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("visual.") == (tower == "image") and name not in SCALARS
    }


def tower_encoder(model: Any, tower: Tower) -> Any:
    """Return the module with a tower's parts; the paper's text encoder is the model itself.

    Some say what they are made of: ``ordered_blocks()``, their blocks in order, empty if unknown; timm's
    ``layer_names(prefix)``, the layer of each parameter.
    """
    return model.visual if tower == "image" else model.text_encoder


def layer_groups(model: Any, tower: Tower) -> list[LayerGroup]:
    """Split a tower into layers, from input to output: embeddings, each block, the head.

    A block is a residual block, also in the four stages of a ResNet. timm's towers are split by timm's own
    ``group_matcher``, which counts the norm after the last block to that block. A Hugging Face encoder's blocks are its
    largest list of modules, those of an encoder by class path its ``blocks``. The head is everything after the blocks:
    norms, pooling, projection. Each parameter of the tower is in one group; no group is empty.
    """
    parameters = tower_parameters(model, tower)
    encoder = tower_encoder(model, tower)
    names = encoder.layer_names("visual.") if hasattr(encoder, "layer_names") else _layers(model, tower, parameters)
    groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in dict.fromkeys([EMBEDDINGS, *names.values()])}
    groups[HEAD] = groups.pop(HEAD, {})
    for name, parameter in parameters.items():
        groups[names.get(name, HEAD)][name] = parameter
    return [LayerGroup(name, members) for name, members in groups.items() if members]


def _layers(model: nn.Module, tower: Tower, parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Map parameter names to group names, with the blocks in order."""
    prefixes = _block_prefixes(model, tower)
    block_of = {
        name: f"blocks.{i}" for i, prefix in enumerate(prefixes) for name in parameters if name.startswith(prefix)
    }
    last = max((i for i, name in enumerate(parameters) if name in block_of), default=-1)
    result = {}
    for i, name in enumerate(parameters):
        owner, _, bare = name.rpartition(".")
        # Embeddings are used before or in the blocks even if registered after them: CLIP's tokens, MPNet's positions.
        behind = i > last and not isinstance(model.get_submodule(owner), nn.Embedding)
        result[name] = block_of.get(name, HEAD if behind or bare in _BARE_HEADS else EMBEDDINGS)
    order = [EMBEDDINGS, *(f"blocks.{i}" for i in range(len(prefixes))), HEAD]
    return dict(sorted(result.items(), key=lambda item: order.index(item[1])))


def _block_prefixes(model: Any, tower: Tower) -> list[str]:
    encoder: Any = tower_encoder(model, tower)
    if hasattr(encoder, "ordered_blocks"):
        blocks = encoder.ordered_blocks()
        if not blocks:
            needed = "model.freeze's unlock_last and head, model.rates' head and layer_decay, and model.lora"
            problem = f"has no `blocks`, a list of modules in order, so its layers are unknown to {needed}"
            raise InputError(f"architecture.{tower}: {type(encoder.encoder).__name__} {problem}")
        names = {id(module): name for name, module in model.named_modules()}
        return [f"{names[id(block)]}." for block in blocks]
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith("visual.") == (tower == "image")
    }
    require(bool(lists), f"the {tower} tower has no list of blocks, so its layers are unknown")
    name = max(lists, key=lambda name: lists[name])
    return [f"{name}.{i}." for i in range(len(cast(nn.ModuleList, model.get_submodule(name))))]


def tower_blocks(model: Any, tower: Tower) -> list[nn.Module]:
    """Return the modules of a tower's blocks in :func:`layer_groups`, in order.

    timm's blocks are known only by the names of their parameters, so these are the largest modules within each block,
    including one that stands alone between stages (the downsampling of a ConvNeXt). An encoder by class path without
    ``blocks`` is one block.
    """
    encoder = tower_encoder(model, tower)
    if hasattr(encoder, "ordered_blocks"):
        return encoder.ordered_blocks() or [encoder.encoder]
    if hasattr(encoder, "layer_names"):
        return _whole_blocks(encoder.trunk, "visual.trunk", encoder.layer_names("visual."))
    return [model.get_submodule(prefix[:-1]) for prefix in _block_prefixes(model, tower)]


def _whole_blocks(module: nn.Module, prefix: str, names: Mapping[str, str]) -> list[nn.Module]:
    """Find the largest modules with parameters of only one block, except single layers and norms."""
    children = list(module.named_children())
    if not children or isinstance(module, _BatchNorm):  # timm's BatchNorm has its activation as a child
        return []
    owners = {names.get(f"{prefix}.{name}", HEAD) for name, _ in module.named_parameters()}
    stage = isinstance(module, nn.ModuleList | nn.Sequential) and all(list(child.children()) for _, child in children)
    if len(owners) == 1 and next(iter(owners)).startswith("blocks.") and not stage:
        return [module]
    return [block for name, child in children for block in _whole_blocks(child, f"{prefix}.{name}", names)]
