"""Names of weights in Hugging Face's CLIPModel, SiglipModel and Siglip2Model, and in our models.

One list serves both directions, so exporting a model and loading it again is bit-exact.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lit_clip.errors import require

# Our name and theirs, in which * stands for weight and bias, and how the tensors differ: "transposed", the side with an
# additional first dimension of size 1, or "ours_in_grid": [1, n, n, W] here and [n * n, W] there. Tensors of several
# names are stacked along the first dimension on the other side.
Row = tuple[str, str] | tuple[str, str, str]
Pair = tuple[list[str], list[str], str]  # the same for one piece of a state dict

OPENAI_BLOCK: list[Row] = [
    ("attn.in_proj_*", "self_attn.q_proj.* self_attn.k_proj.* self_attn.v_proj.*"),
    ("ln_1.*", "layer_norm1.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("attn.out_proj.*", "self_attn.out_proj.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
]
_TIMM_BLOCK: list[Row] = [
    ("attn.qkv.*", "self_attn.q_proj.* self_attn.k_proj.* self_attn.v_proj.*"),
    ("norm1.*", "layer_norm1.*"),
    ("norm2.*", "layer_norm2.*"),
    ("attn.proj.*", "self_attn.out_proj.*"),
    ("mlp.fc1.*", "mlp.fc1.*"),
    ("mlp.fc2.*", "mlp.fc2.*"),
]
_TEXT: list[Row] = [
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.*", "text_model.final_layer_norm.*"),
]
_VISION: list[Row] = [
    ("logit_scale", "logit_scale"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # sic
    ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    ("visual.proj", "visual_projection.weight", "transposed"),
]
_EVA: list[Row] = [
    ("visual.trunk.cls_token", "vision_model.embeddings.class_embedding", "ours_in_front"),
    ("visual.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight", "ours_in_front"),
    ("visual.trunk.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    ("visual.trunk.norm.*", "vision_model.post_layernorm.*"),
    ("visual.head.proj.*", "visual_projection.*"),
]
_SIGLIP: list[Row] = [
    ("logit_scale", "logit_scale", "theirs_in_front"),
    ("logit_bias", "logit_bias", "theirs_in_front"),
    ("visual.trunk.norm.*", "vision_model.post_layernorm.*"),
    ("visual.trunk.attn_pool.latent", "vision_model.head.probe"),
    ("visual.trunk.attn_pool.q.* visual.trunk.attn_pool.kv.*", "vision_model.head.attention.in_proj_*"),
    ("visual.trunk.attn_pool.proj.*", "vision_model.head.attention.out_proj.*"),
    ("visual.trunk.attn_pool.norm.*", "vision_model.head.layernorm.*"),
    ("visual.trunk.attn_pool.mlp.fc1.*", "vision_model.head.mlp.fc1.*"),
    ("visual.trunk.attn_pool.mlp.fc2.*", "vision_model.head.mlp.fc2.*"),
    ("text.text_projection.*", "text_model.head.*"),
]


def _pairs(rows: Iterable[Row], ours: str = "", theirs: str = "") -> Iterator[Pair]:
    """Yield the pairs of a table, with a prefix before each name."""
    for here, there, *how in rows:
        for kind in ("weight", "bias") if "*" in here else ("",):
            names = [ours + name.replace("*", kind) for name in here.split()]
            yield names, [theirs + name.replace("*", kind) for name in there.split()], how[0] if how else "same"


def blocks(rows: Iterable[Row], ours: str, theirs: str, layers: int) -> Iterator[Pair]:
    """Pair the weights of blocks, numbered below ``ours`` and ``theirs``.encoder.layers."""
    for i in range(layers):
        yield from _pairs(rows, f"{ours}.{i}.", f"{theirs}.encoder.layers.{i}.")


def clip_pairs(image_layers: int, text_layers: int) -> Iterator[Pair]:
    """Pair the weights of a vision transformer and a causal text transformer with a ``CLIPModel``'s."""
    yield from vision_pairs(image_layers)
    yield from text_pairs(text_layers)


def text_pairs(layers: int) -> Iterator[Pair]:
    """Pair the weights of a causal text transformer with a ``CLIPModel``'s."""
    yield from _pairs([*_TEXT, ("text_projection", "text_projection.weight", "transposed")])
    yield from blocks(OPENAI_BLOCK, "transformer.resblocks", "text_model", layers)


def vision_pairs(layers: int) -> Iterator[Pair]:
    """Pair the weights of a vision transformer and the temperature with a ``CLIPModel``'s."""
    yield from _pairs(_VISION)
    yield from blocks(OPENAI_BLOCK, "visual.transformer.resblocks", "vision_model", layers)


def eva_pairs(layers: int) -> Iterator[Pair]:
    """Pair the weights of timm's vision transformer and a projection with an ``EvaCLIPModel``'s."""
    yield from _pairs(_EVA)
    yield from blocks(_TIMM_BLOCK, "visual.trunk.blocks", "vision_model", layers)


def same_pairs(names: Iterable[str], prefixes: Mapping[str, str]) -> Iterator[Pair]:
    """Pair each name after one of their prefixes with the same name after ours; ``prefixes`` has ours to theirs."""
    for ours, theirs in prefixes.items():
        for name in names:
            if name.startswith(theirs) and not name.endswith(".position_ids"):
                yield [ours + name.removeprefix(theirs)], [name], "same"


def siglip_pairs(image_layers: int, text_layers: int, naflex: bool = False) -> Iterator[Pair]:
    """Pair the weights of timm's SigLIP image encoder and SigLIP's text transformer with a ``SiglipModel``'s.

    With ``naflex`` they are those of timm's NaFlexVit and a ``Siglip2Model``.
    """
    yield from _pairs(_SIGLIP)
    patch, position = ("embeds.proj.*", "embeds.pos_embed") if naflex else ("patch_embed.proj.*", "pos_embed")
    how, there = "ours_in_grid" if naflex else "ours_in_front", "vision_model.embeddings."
    patches = [(patch, "patch_embedding.*"), (position, "position_embedding.weight", how)]
    yield from _pairs(patches, "visual.trunk.", there)
    yield from blocks(_TIMM_BLOCK, "visual.trunk.blocks", "vision_model", image_layers)
    yield from _pairs(_TEXT, "text.")
    yield from blocks(OPENAI_BLOCK, "text.transformer.resblocks", "text_model", text_layers)


def _divided(tensor: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Divide a tensor's rows among names; joint keys and values get two shares."""
    if len(names) == 1:
        return {names[0]: tensor}
    shares = [2 if ".kv." in name else 1 for name in names]
    parts = tensor.split([tensor.shape[0] // sum(shares) * share for share in shares])
    # Cloned: safetensors refuses tensors that share memory.
    return {name: part.clone() for name, part in zip(names, parts, strict=True)}


def renamed(state: Mapping[str, Tensor], pairs: Iterable[Pair], inwards: bool) -> dict[str, Tensor]:
    """Return the weights under our names (``inwards``) or Hugging Face's."""
    unpaired: set[str] = set(state)
    result: dict[str, Tensor] = {}
    for ours, theirs, how in pairs:
        source, target = (theirs, ours) if inwards else (ours, theirs)
        absent = set(source) - state.keys()
        require(not absent, f"the weight {min(absent, default='')} is missing")
        tensor = torch.cat([state[name] for name in source]) if len(source) > 1 else state[source[0]]
        unpaired.difference_update(source)
        if how == "transposed":
            tensor = tensor.T.contiguous()
        elif how == "ours_in_grid":
            side = math.isqrt(len(tensor)) if inwards else 0
            require(side**2 == len(tensor) or not inwards, f"the weight {min(source)} is not that of a square grid")
            tensor = tensor.view(1, side, side, -1) if inwards else tensor.flatten(0, 2)
        elif how != "same":
            drop = inwards == (how == "theirs_in_front")
            tensor = tensor.squeeze(0) if drop else tensor.unsqueeze(0)
        result.update(_divided(tensor, target))
    # Older files hold position ids: 0, 1, 2, ...
    unpaired = {name for name in unpaired if not name.endswith(".position_ids")}
    require(not unpaired, f"the weight {min(unpaired, default='')} has no counterpart in the other model")
    return result
