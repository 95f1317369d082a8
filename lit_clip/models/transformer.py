"""The paper's vision and text transformers, and the blocks that both use.

Parameter names and shapes are those of OpenAI's code, so published weights load without renaming.
Shapes: B batch, L tokens, W width, H heads, D embedding dimension.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.errors import InputError
from lit_clip.models.config import Activation, Size, TextTransformerConfig, VisionTransformerConfig, height_width
from lit_clip.models.packing import Layout, pack
from lit_clip.models.running import PartialForward


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the GELU of OpenAI's weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.MultiheadAttention):
    """Multi-head self-attention with PyTorch's parameters and initialisation; it calls the fused kernel directly."""

    # Self-attention has one input, PyTorch's signature has three.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_TW: Tensor, layout: Layout, read_B: Tensor | None = None
    ) -> Tensor:
        W, weight, bias = x_TW.shape[1], cast(Tensor, self.in_proj_weight), self.in_proj_bias
        if read_B is None or layout.mask is not None:  # queries of single tokens do not fit a mask of rows
            attended = layout.attend(F.linear(x_TW, weight, bias), self.num_heads)  # [T, W]
            return self.out_proj(attended if read_B is None else attended.index_select(0, read_B))
        q = F.linear(x_TW.index_select(0, read_B), weight[:W], bias[:W])  # [B, W]
        kv = F.linear(x_TW, weight[W:], bias[W:])  # [T, 2W]
        return self.out_proj(layout.attend_from(q, kv, self.num_heads))


class MLP(nn.Module):
    """Two linear layers; the inner width is ``ratio`` times the outer (4 in the paper)."""

    def __init__(self, width: int, activation: Activation, ratio: float = 4.0) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, int(ratio * width))
        tanh = "tanh" if activation == "gelu_tanh" else "none"
        self.gelu = QuickGELU() if activation == "quick_gelu" else nn.GELU(approximate=tanh)
        self.c_proj = nn.Linear(int(ratio * width), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """``x + attention(ln_1(x))``, then ``x + mlp(ln_2(x))``.

    Maps tokens ``[T, W]`` to ``[T, W]``, or only those at ``read_B`` to ``[B, W]`` if nothing reads the others.
    """

    def __init__(self, width: int, heads: int, activation: Activation, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, activation, mlp_ratio)
        self.ln_2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, layout: Layout, read_B: Tensor | None = None) -> Tensor:
        attended = self.attn(self.ln_1(x), layout, read_B)  # [T or B, W]
        x = (x if read_B is None else x.index_select(0, read_B)) + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(
        self, width: int, layers: int, heads: int, activation: Activation, mlp_ratio: float = 4.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation, mlp_ratio, eps) for _ in range(layers)
        )

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` compiles the blocks."""
        return any(block._compiled_call_impl is not None for block in self.resblocks)

    def init_like_gpt(self) -> None:
        """Initialise as in OpenAI's text encoder: normal weights, smaller on the residual path with more depth."""
        for block in cast("Iterable[ResidualAttentionBlock]", self.resblocks):
            width = block.attn.embed_dim
            residual_std = width**-0.5 * (2 * len(self.resblocks)) ** -0.5
            nn.init.normal_(cast(Tensor, block.attn.in_proj_weight), std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, x_TW: Tensor, layout: Layout, read_B: Tensor | None = None, first: int = 0) -> Tensor:
        """Tokens ``[T, W]`` -> ``[T, W]``, or ``[B, W]`` for ``read_B``: the last block computes only these.

        With ``first`` the tokens are the input of that block, and the blocks before it are not computed.
        """
        *blocks, last = list(self.resblocks)[first:]  # a slice of a ModuleList would be a new module
        for block in blocks:
            x_TW = block(x_TW, layout)
        if read_B is not None and x_TW.is_meta:  # FLOPs are being counted; published tables count all tokens
            return last(x_TW, layout).index_select(0, read_B)
        return last(x_TW, layout, read_B)


class ImageEncoder(nn.Module):
    """An image encoder of any kind: features, and their projection into the embedding.

    Attributes:
        image_size: of the images, in pixels.
        bands: of the images.
    """

    image_size: Size
    bands: int = 3

    def check(self, images: Tensor) -> None:
        """Raise :class:`InputError` unless a batch is ``[B, bands, H, W]`` of the model's image size."""
        height, width = height_width(self.image_size)
        if images.shape[1:] != (self.bands, height, width):
            reads = f"the model reads [B, {self.bands}, {height}, {width}]; use model.preprocess"
            raise InputError(f"images are {list(images.shape)}, {reads}")

    def features(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, W]``, before the projection; for the paper's linear probes."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """``[B, W]`` -> ``[B, D]``; unchanged if the features of this encoder are projected already."""
        return features

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, D]``."""
        return self.project(self.features(images))


def resample_positions(position_LW: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate an image's position embedding after the class token (bicubic, antialiased, as in open_clip)."""
    from timm.layers import resample_abs_pos_embed  # pyright: ignore[reportPrivateImportUsage]  # its documented home

    return resample_abs_pos_embed(position_LW[None], list(new), list(old), num_prefix_tokens=1)[0]


class AttentionalPooler(nn.Module):
    """Attention of learned queries over an image's tokens (CoCa): ``[B, L, W]`` -> ``[B, D]``.

    The first query gives the feature; CoCa's caption decoder, which lit-clip lacks, reads the others.
    """

    def __init__(self, config: VisionTransformerConfig, embed_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(config.pool_queries, embed_dim))
        width = config.width
        self.attn = nn.MultiheadAttention(embed_dim, config.pool_heads, kdim=width, vdim=width, batch_first=True)
        self.ln_q = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.ln_k = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x_BLW: Tensor) -> Tensor:
        x = self.ln_k(x_BLW)
        query = self.ln_q(self.query[:1]).expand(x.shape[0], 1, -1)  # [B, 1, D]
        return self.attn(query, x, x, need_weights=False)[0].squeeze(1)


class VisionTransformer(ImageEncoder):
    """The paper's ViT: no bias in the patch embedding, a LayerNorm before the blocks, the class token projected.

    Other models have no such LayerNorm, or read other tokens (:class:`VisionTransformerConfig`).

    Initialised as in OpenAI's code: class token, positions and projection normal with std width^-0.5, blocks and
    patch embedding with PyTorch's defaults.

    Attributes:
        patch_dropout: fraction of each image's patches that a training step drops at random (FLIP, Li et al. 2023).
    """

    def __init__(self, config: VisionTransformerConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        width, (height, length) = config.width, height_width(config.image_size)
        activation, eps = config.activation or activation, config.layer_norm_eps
        self.image_size = config.image_size
        self.patch_dropout = 0.0
        self.grid = (height // config.patch_size, length // config.patch_size)
        patches = self.grid[0] * self.grid[1]
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width).mul_(width**-0.5))
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width).mul_(width**-0.5))
        self.ln_pre = nn.LayerNorm(width, eps=eps) if config.ln_pre else nn.Identity()
        self.transformer = Transformer(width, config.layers, config.heads, activation, config.mlp_ratio, eps)
        self.pool = config.pool
        self.attn_pool = AttentionalPooler(config, embed_dim) if config.pool == "attention" else None
        pooled = embed_dim if config.pool == "attention" else width
        self.ln_post = nn.LayerNorm(pooled, eps=eps)
        self.proj = nn.Parameter(torch.randn(pooled, embed_dim).mul_(width**-0.5))

    def features(self, images: Tensor) -> Tensor:
        return self.features_from(self._embed(images))

    def _embed(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, L, W]``, the first block's input."""
        self.check(images)
        x = self._tokens(images, self.grid)
        return self.ln_pre(self._drop_patches(x) if self.training and self.patch_dropout else x)

    def embed_grid(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images of ``grid`` patches, none dropped -> ``[B, L, W]``, the first block's input."""
        return self.ln_pre(self._tokens(images, grid))

    def _tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images of ``grid`` patches -> ``[B, L, W]``; positions are interpolated."""
        positions = self.positional_embedding
        if grid != self.grid:
            positions = resample_positions(positions, self.grid, grid)
        x = self._patches(images, grid) @ self.conv1.weight.flatten(1).T  # [B, L-1, W]
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # [B, 1, W]
        return torch.cat([class_token, x], dim=1) + positions.to(x.dtype)  # [B, L, W]

    def features_from(self, x_BLW: Tensor, first: int = 0) -> Tensor:
        """Compute :meth:`features` from the input of a block: ``[B, L, W]`` -> ``[B, W]``."""
        B, L, W = x_BLW.shape
        layout = Layout(((B, L),), causal=False)
        if self.pool == "class":
            read_B = torch.arange(0, B * L, L, device=x_BLW.device)  # the class tokens
            return self.features_behind(self.transformer(x_BLW.view(B * L, W), layout, read_B, first))  # [B, W]
        x = self.transformer(x_BLW.view(B * L, W), layout, None, first).view(B, L, W)
        return self.features_behind(x[:, 1:].mean(dim=1) if self.pool == "mean" else x)

    def features_behind(self, x: Tensor) -> Tensor:
        """Compute :meth:`features` from the input of the first module after the blocks."""
        return self.ln_post(x if self.attn_pool is None else self.attn_pool(x))

    def _patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, L-1, 3PP]``: one matrix product is faster than a convolution with stride P."""
        (rows, columns), P = grid, self.conv1.kernel_size[0]
        B = images.shape[0]  # not len(): an exported graph would hard-code it
        x = images.reshape(B, 3, rows, P, columns, P).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(B, rows * columns, 3 * P * P)

    def _drop_patches(self, x: Tensor) -> Tensor:
        """Keep each image's class token and a random part of its patches: ``[B, L, W]`` -> ``[B, l, W]``."""
        patches = x.shape[1] - 1  # in any order: their positions are added already
        kept = max(1, round((1 - self.patch_dropout) * patches))
        rows = torch.rand(len(x), patches, device=x.device).topk(kept, dim=1, sorted=False).indices + 1  # [B, l-1]
        return torch.cat([x[:, :1], x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)

    def project(self, features: Tensor) -> Tensor:
        return features @ self.proj


class TextTransformer(nn.Module):
    """The text transformer of the paper, of SigLIP and of others; see :class:`TextTransformerConfig`.

    OpenAI's CLIP has these parts beside its image encoder, not in a module of their own. :class:`lit_clip.CLIP` then
    is a text transformer itself, and calls :meth:`add_text` and :meth:`read_text`.

    Attributes:
        stretched_from: context length of the weights if they must be trained for a longer one; None if not.
    """

    stretched_from: int | None = None

    def __init__(self, config: TextTransformerConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        self.add_text(config, embed_dim, activation)

    def add_text(self, config: TextTransformerConfig, embed_dim: int, activation: Activation) -> None:
        """Create the parts, initialised as in OpenAI's code."""
        width, eps = config.width, config.layer_norm_eps
        activation = config.activation or activation
        self.causal, self.text_pool, self.eos_id = config.causal, config.pool, config.eos_id
        self.padding_read = config.padding_read
        self.transformer = Transformer(width, config.layers, config.heads, activation, config.mlp_ratio, eps)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        has_class = config.pool == "class"  # its position is the last
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length + has_class, width))
        if has_class:
            self.cls_emb = nn.Parameter(torch.randn(width).mul_(0.01))
        self.ln_final, self.text_projection = nn.LayerNorm(width, eps=eps), None
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

    def forward(
        self, tokens: Tensor, lengths: Sequence[int] | None = None, entering: PartialForward | None = None
    ) -> Tensor:
        """int64 ``[B, L]`` -> ``[B, D]``; ``L`` is the context length if all padding is read, otherwise at most that.

        Args:
            tokens: ids.
            lengths: columns of each text that its features depend on; unused if all padding is read. Reading them off
                tokens on a GPU would synchronise it, so without them the padding is computed too.
            entering: the texts' activations; the embeddings and the blocks before are then not computed.
        """
        context, length = len(self.positional_embedding) - (self.text_pool == "class"), tokens.shape[1]
        # Of a class token, 1, the padding that it reads is added below.
        if length > context or (length < context and self.padding_read > 1):
            raise InputError(f"texts have {length} tokens, the model reads {context}; use model.tokenize")
        first = entering.block if entering else 0
        if self.text_pool == "class":
            x = self._read_class(tokens, lengths, entering)
        elif not self.padding_read and self._may_pack(tokens, lengths):
            lengths = lengths or (self._ends(tokens) + 1).tolist()
            packing = pack(lengths, tokens.device, self._row_length(lengths, tokens.device))
            if entering:
                x = entering.x[packing.rows, packing.columns]
            else:
                positions = F.embedding(packing.columns, self.positional_embedding)  # indexing: a slower backward pass
                x = self._embed(tokens[packing.rows, packing.columns], positions)  # [T, W]
            x = self.transformer(x, packing.layout, packing.ends, first)  # [B, W]
            x = x if packing.places is None else x.index_select(0, packing.places)
        else:
            B, L = tokens.shape
            if entering:
                x = F.pad(entering.x, (0, 0, 0, L - entering.x.shape[1])).flatten(0, 1)  # [B * L, W]
            else:
                x = self._embed(tokens, self.positional_embedding[:L])
            read_B = torch.arange(0, B * L, L, device=x.device) + self._ends(tokens)
            layout = Layout(((B, L),), self.causal)
            # In padded rows the token that is read has others behind it, and the kernel has no causal mask for single
            # queries. Packed, it is its text's last token and may read all of it.
            x = self.transformer(x, layout, None if self.causal else read_B, first)
            x = x.index_select(0, read_B) if self.causal else x  # [B, W]
        return self.project_text(x)

    read_text = forward

    def _ends(self, tokens: Tensor) -> Tensor:
        """Return the column of the token to pool: int64 ``[B, L]`` -> ``[B]``."""
        if self.text_pool == "last":
            return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
        # argmax takes the first of equal values, and has no kernel for bools.
        return (tokens if self.text_pool == "argmax" else (tokens == self.eos_id).int()).argmax(dim=-1)

    def _read_class(self, tokens: Tensor, lengths: Sequence[int] | None, entering: PartialForward | None) -> Tensor:
        """Compute the class token after the texts: int64 ``[B, L]`` -> ``[B, W]``.

        Every query reads a token only if the one before it is no padding, as when CoCa's weights were trained: the
        class token reads one padding token, and itself only behind a text of full length. No other token reads it, so
        here it comes first, where it needs no search in texts of several lengths.
        """
        if self._may_pack(tokens, lengths):
            columns = torch.arange(1, tokens.shape[1] + 1)
            tokens = tokens[:, : max(lengths or ((tokens != 0) * columns).amax(dim=1).add(1).tolist())]
        if tokens.shape[1] < len(self.positional_embedding) - 1:
            tokens = F.pad(tokens, (0, 1))  # that one
        B, L = tokens.shape
        if entering is None:
            x = self.token_embedding(tokens) + self.positional_embedding[:L]
            class_token = (self.cls_emb + self.positional_embedding[-1]).expand(B, 1, -1)
            x = torch.cat([class_token.to(x.dtype), x], dim=1)
        else:
            x = F.pad(entering.x, (0, 0, 0, 1 + L - entering.x.shape[1]))  # [B, 1 + L, W]
        read = tokens != 0
        keys = torch.cat([read[:, -1:], torch.ones_like(read[:, :1]), read[:, :-1]], dim=1)  # [B, 1 + L]
        place = torch.arange(1 + L, device=tokens.device)
        causal = (place[:, None] == 0) | ((place > 0) & (place <= place[:, None]))  # [1 + L, 1 + L]
        layout = Layout(((B, 1 + L),), True, (causal & keys[:, None])[:, None])
        read_B = torch.arange(0, B * (1 + L), 1 + L, device=tokens.device)
        first = entering.block if entering else 0
        return self.transformer(x.flatten(0, 1), layout, read_B, first)

    def project_text(self, x_BW: Tensor) -> Tensor:
        """Project the pooled tokens of the last block -> ``[B, D]``."""
        x, project = self.ln_final(x_BW), self.text_projection
        if project is None:
            return x
        return project(x) if isinstance(project, nn.Linear) else x @ project  # [B, D]

    def _may_pack(self, tokens: Tensor, lengths: Sequence[int] | None) -> bool:
        """Return whether the lengths are known and may affect the computation."""
        return not is_traced() and len(tokens) > 0 and (bool(lengths) or tokens.device.type == "cpu")

    def _row_length(self, lengths: Sequence[int], device: torch.device) -> int | None:
        """Return tokens per packed row; None for one call per length (faster on a CPU), or for equal lengths.

        A compiled block would have a graph for each set of lengths.
        """
        if not self.transformer.is_compiled and (device.type == "cpu" or len(set(lengths)) == 1):
            return None
        return -(-len(self.positional_embedding) // 16) * 16

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed ids ``[...]`` with their position embeddings ``[..., W]`` -> ``[T, W]``."""
        return (self.token_embedding(tokens) + positions).flatten(0, -2)


def is_traced() -> bool:
    """Return whether a graph is being traced; it must not depend on this batch's text lengths."""
    # torch documents is_tracing, but types it as private.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
