"""The blocks of both encoders, and the image encoder.

Parameter names and shapes are those of OpenAI's code, so that published weights load without renaming.
Shapes: B batch, L tokens, W width, H heads, D embedding dimension.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.config import Activation, VisionTransformerConfig
from lit_clip.errors import InputError


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the GELU of OpenAI's weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.MultiheadAttention):
    """Multi-head self-attention: PyTorch's parameters, names and initialisation, straight to the fused kernel."""

    # Self-attention has one input where PyTorch's signature has three.
    def forward(self, x_BLW: Tensor, causal: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        B, L, W = x_BLW.shape
        qkv = F.linear(x_BLW, cast(Tensor, self.in_proj_weight), self.in_proj_bias)  # [B, L, 3W]
        q, k, v = qkv.view(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # 3 x [B, H, L, W/H]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(B, L, W))


class MLP(nn.Module):
    """Two linear layers, the inner one four times as wide."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """``x + attention(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(self, width: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.attn = Attention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x_BLW: Tensor, causal: bool) -> Tensor:
        x_BLW = x_BLW + self.attn(self.ln_1(x_BLW), causal)
        return x_BLW + self.mlp(self.ln_2(x_BLW))


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        causal: whether a token sees only itself and those before it (text) or all (images).
    """

    def __init__(self, width: int, layers: int, heads: int, activation: Activation, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, activation) for _ in range(layers))

    def init_like_gpt(self) -> None:
        """OpenAI's initialisation of the text encoder: normal weights, residual ones smaller with depth."""
        for block in cast("Iterable[ResidualAttentionBlock]", self.resblocks):
            width = block.attn.embed_dim
            residual_std = width**-0.5 * (2 * len(self.resblocks)) ** -0.5
            nn.init.normal_(cast(Tensor, block.attn.in_proj_weight), std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, x_BLW: Tensor) -> Tensor:
        for block in self.resblocks:
            x_BLW = block(x_BLW, self.causal)
        return x_BLW


class VisionTransformer(nn.Module):
    """ViT as in the paper: no bias in the patch embedding, a LayerNorm before the blocks, the class token projected.

    Initialised as OpenAI's code does: class token, positions and projection normal with std width^-0.5, the blocks
    and the patch embedding with PyTorch's defaults.
    """

    def __init__(self, config: VisionTransformerConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        width, patches = config.width, (config.image_size // config.patch_size) ** 2
        self.image_size = config.image_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, activation, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, S, S]`` float, normalised -> ``[B, D]``."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise InputError(
                f"images are {list(images.shape)}, the model wants [B, 3, {self.image_size}, {self.image_size}]; "
                "use model.preprocess"
            )
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, W, S/P, S/P] -> [B, L-1, W]
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # [B, 1, W]
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding.to(x.dtype)  # [B, L, W]
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # [B, W] @ [W, D] -> [B, D]
