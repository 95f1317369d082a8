"""LoRA (Hu et al. 2021) with ``peft``: train low-rank additions to the blocks' weights instead of an encoder.

A checkpoint holds the additions and what is trained beside them, and names the weights that they belong to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta
from torch import nn

from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.layers import HEAD, TOWERS, Tower, layer_groups, tower_parameters
from lit_clip.models.size import Width
from lit_clip.tools.untrusted import check_fields

FUSED = "in_proj_weight"  # queries, keys and values of torch's attention in one weight


@dataclass
class LoRA:
    """Low-rank additions to all weights of the blocks' attention and MLP: ``W + alpha / r * B @ A``.

    Attributes:
        r: the rank.
        alpha: the strength.
        tower: the encoder that gets additions, ``image`` or ``text``; the other one is trained as without a LoRA. None:
            both.
        head: whether the heads behind the additions are trained too.
    """

    r: Width = 8
    alpha: Annotated[float, Meta(ge=-1e9, le=1e9)] = 16.0
    tower: Tower | None = None
    head: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "model.lora")

    @property
    def towers(self) -> Sequence[Tower]:
        """The encoders with additions."""
        return TOWERS if self.tower is None else (self.tower,)


def target_names(model: CLIP, towers: Sequence[Tower] = TOWERS) -> list[str]:
    """Return the names of linear layers and fused attention weights in blocks that are not frozen."""
    found = []
    for tower in towers:
        if not any(parameter.requires_grad for parameter in tower_parameters(model, tower).values()):
            continue  # nothing is added to it, so its layers need not be known
        for group in layer_groups(model, tower):
            for name, parameter in group.parameters.items() if group.name.startswith("blocks.") else ():
                owner, _, last = name.rpartition(".")
                if parameter.requires_grad and last == FUSED:
                    found.append(name)
                elif parameter.requires_grad and last == "weight" and isinstance(model.get_submodule(owner), nn.Linear):
                    found.append(owner)
    require(bool(found), "model.lora: the blocks that are not frozen have no linear layers")
    return found


def add_lora(model: CLIP, lora: LoRA) -> str:
    """Insert additions that start at zero; freeze the rest of their encoders, except heads if wanted.

    Return the SHA-256 of the weights that they add to.

    peft's wrapper for torch's attention replaces its forward, which ours overrides. The fused weight is therefore a
    target parameter: peft adds to it for the duration of any forward.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("model.lora needs peft: pip install peft") from error
    from lit_clip.models.fingerprint import tensors_sha256

    sha256 = tensors_sha256(model.state_dict())
    names = target_names(model, lora.towers)
    beside = _trained_beside(model, lora)  # peft freezes what it is not told to adapt
    for name in names:
        if name.endswith(FUSED):  # peft re-registers it last; move it here too, as EMA pairs parameters by order
            owned = model.get_submodule(name.rpartition(".")[0])._parameters
            owned[FUSED] = owned.pop(FUSED)
    for root in dict.fromkeys(name.partition(".")[0] for name in names):  # peft matches the ends of names
        mine = [name.partition(".")[2] for name in names if name.partition(".")[0] == root]
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # only divided by r
            target_modules=[name for name in mine if not name.endswith(FUSED)],
            target_parameters=[name for name in mine if name.endswith(FUSED)],
        )
        inject_adapter_in_model(config, getattr(model, root))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name) or name in beside)
    return sha256


def _trained_beside(model: CLIP, lora: LoRA) -> set[str]:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads: set[str] = set()
    for tower in lora.towers:
        members = trained & tower_parameters(model, tower).keys()
        for group in layer_groups(model, tower) if lora.head and members else ():
            heads |= members & group.parameters.keys() if group.name == HEAD else set()
        trained -= members
    require(bool(heads) or not lora.head, "model.lora: head is true, and model.freeze freezes the head")
    return trained | heads


def is_added(name: str) -> bool:
    """Return whether a weight belongs to a LoRA's additions."""
    return ".lora_" in name


def merge_lora(model: CLIP) -> None:
    """Merge the additions into the weights; the model becomes plain again, and trainable."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in reversed(list(model.named_modules())):  # inner wrappers first
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    model.requires_grad_(True)
