"""LoRA (Hu et al. 2021) through ``peft``: low-rank additions to the blocks' weights learn, everything else rests.

A checkpoint holds the additions alone and names the weights that they belong to.
"""

from dataclasses import dataclass

from torch import nn

from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.layers import TOWERS, layer_groups

FUSED = "in_proj_weight"  # queries, keys and values of torch's attention in one


@dataclass
class LoRA:
    """Which weights get an addition of low rank: ``W + alpha / r * B @ A``.

    Attributes:
        r: the rank.
        alpha: the strength.
        targets: ends of the names of linear layers (``c_fc``, ``query``) and of ``in_proj_weight``; None: all of them
            in the blocks of both towers, attention in and out and MLP.
    """

    r: int = 8
    alpha: float = 16.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        require(self.r >= 1, f"model.lora: r {self.r} must be at least 1")


def target_names(model: CLIP, targets: list[str] | None = None) -> list[str]:
    """Names of the linear layers, and of the fused weights of attention, of the blocks that are not frozen.

    Raises:
        InputError: there is none, or a target that is the end of none.
    """
    found = []
    for tower in TOWERS:
        for group in layer_groups(model, tower):
            for name, parameter in group.parameters.items() if group.name.startswith("blocks.") else ():
                owner, _, last = name.rpartition(".")
                if parameter.requires_grad and last == FUSED:
                    found.append(name)
                elif parameter.requires_grad and last == "weight" and isinstance(model.get_submodule(owner), nn.Linear):
                    found.append(owner)
    for target in targets or ():
        if not any(_ends(name, target) for name in found):
            kinds = sorted({name.rpartition(".")[2] for name in found})
            raise InputError(f"model.lora: no layer is called {target!r}; there are {', '.join(kinds) or 'none'}")
    require(bool(found), "model.lora: the blocks that are not frozen have no linear layers")
    return [name for name in found if targets is None or any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def add_lora(model: CLIP, lora: LoRA) -> None:
    """Put the additions into a model: they alone learn, with the temperature. At first they change nothing.

    peft wraps torch's attention for the forward of its own class; ours has another, so its fused weight is a target
    parameter, which peft adds to for the time of a forward, whatever that does with it.

    Raises:
        InputError: peft is not installed, or nothing is there to add to.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("model.lora needs peft: pip install -e '.[lora]'") from error
    names = target_names(model, lora.targets)
    for name in names:
        if name.endswith(FUSED):  # peft takes it out and puts it back last: an average pairs parameters by their order
            owned = model.get_submodule(name.rpartition(".")[0])._parameters
            owned[FUSED] = owned.pop(FUSED)
    for root in dict.fromkeys(name.partition(".")[0] for name in names):  # peft compares the ends of names
        mine = [name.partition(".")[2] for name in names if name.partition(".")[0] == root]
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # only divided by r
            target_modules=[name for name in mine if not name.endswith(FUSED)],
            target_parameters=[name for name in mine if name.endswith(FUSED)],
        )
        inject_adapter_in_model(config, getattr(model, root))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))


def is_added(name: str) -> bool:
    """Whether a weight belongs to the additions: theirs, or the temperature and bias that learn with them."""
    return ".lora_" in name or name.rpartition(".")[2] in ("logit_scale", "logit_bias")


def merge_lora(model: CLIP) -> None:
    """Add the additions to the weights for good; the model is a plain one again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in reversed(list(model.named_modules())):  # what lies within a wrapper first
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    model.requires_grad_(True)
