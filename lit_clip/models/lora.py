"""LoRA (Hu et al. 2021) through ``peft``: low-rank additions to the blocks' weights learn, everything else rests.

A checkpoint holds the additions alone and names the weights that they belong to.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.layers import TOWERS, layer_groups
from lit_clip.tools.weight_files import is_path

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


def check_base(checkpoint: Mapping[str, Any], ours: str, name: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` unless a checkpoint's additions belong to the weights with a fingerprint."""
    base = checkpoint.get("base")
    if base is None:
        raise InputError(f"{name}: holds no LoRA; give it as model.pretrained")
    if base["sha256"] != ours:
        raise InputError(
            f"{name}: its LoRA belongs to {base['pretrained']} with other weights "
            f"(SHA-256 {base['sha256'][:12]}... there, {ours[:12]}... here)"
        )


def base_name(pretrained: str | os.PathLike[str]) -> str:
    """How a checkpoint names its base: a file by its absolute path, a published one as it is called."""
    return str(Path(pretrained).resolve()) if Path(pretrained).exists() else str(pretrained)


def with_base(checkpoint: dict[str, Any], name: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint as it is, or if it holds a LoRA alone, with all weights, the additions merged into them.

    Raises:
        InputError: the base is neither where it was nor beside the checkpoint, or has other weights.
    """
    if "base" not in checkpoint:
        return checkpoint
    from lit_clip.module import LitCLIP
    from lit_clip.weights.load import check_weights

    hparams = checkpoint["hyper_parameters"]
    base = hparams["pretrained"]
    beside = Path(name).parent / Path(base).name  # moved together; the fingerprint tells whether it is the one
    try:
        found = str(beside) if is_path(base) and not Path(base).exists() and beside.exists() else base
        module = LitCLIP(**{**hparams, "distill": None, "pretrained": found})
    except InputError as error:
        raise InputError(f"{name}: the weights that its LoRA belongs to cannot be opened: {error}") from error
    check_base(checkpoint, module.base_sha256, name)
    model = module.model
    state: dict[str, Tensor] = {**model.state_dict(), **checkpoint["state_dict"]}
    check_weights(model, state, name)
    model.load_state_dict(state)
    merge_lora(model)
    plain = {key: value for key, value in hparams.items() if key not in ("lora", "pretrained")}
    kept = {key: value for key, value in checkpoint.items() if key != "base"}
    return {**kept, "hyper_parameters": plain, "state_dict": model.state_dict()}
