"""The losses of :mod:`lit_clip.losses.contrastive` in tiles and over ranks; no B x N matrix of similarities exists.

The forward pass computes each similarity once, tile by tile, and keeps the log-sum-exp of each row and column; the
backward pass computes the similarities again. Each rank does this for its own images and all ranks' texts. Value and
every gradient equal those of one process with the whole batch.

Shapes: B pairs of this rank, N pairs of all ranks, D embedding dimension, K kinds of identity (image, caption, group);
b and n rows and columns of a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_clip.distributed import Shards, visit_gathered
from lit_clip.losses.contrastive import Duplicates, at_least_float32

TILE = (1024, 2048)  # rows and columns


@dataclass(frozen=True)
class PairLayout:
    """How the pairs are spread over ranks, and which of them are duplicates.

    Attributes:
        shards: number of pairs of each rank.
        ids: int64 ``[B, K]`` of this rank's pairs; pairs that agree in any column are duplicates. Not needed if
            ``duplicates`` is ``negatives``. There is no value for "unknown".
        duplicates: see :func:`lit_clip.losses.contrastive.contrastive_loss`.
        tile: rows and columns of similarities that exist at once.
    """

    shards: Shards
    ids: Tensor | None = None
    duplicates: Duplicates = "negatives"
    tile: tuple[int, int] = field(default_factory=lambda: TILE)


class ShardedLoss(NamedTuple):
    """Result of a loss on one rank.

    Attributes:
        loss: a scalar whose mean over ranks is the loss of the whole batch.
        hits: number of this rank's images that are closest to their own text among all N; a tie does not count. A
            scalar without gradient.
    """

    loss: Tensor
    hits: Tensor


class HardNegatives(NamedTuple):
    """Texts that are wrong for every image (NegCLIP, Yuksekgonul et al. 2023).

    Attributes:
        features: this rank's, unit length, ``[M, D]``.
        shards: their number on each rank.
    """

    features: Tensor
    shards: Shards

    def _tiles(self, layout: PairLayout) -> "Iterator[_Tile]":
        height, width = layout.tile
        pairs, total = layout.shards.counts[layout.shards.rank], self.shards.total
        for row in range(0, pairs, height):
            for column in range(0, total, width):
                rows, columns = slice(row, min(row + height, pairs)), slice(column, min(column + width, total))
                yield _Tile(rows, columns, own=total)  # no image has its own text here

    def add_logits(self, layout: PairLayout, scaled_BD: Tensor, row_lse_B: Tensor) -> None:
        """Add the logits of this rank's images to their log-sum-exp, in place."""

        def visit(rows: list[Tensor], totals: list[Tensor]) -> None:
            for tile in self._tiles(layout):
                lse_b = (scaled_BD[tile.rows] @ rows[0][tile.columns].T).logsumexp(dim=1)
                row_lse_B[tile.rows] = torch.logaddexp(row_lse_B[tile.rows], lse_b)

        visit_gathered(self.shards, [self.features], [], "sum", visit)

    def add_gradients(
        self, layout: PairLayout, image_BD: Tensor, scaled_BD: Tensor, row_lse_B: Tensor, image_grad_BD: Tensor
    ) -> Tensor:
        """Add to the images' gradient in place, and return that of the features, both up to the scale."""

        def visit(rows: list[Tensor], totals: list[Tensor]) -> None:
            for tile in self._tiles(layout):
                G_bm = (scaled_BD[tile.rows] @ rows[0][tile.columns].T).sub_(row_lse_B[tile.rows, None]).exp_()
                _add_gradients(tile, G_bm, image_BD, rows[0], image_grad_BD, totals[0])

        return visit_gathered(self.shards, [self.features], [torch.zeros_like(self.features)], "sum", visit)[0]


def sharded_contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, layout: PairLayout, negatives: HardNegatives | None = None
) -> ShardedLoss:
    """Softmax loss over all ranks' pairs; see :func:`lit_clip.losses.contrastive.contrastive_loss`.

    All ranks must scale the result by the same factor before ``backward``: a rank's gradient includes the terms of
    other ranks' losses that depend on its features.

    Args:
        image_BD: this rank's image features, unit length.
        text_BD: their captions' features, unit length.
        scale: inverse temperature, ``exp(logit_scale)``.
        layout: how the pairs are spread over ranks.
        negatives: hard negative captions; None if no rank has one.
    """
    image, text = at_least_float32(image_BD), at_least_float32(text_BD)
    hard = () if negatives is None else (at_least_float32(negatives.features), negatives.shards)
    return ShardedLoss(*_Softmax.apply(image, text, scale.to(image.dtype), layout, *hard))  # pyright: ignore[reportGeneralTypeIssues]  # untyped apply


def sharded_sigmoid_loss(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, layout: PairLayout
) -> ShardedLoss:
    """Sigmoid loss over all ranks' pairs; see :func:`lit_clip.losses.contrastive.sigmoid_loss`.

    Args:
        image_BD: this rank's image features, unit length.
        text_BD: their captions' features, unit length.
        scale: inverse temperature, ``exp(logit_scale)``.
        bias: ``logit_bias``.
        layout: how the pairs are spread over ranks.
    """
    image, text = at_least_float32(image_BD), at_least_float32(text_BD)
    scale, bias = scale.to(image.dtype), bias.to(image.dtype)
    return ShardedLoss(*_Sigmoid.apply(image, text, scale, bias, layout))  # pyright: ignore[reportGeneralTypeIssues]  # untyped apply


class _Tile(NamedTuple):
    """A rectangle of similarities: rows, columns, and the first row's own text relative to ``columns``."""

    rows: slice
    columns: slice
    own: int

    def same(self, layout: PairLayout, ids_NK: Tensor) -> Tensor:
        """Return bool ``[b, n]``: which pairs are duplicates; a pair is a duplicate of itself."""
        assert layout.ids is not None, "duplicates are found by their ids"
        mine, theirs = layout.ids[self.rows], ids_NK[self.columns]
        same_bn = mine[:, None, 0] == theirs[None, :, 0]
        for kind in range(1, mine.shape[1]):
            same_bn |= mine[:, None, kind] == theirs[None, :, kind]
        return same_bn


def _tiles(layout: PairLayout) -> Iterator[_Tile]:
    """Yield the tiles of this rank's images and all ranks' texts."""
    height, width = layout.tile
    mine, pairs, total = layout.shards.mine, layout.shards.counts[layout.shards.rank], layout.shards.total
    for row in range(0, pairs, height):
        for column in range(0, total, width):
            rows, columns = slice(row, min(row + height, pairs)), slice(column, min(column + width, total))
            yield _Tile(rows, columns, mine.start + row - column)


def _own(tile_bn: Tensor, offset: int) -> Tensor:
    """Return a view of the similarities between images and their own texts; empty if the tile has none."""
    rows, columns = tile_bn.shape
    return tile_bn.diagonal(offset) if -rows < offset < columns else tile_bn.new_empty(0)


class _Others(NamedTuple):
    """A tile's logits without the images' own texts; -inf takes an entry out of sums and maxima.

    Attributes:
        logits: without ignored duplicates.
        wrong: without any duplicate.
        same: bool, the duplicates that are positives; None unless ``duplicates`` is ``positives``.
    """

    logits: Tensor
    wrong: Tensor
    same: Tensor | None

    @classmethod
    def of(cls, layout: PairLayout, tile: _Tile, logits_bn: Tensor, rows: list[Tensor]) -> "_Others":
        _own(logits_bn, tile.own).fill_(-torch.inf)
        if layout.duplicates == "negatives":
            return cls(logits_bn, logits_bn, None)
        same_bn = tile.same(layout, rows[1])
        wrong_bn = logits_bn.masked_fill(same_bn, -torch.inf)
        if layout.duplicates == "ignored":
            return cls(wrong_bn, wrong_bn, None)
        _own(same_bn, tile.own).fill_(False)
        return cls(logits_bn, wrong_bn, same_bn)


def _counts_of_same(layout: PairLayout) -> Tensor:
    """Return ``[B]``: for each of this rank's pairs the number of its duplicates, including itself."""
    assert layout.ids is not None, "duplicates are found by their ids"
    counts_B = torch.zeros(len(layout.ids), dtype=torch.long, device=layout.ids.device)

    def count(rows: list[Tensor], totals: list[Tensor]) -> None:
        for tile in _tiles(layout):
            counts_B[tile.rows] += tile.same(layout, rows[0]).sum(dim=1)

    visit_gathered(layout.shards, [layout.ids], [], "sum", count)
    return counts_B


def _shared_rows(layout: PairLayout, text_BD: Tensor) -> list[Tensor]:
    """Return what other ranks need of each text: its features, its ids, and its share of the target."""
    rows = [text_BD]
    if layout.duplicates != "negatives":
        assert layout.ids is not None, "duplicates are found by their ids"
        rows.append(layout.ids)
    if layout.duplicates == "positives":
        rows.append(1 / _counts_of_same(layout).to(text_BD.dtype))
    return rows


def _add_gradients(
    tile: _Tile, G_bn: Tensor, image_BD: Tensor, text_ND: Tensor, image_grad_BD: Tensor, text_grad_ND: Tensor
) -> None:
    """Add a tile's contribution to the features' gradients, up to the scale; ``G_bn`` is the gradient of its logits."""
    image_grad_BD[tile.rows].addmm_(G_bn, text_ND[tile.columns])
    text_grad_ND[tile.columns].addmm_(G_bn.T, image_BD[tile.rows])


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast, which would compute the products in half precision again."""

    @wraps(function)
    def called(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *others)

    return called


class _Softmax(torch.autograd.Function):
    """Logits ``l = scale * image @ text.T``; the images' own texts are added to the sums last."""

    @staticmethod
    @_in_full_precision
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, layout: PairLayout, *hard: Any
    ) -> tuple[Tensor, Tensor]:
        scaled_BD = scale * image_BD
        own_B = (scaled_BD * text_BD).sum(dim=1)
        shared_rows = _shared_rows(layout, text_BD)
        row_lse_B, highest_B = (torch.full_like(own_B, -torch.inf) for _ in range(2))
        linear = own_B.new_zeros(())

        def visit(rows: list[Tensor], totals: list[Tensor]) -> None:
            (column_lse_N,) = totals
            for tile in _tiles(layout):
                logits_bn = scaled_BD[tile.rows] @ rows[0][tile.columns].T
                logits_bn, wrong_bn, same_bn = _Others.of(layout, tile, logits_bn, rows)
                if same_bn is not None:
                    share_bn = rows[2][tile.columns] + shared_rows[2][tile.rows, None]
                    linear.add_((share_bn * logits_bn).masked_fill_(~same_bn, 0).sum() / 2)
                highest_B[tile.rows] = torch.maximum(highest_B[tile.rows], wrong_bn.amax(dim=1))
                row_lse_B[tile.rows] = torch.logaddexp(row_lse_B[tile.rows], logits_bn.logsumexp(dim=1))
                column_lse_N[tile.columns] = torch.logaddexp(column_lse_N[tile.columns], logits_bn.logsumexp(dim=0))

        (column_lse_B,) = visit_gathered(
            layout.shards, shared_rows, [torch.full_like(own_B, -torch.inf)], "logsumexp", visit
        )
        if hard:
            HardNegatives(*hard).add_logits(layout, scaled_BD, row_lse_B)
        row_lse_B, column_lse_B = torch.logaddexp(row_lse_B, own_B), torch.logaddexp(column_lse_B, own_B)
        linear = linear + (own_B * shared_rows[2] if layout.duplicates == "positives" else own_B).sum()
        ctx.layout, ctx.negative_shards = layout, hard[1] if hard else None
        ctx.save_for_backward(image_BD, scale, row_lse_B, column_lse_B, *hard[:1], *shared_rows)
        loss = ((row_lse_B + column_lse_B).sum() / 2 - linear) * layout.shards.world / layout.shards.total
        hits = (own_B > highest_B).sum().to(own_B.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: PairLayout = ctx.layout
        image_BD, scale, row_lse_B, column_lse_B, *shared_rows = ctx.saved_tensors
        hard = [HardNegatives(shared_rows.pop(0), ctx.negative_shards)] if ctx.negative_shards else []
        scaled_BD, image_grad_BD = scale * image_BD, torch.zeros_like(image_BD)

        def visit(rows: list[Tensor], totals: list[Tensor]) -> None:
            text_ND, column_lse_N, *more = rows
            for tile in _tiles(layout):
                logits_bn = scaled_BD[tile.rows] @ text_ND[tile.columns].T
                G_bn = (logits_bn - row_lse_B[tile.rows, None]).exp_()
                G_bn += logits_bn.sub_(column_lse_N[tile.columns]).exp_()
                if layout.duplicates == "positives":
                    share_bn = more[1][tile.columns] + shared_rows[2][tile.rows, None]
                    G_bn -= share_bn.masked_fill_(~tile.same(layout, more[0]), 0)
                else:
                    own = _own(G_bn, tile.own)
                    kept = own - 2
                    if layout.duplicates == "ignored":
                        G_bn.masked_fill_(tile.same(layout, more[0]), 0)
                    own.copy_(kept)
                _add_gradients(tile, G_bn, image_BD, text_ND, image_grad_BD, totals[0])

        shown = [shared_rows[0], column_lse_B, *shared_rows[1:]]
        (text_grad_BD,) = visit_gathered(layout.shards, shown, [torch.zeros_like(image_BD)], "sum", visit)
        factor = grads[0] * layout.shards.world / layout.shards.total / 2
        hard_grads = [each.add_gradients(layout, image_BD, scaled_BD, row_lse_B, image_grad_BD) for each in hard]
        scale_grad = (image_grad_BD * image_BD).sum() * factor
        features = [image_grad_BD, text_grad_BD, *hard_grads]
        image_grad, text_grad, *negative_grad = [gradient.mul_(factor * scale) for gradient in features]
        return image_grad, text_grad, scale_grad, None, *negative_grad, *[None] * len(hard)


class _Sigmoid(torch.autograd.Function):
    """Logits ``l = scale * image @ text.T + bias``; a negative costs ``softplus(l)``, a positive ``softplus(-l)``."""

    @staticmethod
    @_in_full_precision
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, layout: PairLayout
    ) -> tuple[Tensor, Tensor]:
        scaled_BD = scale * image_BD
        own_B = (scaled_BD * text_BD).sum(dim=1) + bias
        shared_rows = _shared_rows(layout, text_BD)[:2]  # the sigmoid loss does not divide a target among duplicates
        highest_B, cost_B = torch.full_like(own_B, -torch.inf), torch.zeros_like(own_B)

        def visit(rows: list[Tensor], totals: list[Tensor]) -> None:
            for tile in _tiles(layout):
                logits_bn = torch.addmm(bias, scaled_BD[tile.rows], rows[0][tile.columns].T)
                logits_bn, wrong_bn, same_bn = _Others.of(layout, tile, logits_bn, rows)
                if same_bn is not None:
                    cost_B[tile.rows] -= logits_bn.masked_fill(~same_bn, 0).sum(dim=1)
                highest_B[tile.rows] = torch.maximum(highest_B[tile.rows], wrong_bn.amax(dim=1))
                cost_B[tile.rows] += F.softplus(logits_bn).sum(dim=1)

        visit_gathered(layout.shards, shared_rows, [], "sum", visit)
        ctx.layout = layout
        ctx.save_for_backward(image_BD, scale, bias, *shared_rows)
        loss = (cost_B + F.softplus(-own_B)).sum() * layout.shards.world / layout.shards.total
        hits = (own_B > highest_B).sum().to(own_B.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        layout: PairLayout = ctx.layout
        image_BD, scale, bias, *shared_rows = ctx.saved_tensors
        scaled_BD, image_grad_BD = scale * image_BD, torch.zeros_like(image_BD)
        bias_grad_B = torch.zeros_like(image_BD[:, 0])

        def visit(rows: list[Tensor], totals: list[Tensor]) -> None:
            text_ND, *more = rows
            for tile in _tiles(layout):
                G_bn = torch.addmm(bias, scaled_BD[tile.rows], text_ND[tile.columns].T).sigmoid_()
                own = _own(G_bn, tile.own)
                kept = own - 1
                if layout.duplicates == "positives":
                    G_bn -= tile.same(layout, more[0]).to(G_bn.dtype)
                elif layout.duplicates == "ignored":
                    G_bn.masked_fill_(tile.same(layout, more[0]), 0)
                own.copy_(kept)
                bias_grad_B[tile.rows] += G_bn.sum(dim=1)
                _add_gradients(tile, G_bn, image_BD, text_ND, image_grad_BD, totals[0])

        (text_grad_BD,) = visit_gathered(layout.shards, shared_rows, [torch.zeros_like(image_BD)], "sum", visit)
        factor = grads[0] * layout.shards.world / layout.shards.total
        scale_grad, bias_grad = (image_grad_BD * image_BD).sum() * factor, bias_grad_B.sum() * factor
        return image_grad_BD.mul_(factor * scale), text_grad_BD.mul_(factor * scale), scale_grad, bias_grad, None
