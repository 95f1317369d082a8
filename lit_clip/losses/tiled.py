"""The losses of :mod:`lit_clip.losses.contrastive` in tiles and over ranks, without a B x N similarity matrix.

The forward pass computes each similarity once, tile by tile, and keeps the log-sum-exp of each row and column; the
backward pass computes the similarities again. Each rank does this for its own images and all ranks' texts, which it
gathers once for both passes. Value and every gradient equal those of one process with the whole batch.

Shapes: B pairs of this rank, N pairs of all ranks, D embedding dimension, K kinds of identity (image, caption, group);
b and n rows and columns of a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_clip.distributed import RankCounts, gather_rows, logsumexp_over_ranks, sum_rows
from lit_clip.losses.contrastive import Duplicates, at_least_float32

TILE = (1024, 2048)  # rows and columns
CUDA_TILE = (4096, 8192)  # 128 MiB in float32: launching a kernel takes longer than its work on a small tile


def default_tile(device: torch.device) -> tuple[int, int]:
    """Return how many rows and columns of similarities are in memory at once."""
    return CUDA_TILE if device.type == "cuda" else TILE


@dataclass(frozen=True)
class PairLayout:
    """Number of pairs on each rank, and which of them are duplicates; no value means "unknown"."""

    ranks: RankCounts  # number of pairs of each rank
    ids: Tensor | None = None  # int64 [B, K]; pairs that agree in any column are duplicates; unused for negatives
    duplicates: Duplicates = "negatives"  # see contrastive_loss
    tile: tuple[int, int] | None = None  # rows and columns that exist at once; None: default_tile


class ShardedLoss(NamedTuple):
    """This rank's loss, a scalar (the mean over ranks is the whole batch's loss), and a number of its images.

    ``hits``, a scalar without gradient, are closest to their own text among all N; a tie does not count.
    """

    loss: Tensor
    hits: Tensor


class HardNegatives(NamedTuple):
    """Texts that are wrong for every image: this rank's unit features ``[M, D]``, and each rank's number of them."""

    features: Tensor
    ranks: RankCounts


def sharded_contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, layout: PairLayout, negatives: HardNegatives | None = None
) -> ShardedLoss:
    """Softmax loss over all ranks' pairs; see :func:`lit_clip.losses.contrastive.contrastive_loss`.

    All ranks must scale the result by the same factor before ``backward``, not each by its number of pairs: a rank's
    gradient includes the terms of other ranks' losses that depend on its features. Without hard negatives on any rank
    there are no ``negatives``.
    """
    image, text = at_least_float32(image_BD), at_least_float32(text_BD)
    layout = _with_tile(layout, image_BD)
    hard = () if negatives is None else (at_least_float32(negatives.features), negatives.ranks)
    return ShardedLoss(*_Softmax.apply(image, text, scale.to(image.dtype), layout, *hard))  # pyright: ignore[reportGeneralTypeIssues]  # untyped apply


def sharded_sigmoid_loss(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, layout: PairLayout
) -> ShardedLoss:
    """Sigmoid loss over all ranks' pairs; see :func:`lit_clip.losses.contrastive.sigmoid_loss`."""
    image, text = at_least_float32(image_BD), at_least_float32(text_BD)
    layout = _with_tile(layout, image_BD)
    scale, bias = scale.to(image.dtype), bias.to(image.dtype)
    return ShardedLoss(*_Sigmoid.apply(image, text, scale, bias, layout))  # pyright: ignore[reportGeneralTypeIssues]  # untyped apply


def _with_tile(layout: PairLayout, features: Tensor) -> PairLayout:
    return layout if layout.tile else replace(layout, tile=default_tile(features.device))


class _Tile(NamedTuple):
    """A rectangle of similarities: rows, columns, and the first row's own text relative to ``columns``."""

    rows: slice
    columns: slice
    own: int

    def same(self, layout: PairLayout, ids_NK: Tensor | None) -> Tensor:
        """Return bool ``[b, n]``: which pairs are duplicates; a pair is a duplicate of itself."""
        assert layout.ids is not None, "duplicates are found by their ids"
        assert ids_NK is not None, "gathered with the texts"
        mine, theirs = layout.ids[self.rows], ids_NK[self.columns]
        same_bn = mine[:, None, 0] == theirs[None, :, 0]  # kind by kind: [b, n, K] would take K tiles of memory
        for kind in range(1, mine.shape[1]):
            same_bn |= mine[:, None, kind] == theirs[None, :, kind]
        return same_bn


def _rectangles(layout: PairLayout, total: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of the tiles of this rank's images and ``total`` texts."""
    assert layout.tile is not None, "set by _with_tile"
    (height, width), pairs = layout.tile, layout.ranks.counts[layout.ranks.rank]
    for row in range(0, pairs, height):
        for column in range(0, total, width):
            yield slice(row, min(row + height, pairs)), slice(column, min(column + width, total))


def _tiles(layout: PairLayout) -> Iterator[_Tile]:
    """Yield the tiles of this rank's images and all ranks' texts."""
    for rows, columns in _rectangles(layout, layout.ranks.total):
        yield _Tile(rows, columns, layout.ranks.mine.start + rows.start - columns.start)


class _Texts(NamedTuple):
    """All ranks' texts."""

    features: Tensor  # [N, D]
    ids: Tensor | None = None  # int64 [N, K]; None for negatives
    shares: Tensor | None = None  # [N], of the target: one by the number of duplicates; None except for positives

    @classmethod
    def gathered(cls, layout: PairLayout, text_BD: Tensor, with_shares: bool) -> "_Texts":
        text_ND = gather_rows(text_BD, layout.ranks)
        if layout.duplicates == "negatives":
            return cls(text_ND)
        assert layout.ids is not None, "duplicates are found by their ids"
        ids_NK = gather_rows(layout.ids, layout.ranks)
        if layout.duplicates == "ignored" or not with_shares:
            return cls(text_ND, ids_NK)
        counts_B = torch.zeros(len(text_BD), dtype=torch.long, device=text_BD.device)  # a text is its own duplicate
        for tile in _tiles(layout):
            counts_B[tile.rows] += tile.same(layout, ids_NK).sum(dim=1)
        return cls(text_ND, ids_NK, gather_rows(1 / counts_B.to(text_BD.dtype), layout.ranks))

    def share(self, layout: PairLayout, tile: _Tile) -> Tensor:
        """Return ``[b, n]``: twice each pair's target if it is a duplicate."""
        assert self.shares is not None, "gathered for positives"
        return self.shares[tile.columns] + self.shares[layout.ranks.mine][tile.rows, None]


def _own(tile_bn: Tensor, offset: int) -> Tensor:
    """Return a view of the similarities between images and their own texts; empty if the tile has none."""
    rows, columns = tile_bn.shape
    return tile_bn.diagonal(offset) if -rows < offset < columns else tile_bn.new_empty(0)


class _Others(NamedTuple):
    """A tile's logits without the images' own texts; -inf takes an entry out of sums and maxima."""

    logits: Tensor  # without ignored duplicates
    wrong: Tensor  # without any duplicate: what may not be closer than the own text
    same: Tensor | None  # bool, the duplicates that are positives; None unless these are

    @classmethod
    def of(cls, layout: PairLayout, tile: _Tile, logits_bn: Tensor, texts: _Texts) -> "_Others":
        _own(logits_bn, tile.own).fill_(-torch.inf)  # in place: a copy would be one more tile
        if layout.duplicates == "negatives":
            return cls(logits_bn, logits_bn, None)
        same_bn = tile.same(layout, texts.ids)
        wrong_bn = logits_bn.masked_fill(same_bn, -torch.inf)
        if layout.duplicates == "ignored":
            return cls(wrong_bn, wrong_bn, None)
        _own(same_bn, tile.own).fill_(False)
        return cls(logits_bn, wrong_bn, same_bn)


def _add_gradients(
    tile: _Tile, G_bn: Tensor, image_BD: Tensor, text_ND: Tensor, image_grad_BD: Tensor, text_grad_ND: Tensor
) -> None:
    """Add a tile's contribution to the features' gradients, before scaling; ``G_bn`` is its logits' gradient."""
    image_grad_BD[tile.rows].addmm_(G_bn, text_ND[tile.columns])
    text_grad_ND[tile.columns].addmm_(G_bn.T, image_BD[tile.rows])


def _add_hard_logits(layout: PairLayout, wrong_MD: Tensor, scaled_BD: Tensor, row_lse_B: Tensor) -> None:
    """Add logits of this rank's images and all ranks' hard negatives to the images' log-sum-exp, in place."""
    for rows, columns in _rectangles(layout, len(wrong_MD)):
        lse_b = (scaled_BD[rows] @ wrong_MD[columns].T).logsumexp(dim=1)
        row_lse_B[rows] = torch.logaddexp(row_lse_B[rows], lse_b)


def _add_hard_gradients(
    layout: PairLayout,
    wrong_MD: Tensor,
    image_BD: Tensor,
    scaled_BD: Tensor,
    row_lse_B: Tensor,
    image_grad_BD: Tensor,
) -> Tensor:
    """Add to the images' gradient in place; return the hard negatives' ``[M, D]``; both before scaling."""
    wrong_grad_MD = torch.zeros_like(wrong_MD)
    for rows, columns in _rectangles(layout, len(wrong_MD)):
        G_bm = (scaled_BD[rows] @ wrong_MD[columns].T).sub_(row_lse_B[rows, None]).exp_()
        _add_gradients(_Tile(rows, columns, 0), G_bm, image_BD, wrong_MD, image_grad_BD, wrong_grad_MD)
    return wrong_grad_MD


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast, which would round the products' float32 inputs back to half precision."""

    @wraps(function)
    def called(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *others)

    return called


class _Softmax(torch.autograd.Function):
    """Logits ``l = scale * image @ text.T``; the images' own texts are added to the sums last.

    The loss is the sum of half ``logsumexp(l[i, :]) + logsumexp(l[:, i])``, less that of target times logit, over N.
    Its gradient by ``l[i, j]`` is ``softmax(l[i, :])[j] + softmax(l[:, j])[i] - 2 * target`` by ``2 * N``; the target
    is 1 for the own text, and ``share / 2`` for positives.
    """

    @staticmethod
    @_in_full_precision
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, layout: PairLayout, *hard: Any
    ) -> tuple[Tensor, Tensor]:
        scaled_BD, mine = scale * image_BD, layout.ranks.mine
        own_B = (scaled_BD * text_BD).sum(dim=1)
        texts = _Texts.gathered(layout, text_BD, with_shares=True)
        row_lse_B = torch.full_like(own_B, -torch.inf)
        highest_B = row_lse_B.clone()
        column_lse_N = own_B.new_full((layout.ranks.total,), -torch.inf)
        linear = own_B.new_zeros(())  # the sum of each pair's target times its logit
        for tile in _tiles(layout):
            logits_bn = scaled_BD[tile.rows] @ texts.features[tile.columns].T
            logits_bn, wrong_bn, same_bn = _Others.of(layout, tile, logits_bn, texts)
            if same_bn is not None:
                # Masked, not multiplied: the own logit is -inf here, and -inf * 0 is NaN.
                linear.add_((texts.share(layout, tile) * logits_bn).masked_fill_(~same_bn, 0).sum() / 2)
            highest_B[tile.rows] = torch.maximum(highest_B[tile.rows], wrong_bn.amax(dim=1))
            row_lse_B[tile.rows] = torch.logaddexp(row_lse_B[tile.rows], logits_bn.logsumexp(dim=1))
            column_lse_N[tile.columns] = torch.logaddexp(column_lse_N[tile.columns], logits_bn.logsumexp(dim=0))
        column_lse_N[mine] = torch.logaddexp(column_lse_N[mine], own_B)
        column_lse_N = logsumexp_over_ranks(column_lse_N, layout.ranks)
        wrong_MD = gather_rows(*hard) if hard else None
        if wrong_MD is not None:
            _add_hard_logits(layout, wrong_MD, scaled_BD, row_lse_B)
        row_lse_B = torch.logaddexp(row_lse_B, own_B)
        linear = linear + (own_B if texts.shares is None else own_B * texts.shares[mine]).sum()
        ctx.layout, ctx.negative_shards = layout, hard[1] if hard else None
        ctx.save_for_backward(image_BD, scale, row_lse_B, column_lse_N, wrong_MD, *texts)
        # This rank's part of a sum over N pairs, times ``world``, as DDP takes the mean of all ranks' gradients.
        loss = ((row_lse_B + column_lse_N[mine]).sum() / 2 - linear) * layout.ranks.world / layout.ranks.total
        hits = (own_B > highest_B).sum().to(own_B.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: PairLayout = ctx.layout
        image_BD, scale, row_lse_B, column_lse_N, wrong_MD, *saved_texts = ctx.saved_tensors
        texts = _Texts(*saved_texts)
        scaled_BD, image_grad_BD = scale * image_BD, torch.zeros_like(image_BD)
        text_grad_ND = torch.zeros_like(texts.features)
        for tile in _tiles(layout):
            logits_bn = scaled_BD[tile.rows] @ texts.features[tile.columns].T
            # ``factor`` halves it. At most three tiles exist.
            G_bn = (logits_bn - row_lse_B[tile.rows, None]).exp_()
            G_bn += logits_bn.sub_(column_lse_N[tile.columns]).exp_()
            if texts.shares is not None:
                G_bn -= texts.share(layout, tile).masked_fill_(~tile.same(layout, texts.ids), 0)
            else:
                own = _own(G_bn, tile.own)
                kept = own - 2  # put back below: a pair is a duplicate of itself, so the mask erases this too
                if layout.duplicates == "ignored":
                    G_bn.masked_fill_(tile.same(layout, texts.ids), 0)
                own.copy_(kept)
            _add_gradients(tile, G_bn, image_BD, texts.features, image_grad_BD, text_grad_ND)
        features = [image_grad_BD, sum_rows(text_grad_ND, layout.ranks)]
        if wrong_MD is not None:
            wrong_grad_MD = _add_hard_gradients(layout, wrong_MD, image_BD, scaled_BD, row_lse_B, image_grad_BD)
            features.append(sum_rows(wrong_grad_MD, ctx.negative_shards))
        factor = grads[0] * layout.ranks.world / layout.ranks.total / 2
        # sum(G * image @ text.T) = sum(image * image_grad), which is needed before the gradient is scaled in place.
        scale_grad = (image_grad_BD * image_BD).sum() * factor
        image_grad, text_grad, *negative_grad = [gradient.mul_(factor * scale) for gradient in features]
        return image_grad, text_grad, scale_grad, None, *negative_grad, *[None] * len(negative_grad)


class _Sigmoid(torch.autograd.Function):
    """Logits ``l = scale * image @ text.T + bias``; a negative costs ``softplus(l)``, a positive ``softplus(-l)``."""

    @staticmethod
    @_in_full_precision
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, layout: PairLayout
    ) -> tuple[Tensor, Tensor]:
        scaled_BD = scale * image_BD
        own_B = (scaled_BD * text_BD).sum(dim=1) + bias
        texts = _Texts.gathered(layout, text_BD, with_shares=False)  # a target is not divided among duplicates
        highest_B, cost_B = torch.full_like(own_B, -torch.inf), torch.zeros_like(own_B)
        for tile in _tiles(layout):
            logits_bn = torch.addmm(bias, scaled_BD[tile.rows], texts.features[tile.columns].T)
            logits_bn, wrong_bn, same_bn = _Others.of(layout, tile, logits_bn, texts)
            if same_bn is not None:
                # softplus(-l) = softplus(l) - l
                cost_B[tile.rows] -= logits_bn.masked_fill(~same_bn, 0).sum(dim=1)
            highest_B[tile.rows] = torch.maximum(highest_B[tile.rows], wrong_bn.amax(dim=1))
            cost_B[tile.rows] += F.softplus(logits_bn).sum(dim=1)
        ctx.layout = layout
        ctx.save_for_backward(image_BD, scale, bias, *texts)
        loss = (cost_B + F.softplus(-own_B)).sum() * layout.ranks.world / layout.ranks.total
        hits = (own_B > highest_B).sum().to(own_B.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        layout: PairLayout = ctx.layout
        image_BD, scale, bias, *saved_texts = ctx.saved_tensors
        texts = _Texts(*saved_texts)
        scaled_BD = scale * image_BD
        image_grad_BD = torch.zeros_like(image_BD)
        text_grad_ND = torch.zeros_like(texts.features)
        bias_grad_B = torch.zeros_like(image_BD[:, 0])
        for tile in _tiles(layout):
            G_bn = torch.addmm(bias, scaled_BD[tile.rows], texts.features[tile.columns].T).sigmoid_()
            own = _own(G_bn, tile.own)
            kept = own - 1
            if layout.duplicates == "positives":
                G_bn -= tile.same(layout, texts.ids).to(G_bn.dtype)
            elif layout.duplicates == "ignored":
                G_bn.masked_fill_(tile.same(layout, texts.ids), 0)
            own.copy_(kept)
            bias_grad_B[tile.rows] += G_bn.sum(dim=1)
            _add_gradients(tile, G_bn, image_BD, texts.features, image_grad_BD, text_grad_ND)
        text_grad_BD = sum_rows(text_grad_ND, layout.ranks)
        factor = grads[0] * layout.ranks.world / layout.ranks.total
        scale_grad = (image_grad_BD * image_BD).sum() * factor
        bias_grad = bias_grad_B.sum() * factor
        return image_grad_BD.mul_(factor * scale), text_grad_BD.mul_(factor * scale), scale_grad, bias_grad, None
