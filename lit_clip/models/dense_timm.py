"""Features of each place of an image from timm's networks; importing timm takes seconds.

Shapes: B batch, N places, C channels, D embedding dimension, h x w places.
"""

import copy
from typing import Any

import torch
from timm.layers import Format  # pyright: ignore[reportPrivateImportUsage]  # its documented home
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lit_clip.errors import InputError
from lit_clip.models.external import TimmImageEncoder
from lit_clip.models.size import height_width

MOST_PLACES = 2**15  # of one call: CUDA's attention kernels take fewer than 2**16 sequences
AVERAGES = ("avg", "fast", "fastavg")


def timm_places(encoder: TimmImageEncoder, images: Tensor) -> Tensor:
    """Encode each place with the network's pooling and head at that place alone: ``[B, 3, H, W]`` -> ``[B, D, h, w]``.

    For pooling by average of anything with height and width; for vision transformers (``VisionTransformer`` and
    ``Eva``) of any image size also for the class token, whose last block is replaced by its value path, and for
    attention pooling (SigLIP), which over one place is its value path.
    """
    trunk: Any = encoder.trunk
    pooling, tokens = _pooling(trunk), type(trunk) in (VisionTransformer, Eva)
    if encoder.reads_patches or encoder.joined:
        raise _refusal(trunk, "of patch sequences" if encoder.reads_patches else "with two poolings")
    if pooling not in (*AVERAGES, *(("token", "map") if tokens else ())):
        raise _refusal(trunk, f"with pooling {pooling!r}")
    if images.ndim != 4:
        raise InputError(f"images are {list(images.shape)}; places need [B, 3, H, W]")
    if not len(images):  # timm's transformers cannot reshape an empty batch
        return timm_places(encoder, images.new_zeros(1, *images.shape[1:]))[:0]
    if tokens:
        trunk, maps = _vision_transformer(trunk, images, pooling)
    else:
        maps = _feature_map(encoder, images)
    B, h, w, C = maps.shape
    places = maps.reshape(B * h * w, C)
    shape = (1, C) if tokens else (1, 1, C) if _channels_last(trunk) else (C, 1, 1)
    features = [encoder.project(trunk.forward_head(part.unflatten(1, shape))) for part in places.split(MOST_PLACES)]
    return torch.cat(features).unflatten(0, (B, h, w)).permute(0, 3, 1, 2)


def _refusal(trunk: nn.Module, problem: str) -> InputError:
    can = "networks that average a feature map have them, and VisionTransformer and Eva"
    return InputError(f"encode_patches: timm's {type(trunk).__name__} {problem} has no features of places; {can}")


def _pooling(trunk: Any) -> str:
    """Return the name of a network's pooling, from an attribute or a module of the head or the network."""
    for owner in (getattr(trunk, "head", None), trunk):
        pool = getattr(owner, "global_pool", None)
        name = pool if isinstance(pool, str) else getattr(pool, "pool_type", getattr(owner, "pool_type", None))
        if isinstance(name, str):
            return name
    return ""


def _channels_last(trunk: Any) -> bool:
    return getattr(trunk, "output_fmt", Format.NCHW) == Format.NHWC


def _feature_map(encoder: TimmImageEncoder, images: Tensor) -> Tensor:
    """Images -> ``[B, h, w, C]``, the map that a network with height and width averages."""
    trunk: Any = encoder.trunk
    own, size = height_width(encoder.image_size), tuple(images.shape[2:])
    if trunk.pretrained_cfg.get("fixed_input_size") and size != own:
        raise InputError(
            f"encode_patches: images are {list(images.shape)}, timm's {type(trunk).__name__} reads {own[0]} x {own[1]} "
            "pixels only; load the model with another image_size"
        )
    x = trunk.forward_features(images)
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise _refusal(trunk, "without a feature map")
    return x if _channels_last(trunk) else x.permute(0, 2, 3, 1)


def _vision_transformer(trunk: Any, images: Tensor, pooling: str) -> tuple[Any, Tensor]:
    """Return a network with a head that pools any tokens, and the image's places before it, ``[B, h, w, C]``."""
    size = (images.shape[2], images.shape[3])
    ratio = trunk.patch_embed.feat_ratio(as_scalar=False)
    if any(side % patch or not side for side, patch in zip(size, ratio, strict=True)):
        raise InputError(f"images are {list(images.shape)}; places need [B, 3, H, W] with multiples of {ratio[0]}")
    grid, prefix = trunk.patch_embed.dynamic_feat_size(size), trunk.num_prefix_tokens
    trunk = _for_grid(trunk, grid)
    by_values = pooling == "token"
    x = trunk.norm(_value_path(trunk, images)) if by_values else trunk.forward_features(images)[:, prefix:]
    trunk.num_prefix_tokens = 0
    return trunk, x.unflatten(1, grid)


def _for_grid(trunk: Any, grid: tuple[int, int]) -> Any:
    """Return a network with the same weights that interpolates positions to a grid and drops no patches."""
    other, embed = _variant(trunk), _variant(trunk.patch_embed)
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
    other.patch_embed, other.dynamic_img_size = embed, True
    other.patch_drop = None if isinstance(trunk, Eva) else nn.Identity()
    rope = getattr(trunk, "rope", None)
    if hasattr(rope, "update_feat_shape") and grid != trunk.patch_embed.grid_size:
        other.rope = _variant(rope)
        other.rope.update_feat_shape(grid)
    return other


def _variant(module: Any) -> Any:
    """Copy a module's attributes, not its weights and submodules: changes of the copy leave the module as it was."""
    other = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(other)[name] = {**vars(module)[name]}
    return other


def _value_path(trunk: Any, images: Tensor) -> Tensor:
    """Images -> ``[B, N, C]``: each place attends only to itself in the last block, without residual and MLP."""
    last = trunk.blocks[-1]
    if not isinstance(last, Block | EvaBlock):
        raise _refusal(trunk, f"whose last block is a {type(last).__name__}")
    if len(trunk.blocks) == 1:
        raise _refusal(trunk, "whose last block is its only one")
    options = {"indices": [len(trunk.blocks) - 2], "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
    (x,) = trunk.forward_intermediates(images, **options)
    alone = last.norm1(x).flatten(0, 1)[:, None]  # [BN, 1, C]
    values = torch.cat([last.attn(part) for part in alone.split(MOST_PLACES)]).view_as(x)
    if isinstance(last, Block):
        return last.ls1(values)
    return values if last.gamma_1 is None else last.gamma_1 * values
