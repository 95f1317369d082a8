"""The losses of :mod:`lit_clip.losses.contrastive` over tiles and ranks: no matrix of all similarities ever exists.

The forward pass computes each similarity once, tile by tile, and keeps a number a row and a number a column; the
backward pass computes it a second time. Each rank does so for its own images with all ranks' texts, which it is shown
at once or block by block (:mod:`lit_clip.distributed`). Value and every gradient are those of one process with the
whole batch.

Shapes: B pairs of this rank, N of all ranks, M of those that are shown, D embedding dimension, K kinds of identity;
b and m the rows and columns of a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_clip.distributed import Shards, Visit, visit_gathered, visit_ring
from lit_clip.losses.contrastive import Duplicates, at_least_float32

TILE = (1024, 2048)  # rows and columns


@dataclass(frozen=True)
class PairLayout:
    """How the pairs lie and what they are to each other.

    Attributes:
        shards: the pairs of each rank.
        ids: int64 ``[B, K]``, of this rank's pairs: two that agree in any column say the same; not needed if duplicates
            are ``negatives``. No number may stand for "unknown".
        duplicates: see :func:`lit_clip.losses.contrastive.contrastive_loss`.
        ring: texts go round block by block (memory of 2 B pairs a rank) instead of being gathered (N pairs).
        tile: rows and columns of similarities that exist at one time.
    """

    shards: Shards
    ids: Tensor | None = None
    duplicates: Duplicates = "negatives"
    ring: bool = False
    tile: tuple[int, int] = field(default_factory=lambda: TILE)

    def visit(self, rows: list[Tensor], totals: list[Tensor], kind: Any, visit: Visit) -> list[Tensor]:
        """Show all ranks' rows to this one."""
        return (visit_ring if self.ring else visit_gathered)(self.shards, rows, totals, kind, visit)


class ShardedLoss(NamedTuple):
    """What a rank gets.

    Attributes:
        loss: a scalar whose mean over ranks is the loss of the whole batch.
        hits: how many of this rank's images are nearer to their text than to any other of the N, a scalar without
            gradient; a tie is none.
    """

    loss: Tensor
    hits: Tensor


def sharded_contrastive_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor, plan: PairLayout) -> ShardedLoss:
    """The softmax loss of all ranks' pairs; see :func:`lit_clip.losses.contrastive.contrastive_loss`.

    Every rank has to scale its result alike before it calls ``backward``: a rank's gradient holds what its images have
    to do with the other ranks' losses.

    Args:
        image_BD: this rank's image features, unit length.
        text_BD: their captions' features, unit length.
        scale: inverse temperature, ``exp(logit_scale)``.
        plan: how the pairs lie.
    """
    image, text = at_least_float32(image_BD), at_least_float32(text_BD)
    return ShardedLoss(*_Softmax.apply(image, text, scale.to(image.dtype), plan))  # pyright: ignore[reportGeneralTypeIssues]  # untyped apply


def sharded_sigmoid_loss(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, plan: PairLayout
) -> ShardedLoss:
    """The sigmoid loss of all ranks' pairs; see :func:`lit_clip.losses.contrastive.sigmoid_loss`.

    Args:
        image_BD: this rank's image features, unit length.
        text_BD: their captions' features, unit length.
        scale: inverse temperature, ``exp(logit_scale)``.
        bias: ``logit_bias``.
        plan: how the pairs lie.
    """
    image, text = at_least_float32(image_BD), at_least_float32(text_BD)
    scale, bias = scale.to(image.dtype), bias.to(image.dtype)
    return ShardedLoss(*_Sigmoid.apply(image, text, scale, bias, plan))  # pyright: ignore[reportGeneralTypeIssues]  # untyped apply


class _Tile(NamedTuple):
    """A rectangle of similarities: which rows, which columns, and where the first row's own text is among these."""

    rows: slice
    columns: slice
    own: int

    def same(self, plan: PairLayout, ids_MK: Tensor) -> Tensor:
        """Bool ``[b, m]``: which pairs say the same; their own are among them."""
        assert plan.ids is not None, "without identities nobody knows of duplicates"
        mine, theirs = plan.ids[self.rows], ids_MK[self.columns]
        same_bm = mine[:, None, 0] == theirs[None, :, 0]
        for kind in range(1, mine.shape[1]):
            same_bm |= mine[:, None, kind] == theirs[None, :, kind]
        return same_bm


def _tiles(plan: PairLayout, first: int, columns: int) -> Iterator[_Tile]:
    """All tiles of this rank's images with ``columns`` texts of which the first is number ``first`` of all."""
    height, width = plan.tile
    mine, pairs = plan.shards.mine, plan.shards.counts[plan.shards.rank]
    for row in range(0, pairs, height):
        for column in range(0, columns, width):
            rows, texts = slice(row, min(row + height, pairs)), slice(column, min(column + width, columns))
            yield _Tile(rows, texts, mine.start + row - first - column)


def _own(tile_bm: Tensor, offset: int) -> Tensor:
    """The part of a tile where images meet their own texts, as a view; empty if there is none."""
    rows, columns = tile_bm.shape
    return tile_bm.diagonal(offset) if -rows < offset < columns else tile_bm.new_empty(0)


class _Others(NamedTuple):
    """A tile's logits as the forward pass wants them; -inf is what neither costs anything nor is compared with.

    Attributes:
        logits: without the images' own texts, and without what is ignored.
        wrong: without what is right, too.
        same: bool, the right ones beside the own; None unless duplicates are ``positives``.
    """

    logits: Tensor
    wrong: Tensor
    same: Tensor | None

    @classmethod
    def of(cls, plan: PairLayout, tile: _Tile, logits_bm: Tensor, rows: list[Tensor]) -> "_Others":
        _own(logits_bm, tile.own).fill_(-torch.inf)
        if plan.duplicates == "negatives":
            return cls(logits_bm, logits_bm, None)
        same_bm = tile.same(plan, rows[1])
        wrong_bm = logits_bm.masked_fill(same_bm, -torch.inf)
        if plan.duplicates == "ignored":
            return cls(wrong_bm, wrong_bm, None)
        _own(same_bm, tile.own).fill_(False)
        return cls(logits_bm, wrong_bm, same_bm)


def _counts_of_same(plan: PairLayout) -> Tensor:
    """``[B]``: how many of all pairs say the same as each of this rank's, itself among them."""
    assert plan.ids is not None, "without identities nobody knows of duplicates"
    counts_B = torch.zeros(len(plan.ids), dtype=torch.long, device=plan.ids.device)

    def count(first: int, rows: list[Tensor], totals: list[Tensor]) -> None:
        for tile in _tiles(plan, first, len(rows[0])):
            counts_B[tile.rows] += tile.same(plan, rows[0]).sum(dim=1)

    plan.visit([plan.ids], [], "sum", count)
    return counts_B


def _rows_to_show(plan: PairLayout, text_BD: Tensor) -> list[Tensor]:
    """What other ranks' images need of a text: its feature, what it says and, as one of several, its share."""
    rows = [text_BD]
    if plan.duplicates != "negatives":
        assert plan.ids is not None, "without identities nobody knows of duplicates"
        rows.append(plan.ids)
    if plan.duplicates == "positives":
        rows.append(1 / _counts_of_same(plan).to(text_BD.dtype))
    return rows


def _add_gradients(
    tile: _Tile, G_bm: Tensor, image_BD: Tensor, text_MD: Tensor, image_grad_BD: Tensor, text_grad_MD: Tensor
) -> None:
    """Add what a tile's logits, whose gradient is ``G_bm``, mean for the features (the scale is left out)."""
    image_grad_BD[tile.rows].addmm_(G_bm, text_MD[tile.columns])
    text_grad_MD[tile.columns].addmm_(G_bm.T, image_BD[tile.rows])


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would compute the products in half precision again."""

    @wraps(function)
    def called(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *others)

    return called


class _Softmax(torch.autograd.Function):
    """Logits ``l = scale * image @ text.T``; own texts are left out of the sums over others and added at the end."""

    @staticmethod
    @_in_full_precision
    def forward(ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, plan: PairLayout) -> tuple[Tensor, Tensor]:
        scaled_BD = scale * image_BD
        own_B = (scaled_BD * text_BD).sum(dim=1)
        rows_to_show = _rows_to_show(plan, text_BD)
        row_lse_B, highest_B = (torch.full_like(own_B, -torch.inf) for _ in range(2))
        linear = own_B.new_zeros(())

        def visit(first: int, rows: list[Tensor], totals: list[Tensor]) -> None:
            (column_lse_M,) = totals
            for tile in _tiles(plan, first, len(rows[0])):
                logits_bm = scaled_BD[tile.rows] @ rows[0][tile.columns].T
                logits_bm, wrong_bm, same_bm = _Others.of(plan, tile, logits_bm, rows)
                if same_bm is not None:
                    share_bm = rows[2][tile.columns] + rows_to_show[2][tile.rows, None]
                    linear.add_((share_bm * logits_bm).masked_fill_(~same_bm, 0).sum() / 2)
                highest_B[tile.rows] = torch.maximum(highest_B[tile.rows], wrong_bm.amax(dim=1))
                row_lse_B[tile.rows] = torch.logaddexp(row_lse_B[tile.rows], logits_bm.logsumexp(dim=1))
                column_lse_M[tile.columns] = torch.logaddexp(column_lse_M[tile.columns], logits_bm.logsumexp(dim=0))

        (column_lse_B,) = plan.visit(rows_to_show, [torch.full_like(own_B, -torch.inf)], "logsumexp", visit)
        row_lse_B, column_lse_B = torch.logaddexp(row_lse_B, own_B), torch.logaddexp(column_lse_B, own_B)
        linear = linear + (own_B * rows_to_show[2] if plan.duplicates == "positives" else own_B).sum()
        ctx.plan = plan
        ctx.save_for_backward(image_BD, scale, row_lse_B, column_lse_B, *rows_to_show)
        loss = ((row_lse_B + column_lse_B).sum() / 2 - linear) * plan.shards.world / plan.shards.total
        hits = (own_B > highest_B).sum().to(own_B.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        plan: PairLayout = ctx.plan
        image_BD, scale, row_lse_B, column_lse_B, *rows_to_show = ctx.saved_tensors
        scaled_BD, image_grad_BD = scale * image_BD, torch.zeros_like(image_BD)

        def visit(first: int, rows: list[Tensor], totals: list[Tensor]) -> None:
            text_MD, column_lse_M, *more = rows
            for tile in _tiles(plan, first, len(text_MD)):
                logits_bm = scaled_BD[tile.rows] @ text_MD[tile.columns].T
                G_bm = (logits_bm - row_lse_B[tile.rows, None]).exp_()
                G_bm += logits_bm.sub_(column_lse_M[tile.columns]).exp_()
                if plan.duplicates == "positives":
                    share_bm = more[1][tile.columns] + rows_to_show[2][tile.rows, None]
                    G_bm -= share_bm.masked_fill_(~tile.same(plan, more[0]), 0)
                else:
                    own = _own(G_bm, tile.own)
                    kept = own - 2
                    if plan.duplicates == "ignored":
                        G_bm.masked_fill_(tile.same(plan, more[0]), 0)
                    own.copy_(kept)
                _add_gradients(tile, G_bm, image_BD, text_MD, image_grad_BD, totals[0])

        shown = [rows_to_show[0], column_lse_B, *rows_to_show[1:]]
        (text_grad_BD,) = plan.visit(shown, [torch.zeros_like(image_BD)], "sum", visit)
        factor = grads[0] * plan.shards.world / plan.shards.total / 2
        scale_grad = (image_grad_BD * image_BD).sum() * factor
        return image_grad_BD.mul_(factor * scale), text_grad_BD.mul_(factor * scale), scale_grad, None


class _Sigmoid(torch.autograd.Function):
    """Logits ``l = scale * image @ text.T + bias``; each costs ``softplus(l)``, of a right one ``l`` less."""

    @staticmethod
    @_in_full_precision
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, plan: PairLayout
    ) -> tuple[Tensor, Tensor]:
        scaled_BD = scale * image_BD
        own_B = (scaled_BD * text_BD).sum(dim=1) + bias
        rows_to_show = _rows_to_show(plan, text_BD)[:2]  # of the sigmoid loss every right answer is a whole one
        highest_B, cost_B = torch.full_like(own_B, -torch.inf), torch.zeros_like(own_B)

        def visit(first: int, rows: list[Tensor], totals: list[Tensor]) -> None:
            for tile in _tiles(plan, first, len(rows[0])):
                logits_bm = torch.addmm(bias, scaled_BD[tile.rows], rows[0][tile.columns].T)
                logits_bm, wrong_bm, same_bm = _Others.of(plan, tile, logits_bm, rows)
                if same_bm is not None:
                    cost_B[tile.rows] -= logits_bm.masked_fill(~same_bm, 0).sum(dim=1)
                highest_B[tile.rows] = torch.maximum(highest_B[tile.rows], wrong_bm.amax(dim=1))
                cost_B[tile.rows] += F.softplus(logits_bm).sum(dim=1)

        plan.visit(rows_to_show, [], "sum", visit)
        ctx.plan = plan
        ctx.save_for_backward(image_BD, scale, bias, *rows_to_show)
        loss = (cost_B + F.softplus(-own_B)).sum() * plan.shards.world / plan.shards.total
        hits = (own_B > highest_B).sum().to(own_B.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        plan: PairLayout = ctx.plan
        image_BD, scale, bias, *rows_to_show = ctx.saved_tensors
        scaled_BD, image_grad_BD = scale * image_BD, torch.zeros_like(image_BD)
        bias_grad_B = torch.zeros_like(image_BD[:, 0])

        def visit(first: int, rows: list[Tensor], totals: list[Tensor]) -> None:
            text_MD, *more = rows
            for tile in _tiles(plan, first, len(text_MD)):
                G_bm = torch.addmm(bias, scaled_BD[tile.rows], text_MD[tile.columns].T).sigmoid_()
                own = _own(G_bm, tile.own)
                kept = own - 1
                if plan.duplicates == "positives":
                    G_bm -= tile.same(plan, more[0]).to(G_bm.dtype)
                elif plan.duplicates == "ignored":
                    G_bm.masked_fill_(tile.same(plan, more[0]), 0)
                own.copy_(kept)
                bias_grad_B[tile.rows] += G_bm.sum(dim=1)
                _add_gradients(tile, G_bm, image_BD, text_MD, image_grad_BD, totals[0])

        (text_grad_BD,) = plan.visit(rows_to_show, [torch.zeros_like(image_BD)], "sum", visit)
        factor = grads[0] * plan.shards.world / plan.shards.total
        scale_grad, bias_grad = (image_grad_BD * image_BD).sum() * factor, bias_grad_B.sum() * factor
        return image_grad_BD.mul_(factor * scale), text_grad_BD.mul_(factor * scale), scale_grad, bias_grad, None
