"""Features of each place of an image, in the joint embedding space.

Shapes: B batch, C channels, L tokens, W width, D embedding dimension, h x w places.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.errors import InputError
from lit_clip.models.custom import CustomImageEncoder
from lit_clip.models.external import TimmImageEncoder
from lit_clip.models.packing import Layout
from lit_clip.models.resnet import AttentionPool, ModifiedResNet
from lit_clip.models.transformer import AttentionalPooler, ResidualAttentionBlock, VisionTransformer

WINDOW = 2  # places a side that a ResNet's pooling is applied to


def encode_places(visual: nn.Module, images: Tensor) -> Tensor:
    """Encode each place of images: float ``[B, 3, H, W]``, normalised, of any size -> ``[B, D, h, w]``.

    Sides need not be the encoder's image size; those of a ViT are multiples of its patch size, and its position
    embedding is interpolated. Pooling by attention is replaced by its value path (MaskCLIP, Zhou et al. 2022), pooling
    by average left out. Then the projection to the joint space follows, at each place. A ResNet's places also have the
    mean of the windows of 2 x 2 places around them, each pooled as an image is (docs/evidence/places.md).

    Raises:
        InputError: the encoder has no such features, or the images are too small or not divisible.
    """
    # FSDP gathers a block's weights only for its whole forward pass. By name: importing torch's DTensor takes time.
    if any(hasattr(parameter, "full_tensor") for parameter in visual.parameters()):
        raise InputError("encode_patches: the weights are sharded; train with trainer.strategy ddp")
    if isinstance(visual, VisionTransformer):
        return _vision_transformer(visual, images)
    if isinstance(visual, ModifiedResNet):
        return _resnet(visual, images)
    if isinstance(visual, TimmImageEncoder):
        from lit_clip.models.dense_timm import timm_places  # imports timm

        return timm_places(visual, images)
    if not isinstance(visual, CustomImageEncoder):
        raise InputError(f"encode_patches: transformers' {type(visual.encoder).__name__} gives no features of places")
    return _custom(visual, images)


def _grid(images: Tensor, stride: int) -> tuple[int, int]:
    sides = images.shape[2:]
    if images.ndim != 4 or any(side % stride or not side for side in sides):
        raise InputError(f"images are {list(images.shape)}; places need [B, 3, H, W] with multiples of {stride}")
    return sides[0] // stride, sides[1] // stride


def _vision_transformer(vit: VisionTransformer, images: Tensor) -> Tensor:
    B, grid = images.shape[0], _grid(images, vit.conv1.kernel_size[0])
    x_BLW = vit.embed_grid(images, grid)
    L, W = x_BLW.shape[1:]
    layout = Layout(((B, L),), causal=False)
    *blocks, last = list(vit.transformer.resblocks)
    x = x_BLW.reshape(B * L, W)
    for block in blocks:
        x = block(x, layout)
    x = _value_path(cast(ResidualAttentionBlock, last), x) if vit.pool == "class" else last(x, layout)
    if vit.attn_pool is not None:
        x = _pooler_values(vit.attn_pool, x)
    features = vit.project(vit.ln_post(x)).unflatten(0, (B, L))[:, 1:]  # [B, hw, D]
    return features.transpose(1, 2).unflatten(2, grid)


def _value_path(block: ResidualAttentionBlock, x_TW: Tensor) -> Tensor:
    """Return the values of a block's attention, each projected alone: ``[T, W]`` -> ``[T, W]``."""
    W = x_TW.shape[1]
    weight, bias = cast(Tensor, block.attn.in_proj_weight), block.attn.in_proj_bias
    return block.attn.out_proj(F.linear(block.ln_1(x_TW), weight[2 * W :], bias[2 * W :]))


def _pooler_values(pooler: AttentionalPooler, x_TW: Tensor) -> Tensor:
    """Return the values of a pooling by learned queries: ``[T, W]`` -> ``[T, D]``."""
    D, attention = pooler.attn.embed_dim, pooler.attn
    weight = cast(
        Tensor, attention.v_proj_weight if attention.in_proj_weight is None else attention.in_proj_weight[2 * D :]
    )
    return attention.out_proj(F.linear(pooler.ln_k(x_TW), weight, attention.in_proj_bias[2 * D :]))


def _resnet(resnet: ModifiedResNet, images: Tensor) -> Tensor:
    """Return each place's value, plus the mean over the pooled windows of 2 x 2 places that contain it."""
    _grid(images, 32)
    pool: AttentionPool = resnet.attnpool
    x_BhwC = resnet.feature_map(images).permute(0, 2, 3, 1)
    q, k, v = (layer(x_BhwC).permute(0, 3, 1, 2) for layer in (pool.q_proj, pool.k_proj, pool.v_proj))  # [B, C, h, w]
    window = [min(WINDOW, side) for side in q.shape[2:]]
    covering = F.avg_pool2d(
        _windows(q, k, v, pool.heads, window), window, 1, [side - 1 for side in window], count_include_pad=False
    )
    return pool.c_proj((v + covering).permute(0, 2, 3, 1) / 2).permute(0, 3, 1, 2)


def _windows(q: Tensor, k: Tensor, v: Tensor, heads: int, window: list[int]) -> Tensor:
    """Attend from each window's mean to itself and its places, without positions: ``[B, C, h, w]`` each."""
    rows, columns = (side - length + 1 for side, length in zip(q.shape[2:], window, strict=True))
    corners = [(top, left) for top in range(window[0]) for left in range(window[1])]

    def tokens(x: Tensor) -> list[Tensor]:  # of the mean, whose key is the mean of the keys, and of the places
        places = [x[:, :, top : top + rows, left : left + columns] for top, left in corners]
        return [each.unflatten(1, (heads, -1)) for each in (F.avg_pool2d(x, window, 1), *places)]

    query = tokens(q)[0]
    scores = torch.stack([(query * key).sum(dim=2, keepdim=True) for key in tokens(k)])
    weights = (scores / query.shape[2] ** 0.5).softmax(dim=0)
    return (weights * torch.stack(tokens(v))).sum(dim=0).flatten(1, 2)


def _custom(encoder: CustomImageEncoder, images: Tensor) -> Tensor:
    own: Any = encoder.encoder
    name, wanted = type(own).__name__, f"float [B, {encoder.embed_dim}, h, w]"
    if not callable(getattr(own, "patches", None)):
        raise InputError(f"encode_patches: {name} has no method patches(images [B, 3, H, W]) -> {wanted}; add one")
    features = own.patches(images)
    shape = (len(images), encoder.embed_dim)
    if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[:2] != shape:
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"encode_patches: patches of {name} returns {found}; it must be {wanted}")
    return features
