"""The blocks of both encoders, the paper's vision transformer and its text transformer.

Parameter names and shapes are those of OpenAI's code, so that published weights load without renaming.
Shapes: B batch, L tokens, W width, H heads, D embedding dimension.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.config import Activation, Size, TextTransformerConfig, VisionTransformerConfig, height_width
from lit_clip.errors import InputError


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the GELU of OpenAI's weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation_module(activation: Activation) -> nn.Module:
    """The non-linearity of a name."""
    if activation == "quick_gelu":
        return QuickGELU()
    return nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")


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
    """Two linear layers, the inner one ``ratio`` times as wide (4 in the paper)."""

    def __init__(self, width: int, activation: Activation, ratio: float = 4.0) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, int(ratio * width))
        self.gelu = activation_module(activation)
        self.c_proj = nn.Linear(int(ratio * width), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """``x + attention(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(
        self, width: int, heads: int, activation: Activation, mlp_ratio: float = 4.0, layer_norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.mlp = MLP(width, activation, mlp_ratio)
        self.ln_2 = nn.LayerNorm(width, eps=layer_norm_eps)

    def forward(self, x_BLW: Tensor, causal: bool) -> Tensor:
        x_BLW = x_BLW + self.attn(self.ln_1(x_BLW), causal)
        return x_BLW + self.mlp(self.ln_2(x_BLW))


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        causal: whether a token sees only itself and those before it (text) or all (images).
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        activation: Activation,
        causal: bool,
        mlp_ratio: float = 4.0,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation, mlp_ratio, layer_norm_eps) for _ in range(layers)
        )

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


def check_images(images: Tensor, image_size: Size) -> None:
    """Raise :class:`InputError` unless a batch is ``[B, 3, H, W]`` of the size a model was made for."""
    height, width = height_width(image_size)
    if images.shape[1:] != (3, height, width):
        raise InputError(
            f"images are {list(images.shape)}, the model wants [B, 3, {height}, {width}]; use model.preprocess"
        )


class VisionTransformer(nn.Module):
    """ViT as in the paper: no bias in the patch embedding, a LayerNorm before the blocks, the class token projected.

    Initialised as OpenAI's code does: class token, positions and projection normal with std width^-0.5, the blocks
    and the patch embedding with PyTorch's defaults.
    """

    def __init__(self, config: VisionTransformerConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        width, (height, length) = config.width, height_width(config.image_size)
        self.image_size = config.image_size
        self.grid = (height // config.patch_size, length // config.patch_size)
        patches = self.grid[0] * self.grid[1]
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, activation, False, config.mlp_ratio)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def features(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, W]``, what is projected; the paper's linear probes use it."""
        check_images(images, self.image_size)
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, W, H/P, W/P] -> [B, L-1, W]
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # [B, 1, W]
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding.to(x.dtype)  # [B, L, W]
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0])  # [B, W]

    def project(self, features: Tensor) -> Tensor:
        """``[B, W]`` -> ``[B, D]``."""
        return features @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, D]``."""
        return self.project(self.features(images))


class TextTransformer(nn.Module):
    """The paper's text transformer and SigLIP's.

    OpenAI's CLIP has these parts beside its image encoder, without a module of their own: :class:`lit_clip.CLIP`
    then is one of these itself, and calls :meth:`add_text` and :meth:`read_text`.
    """

    def __init__(self, config: TextTransformerConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        self.add_text(config, embed_dim, activation)

    def add_text(self, config: TextTransformerConfig, embed_dim: int, activation: Activation) -> None:
        """Make the parts, initialised as OpenAI's code does."""
        width, eps = config.width, config.layer_norm_eps
        self.transformer = Transformer(
            width, config.layers, config.heads, activation, config.causal, config.mlp_ratio, eps
        )
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.ln_final = nn.LayerNorm(width, eps=eps)
        self.text_projection = None
        if config.projection_bias:
            self.text_projection = nn.Linear(width, embed_dim)
            nn.init.zeros_(self.text_projection.bias)
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
        elif config.projection:
            self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
            nn.init.normal_(self.text_projection, std=width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        self.transformer.init_like_gpt()

    def read_text(self, tokens: Tensor) -> Tensor:
        """int64 ``[B, L]`` -> ``[B, D]``; a causal text may be shorter than the context, another is padded to it."""
        context, length = len(self.positional_embedding), tokens.shape[1]
        if length > context or (length < context and not self.transformer.causal):
            raise InputError(f"texts have {length} tokens, the model reads {context}; tokenize for it")
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # [B, L, W]
        x = self.transformer(x)
        if self.transformer.causal:
            end = tokens.argmax(dim=-1)  # [B]: the end-of-text token has the highest id
            x = x[torch.arange(x.shape[0], device=x.device), end]  # [B, W]
        else:
            x = x[:, -1]
        x, project = self.ln_final(x), self.text_projection
        if project is None:
            return x
        return project(x) if isinstance(project, nn.Linear) else x @ project  # [B, D]

    def forward(self, tokens: Tensor) -> Tensor:
        """See :meth:`read_text`."""
        return self.read_text(tokens)
