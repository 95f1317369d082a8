"""Pack a batch's tokens without padding, so that no layer computes unused values.

Shapes: B sequences, L tokens of the longest, T tokens of all sequences, W width, H heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.tools.hardware import has_bfloat16, to_device

# Sequence lengths up to which plain products with gradients beat the CPU's fused kernel, and take little memory.
LONGEST_PLAIN = {torch.float32: 64, torch.bfloat16: 256 if has_bfloat16() else 0}


class Layout(NamedTuple):
    """Sequences concatenated in ``[T, W]``, and how they attend."""

    runs: tuple[tuple[int, int], ...]  # count and length of each run of neighbouring sequences of equal length
    causal: bool  # whether a token attends only to itself and those before it
    # bool ``[R, 1, C, C]``, the keys that each query reads, where several texts share a sequence: ``runs`` is then one
    # run of R rows of C tokens
    mask: Tensor | None = None

    def attend(self, qkv_TX: Tensor, heads: int) -> Tensor:
        """Attend with queries, keys and values of all tokens, ``[T, 3W]`` -> ``[T, W]``."""
        if len(self.runs) == 1:
            return self._run(qkv_TX, *self.runs[0], heads)
        parts = qkv_TX.split([count * length for count, length in self.runs])
        outs = [self._run(part, *run, heads) for part, run in zip(parts, self.runs, strict=True)]
        return torch.cat(outs)

    def _run(self, qkv: Tensor, count: int, length: int, heads: int) -> Tensor:
        W = qkv.shape[1] // 3
        q, k, v = _heads(qkv, count, length, heads, 3)
        return attention(q, k, v, self.causal, self.mask).transpose(1, 2).reshape(count * length, W)

    def attend_from(self, q_BW: Tensor, kv_TX: Tensor, heads: int) -> Tensor:
        """Attend from one token per sequence to the whole sequence: ``[B, W]`` and ``[T, 2W]`` -> ``[B, W]``.

        The queries are in the order of ``runs``; of a causal layout each is its sequence's last token.
        """
        if len(self.runs) == 1:
            return _one_query(q_BW, kv_TX, *self.runs[0], heads)
        queries = q_BW.split([count for count, _ in self.runs])
        parts = kv_TX.split([count * length for count, length in self.runs])
        outs = [_one_query(q, kv, *run, heads) for q, kv, run in zip(queries, parts, self.runs, strict=True)]
        return torch.cat(outs)


def _heads(x: Tensor, count: int, length: int, heads: int, parts: int) -> list[Tensor]:
    """``[n * l, parts * W]`` -> ``parts`` views ``[n, H, l, W/H]``."""
    # Unbound where they lie: permuted before, the gradients would be stacked in another order, and copied once more.
    split = x.view(count, length, parts, heads, x.shape[1] // (parts * heads))
    return [part.transpose(1, 2) for part in split.unbind(2)]


def _one_query(q: Tensor, kv: Tensor, count: int, length: int, heads: int) -> Tensor:
    W = q.shape[1]
    k, v = _heads(kv, count, length, heads, 2)
    return attention(q.view(count, heads, 1, W // heads), k, v, causal=False).reshape(count, W)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """``[n, H, m, d]`` queries, ``[n, H, l, d]`` keys and values -> ``[n, H, m, d]``.

    Calls torch's kernel except on a CPU, whose fused kernel has a slow backward pass: up to four times slower in
    bfloat16, and in float32 for sequences that fit in one of its blocks (docs/evidence/performance.md).

    The mask, bool, broadcast to ``[n, H, m, l]``, has the keys that each query reads; it is causal itself if
    ``causal``.
    """
    # No mask here: layouts that have one are causal.
    if (
        q.device.type == "cpu"
        and not causal
        and k.shape[2] <= LONGEST_PLAIN.get(q.dtype, 0)
        and (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    ):
        return torch.matmul((torch.matmul(q * q.shape[3] ** -0.5, k.transpose(2, 3))).softmax(dim=3).to(v.dtype), v)
    causal_alone = causal and mask is None
    if q.device.type == "cpu" and causal and q.dtype == torch.bfloat16:  # short texts take half the time in float32
        with torch.autocast("cpu", enabled=False):  # which would cast the inputs back
            inputs = (q.float(), k.float(), v.float())
            return F.scaled_dot_product_attention(*inputs, mask, is_causal=causal_alone).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal_alone)


class Packing(NamedTuple):
    """The texts of a batch without padding: sorted by length, shortest first, or several to a row."""

    layout: Layout  # of the packed tokens
    # int64 ``[T]``, the row of each token in the batch; what no text fills repeats the batch's first token
    rows: Tensor
    columns: Tensor  # int64 ``[T]``, the column of each token in the batch
    ends: Tensor  # int64 ``[B]``, the index in T of each text's last token
    # int64 ``[B]``, each text's index in ``ends``: ``x[places]`` brings features in their order into the batch's. None:
    # it is the batch's
    places: Tensor | None = None


def pack(lengths: Sequence[int], device: torch.device, row_length: int | None = None) -> Packing:
    """Compute the packing for texts of these lengths, without synchronising the device.

    Args:
        lengths: of B texts, at least 1 each.
        device: of the tokens.
        row_length: tokens of a row, at least the longest text's: attention is one call for any lengths. None: texts of
            equal length side by side, one call per length, and not a token more than theirs.
    """
    sizes, order = torch.tensor(lengths).sort(stable=True)  # [B]
    starts = sizes.cumsum(0) - sizes  # [B]
    rows = order.repeat_interleave(sizes)  # [T]
    columns = torch.arange(len(rows)) - starts.repeat_interleave(sizes)  # [T]
    values, counts = sizes.unique_consecutive(return_counts=True)
    runs = tuple(zip(counts.tolist(), values.tolist(), strict=True))
    places = torch.empty_like(order)  # the inverse permutation
    places[order] = torch.arange(len(order))
    if row_length is None:
        return Packing(Layout(runs, True), *_moved(device, rows, columns, starts + sizes - 1, places))
    firsts, count = _fill_rows(runs, row_length)
    firsts = torch.tensor(firsts)  # [B], in the order of sizes
    cells = firsts.repeat_interleave(sizes) + columns  # of the texts' tokens
    grids = (torch.zeros(count * row_length, dtype=torch.long).scatter_(0, cells, index) for index in (rows, columns))
    rows, columns, ends = _moved(device, *grids, (firsts + sizes - 1)[places])
    # A cell that no text fills has column 0 and reads itself: a query without keys would be NaN.
    key = torch.arange(row_length, device=device)  # [C]
    first_key = key - columns.view(count, row_length)  # [R, C], of each query's text
    mask = (key >= first_key[:, :, None]) & (key <= key[:, None])  # [R, C, C]
    return Packing(Layout(((count, row_length),), True, mask[:, None]), rows, columns, ends)


def _fill_rows(runs: Sequence[tuple[int, int]], row_length: int) -> tuple[list[int], int]:
    """Pack texts, given as ``runs`` of count and length, into few rows: longest first, each into the fullest fit.

    Return the index of each text's first token, in the order of ``runs`` (shortest first), and the number of rows. It
    is rounded up by a sixteenth at most, so that batches have few shapes: kernels are planned for each.
    """
    free: list[list[int]] = [[] for _ in range(row_length)]  # by number of free tokens: the index of the first
    # A room of ``row_length`` is a new row, taken where no row has enough free tokens.
    firsts: list[int] = []
    count = 0
    for left, length in reversed(runs):
        for room in range(length, row_length + 1):
            while left and (room == row_length or free[room]):
                if room == row_length:
                    first, count = count * row_length, count + 1
                else:
                    first = free[room].pop()
                fitting = min(left, room // length)
                end = first + fitting * length
                firsts.extend(range(first, end, length))
                free[room - fitting * length].append(end)
                left -= fitting
    step = max(1, (1 << count.bit_length()) >> 5)  # a power of two, at most a sixteenth of the rows
    return firsts[::-1], -(-count // step) * step


def _moved(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy several int64 vectors to a device in one transfer."""
    return to_device(torch.cat(tensors), device).split([len(tensor) for tensor in tensors])


def length_groups(lengths: Sequence[int], most: int = 4, least_rows: int = 16, worth: float = 0.1) -> list[Tensor]:
    """Group texts of similar length, for an encoder that needs padded texts; return int64 row indices per group.

    There are at most ``most`` groups, each of at least ``least_rows``: smaller ones cost more than the padding they
    save. If grouping saves less than the fraction ``worth`` of all padded tokens, there is one.
    """
    sizes, order = torch.tensor(lengths).sort(stable=True)
    groups = list(order.tensor_split(max(1, min(most, len(lengths) // least_rows))))
    longest = torch.tensor(lengths)
    padded = sum(len(group) * int(longest[group].max()) for group in groups)
    whole = len(lengths) * int(sizes[-1])
    return groups if padded <= (1 - worth) * whole else [torch.arange(len(lengths))]
