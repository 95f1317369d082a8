"""The names of weights in Hugging Face's CLIPModel, SiglipModel and Siglip2Model, and in ours.

A :class:`KeyPair` holds both names of a weight. One list serves both directions, so exporting a model and loading it
again is bit-exact.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import require


class KeyPair(NamedTuple):
    """The names of one piece of a state dict on both sides.

    Attributes:
        ours: our name, or several names whose tensors the other side stacks along the first dimension; each with its
            share of the rows.
        theirs: their name or names, with shares of the rows.
        layout: ``transposed``, the side whose tensor has an additional first dimension of size 1, or ``ours_in_grid``
            for ``[1, n, n, W]`` here and ``[n * n, W]`` there.
    """

    ours: dict[str, int]
    theirs: dict[str, int]
    layout: Literal["same", "transposed", "ours_in_front", "theirs_in_front", "ours_in_grid"] = "same"


def _same(ours: str, theirs: str) -> Iterator[KeyPair]:
    """Pair a module's weight and bias."""
    for kind in ("weight", "bias"):
        yield KeyPair({f"{ours}.{kind}": 1}, {f"{theirs}.{kind}": 1})


def _block(ours: str, theirs: str, names: Mapping[str, str], separator: str) -> Iterator[KeyPair]:
    """Pair a block: modules by ``names``, and the query, key and value projections, which ours fuses."""
    for kind in ("weight", "bias"):
        apart = {f"{theirs}.self_attn.{part}_proj.{kind}": 1 for part in "qkv"}
        yield KeyPair({f"{ours}.attn.{separator}{kind}": 3}, apart)
    for module, theirs_module in names.items():
        yield from _same(f"{ours}.{module}", f"{theirs}.{theirs_module}")


_OPENAI_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _text_pairs(prefix: str, layers: int) -> Iterator[KeyPair]:
    theirs = "text_model"
    yield KeyPair({f"{prefix}token_embedding.weight": 1}, {f"{theirs}.embeddings.token_embedding.weight": 1})
    yield KeyPair({f"{prefix}positional_embedding": 1}, {f"{theirs}.embeddings.position_embedding.weight": 1})
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}"
        yield from _block(block, f"{theirs}.encoder.layers.{i}", _OPENAI_BLOCK, "in_proj_")
    yield from _same(f"{prefix}ln_final", f"{theirs}.final_layer_norm")


def clip_pairs(image_layers: int, text_layers: int) -> Iterator[KeyPair]:
    """Pair the weights of a vision transformer and a causal text transformer with a ``CLIPModel``'s."""
    ours, theirs = "visual", "vision_model"
    yield KeyPair({"logit_scale": 1}, {"logit_scale": 1})
    yield KeyPair({f"{ours}.class_embedding": 1}, {f"{theirs}.embeddings.class_embedding": 1})
    yield KeyPair({f"{ours}.conv1.weight": 1}, {f"{theirs}.embeddings.patch_embedding.weight": 1})
    yield KeyPair({f"{ours}.positional_embedding": 1}, {f"{theirs}.embeddings.position_embedding.weight": 1})
    yield from _same(f"{ours}.ln_pre", f"{theirs}.pre_layrnorm")  # sic
    for i in range(image_layers):
        block = f"{ours}.transformer.resblocks.{i}"
        yield from _block(block, f"{theirs}.encoder.layers.{i}", _OPENAI_BLOCK, "in_proj_")
    yield from _same(f"{ours}.ln_post", f"{theirs}.post_layernorm")
    yield KeyPair({f"{ours}.proj": 1}, {"visual_projection.weight": 1}, "transposed")
    yield from _text_pairs("", text_layers)
    yield KeyPair({"text_projection": 1}, {"text_projection.weight": 1}, "transposed")


def siglip_pairs(image_layers: int, text_layers: int, naflex: bool = False) -> Iterator[KeyPair]:
    """Pair the weights of timm's SigLIP image encoder and SigLIP's text transformer with a ``SiglipModel``'s.

    With ``naflex`` they are those of timm's NaFlexVit and a ``Siglip2Model``.
    """
    ours, theirs = "visual.trunk", "vision_model"
    yield KeyPair({"logit_scale": 1}, {"logit_scale": 1}, "theirs_in_front")
    yield KeyPair({"logit_bias": 1}, {"logit_bias": 1}, "theirs_in_front")
    patch, position = ("embeds.proj", "embeds.pos_embed") if naflex else ("patch_embed.proj", "pos_embed")
    yield from _same(f"{ours}.{patch}", f"{theirs}.embeddings.patch_embedding")
    layout = "ours_in_grid" if naflex else "ours_in_front"
    yield KeyPair({f"{ours}.{position}": 1}, {f"{theirs}.embeddings.position_embedding.weight": 1}, layout)
    for i in range(image_layers):
        yield from _block(f"{ours}.blocks.{i}", f"{theirs}.encoder.layers.{i}", _TIMM_BLOCK, "qkv.")
    yield from _same(f"{ours}.norm", f"{theirs}.post_layernorm")
    pool, head = f"{ours}.attn_pool", f"{theirs}.head"
    yield KeyPair({f"{pool}.latent": 1}, {f"{head}.probe": 1})
    for kind in ("weight", "bias"):
        yield KeyPair({f"{pool}.q.{kind}": 1, f"{pool}.kv.{kind}": 2}, {f"{head}.attention.in_proj_{kind}": 3})
    yield from _same(f"{pool}.proj", f"{head}.attention.out_proj")
    yield from _same(f"{pool}.norm", f"{head}.layernorm")
    for layer in ("fc1", "fc2"):
        yield from _same(f"{pool}.mlp.{layer}", f"{head}.mlp.{layer}")
    yield from _text_pairs("text.", text_layers)
    yield from _same("text.text_projection", "text_model.head")


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _divided(tensor: Tensor, shares: Mapping[str, int]) -> dict[str, Tensor]:
    if len(shares) == 1:
        return {next(iter(shares)): tensor}
    rows = tensor.shape[0] // sum(shares.values())
    parts = tensor.split([rows * share for share in shares.values()])
    # Cloned: safetensors refuses tensors that share memory.
    return {name: part.clone() for name, part in zip(shares, parts, strict=True)}


def renamed(state: Mapping[str, Tensor], pairs: Iterable[KeyPair], inwards: bool) -> dict[str, Tensor]:
    """Return the weights under our names (``inwards``) or theirs."""
    unpaired: set[str] = set(state)
    result: dict[str, Tensor] = {}
    for pair in pairs:
        source, target = (pair.theirs, pair.ours) if inwards else (pair.ours, pair.theirs)
        absent = source.keys() - state.keys()
        require(not absent, f"the weight {min(absent, default='')} is missing")
        tensor = _stacked([state[name] for name in source])
        unpaired -= source.keys()
        if pair.layout == "transposed":
            tensor = tensor.T.contiguous()
        elif pair.layout == "ours_in_grid":
            side = math.isqrt(len(tensor)) if inwards else 0
            require(side**2 == len(tensor) or not inwards, f"the weight {min(source)} is not that of a square grid")
            tensor = tensor.view(1, side, side, -1) if inwards else tensor.flatten(0, 2)
        elif pair.layout != "same":
            drop = inwards == (pair.layout == "theirs_in_front")
            tensor = tensor.squeeze(0) if drop else tensor.unsqueeze(0)
        result.update(_divided(tensor, target))
    # Older files hold position ids: 0, 1, 2, ...
    unpaired = {name for name in unpaired if not name.endswith(".position_ids")}
    require(not unpaired, f"the weight {min(unpaired, default='')} has no counterpart in the other model")
    return result
