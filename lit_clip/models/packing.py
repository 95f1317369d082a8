"""Pack the tokens of a batch without padding, so that no layer computes values that nothing reads.

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
    """Sequences concatenated in ``[T, W]``, and how they attend.

    Attributes:
        runs: count and length of each run of neighbouring sequences of equal length.
        causal: whether a token attends only to itself and those before it.
        cells: int64 ``[T]``, the index of each token in the flattened ``[B, L]``: attention pads the sequences
            internally and needs one call for all runs. None: one call per run, without padding.
        shape: ``(B, L)`` for ``cells``.
    """

    runs: tuple[tuple[int, int], ...]
    causal: bool
    cells: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    def attend(self, qkv_TX: Tensor, heads: int) -> Tensor:
        """Queries, keys and values of all tokens, ``[T, 3W]`` -> ``[T, W]``."""
        if self.cells is not None:
            B, L = self.shape
            padded = qkv_TX.new_zeros(B * L, qkv_TX.shape[1]).index_copy(0, self.cells, qkv_TX)
            # No token attends to padding after its sequence: attention is causal wherever lengths differ.
            return self._run(padded, B, L, heads).index_select(0, self.cells)
        if len(self.runs) == 1:
            return self._run(qkv_TX, *self.runs[0], heads)
        parts = qkv_TX.split([count * length for count, length in self.runs])
        outs = [self._run(part, *run, heads) for part, run in zip(parts, self.runs, strict=True)]
        return torch.cat(outs)

    def _run(self, qkv: Tensor, count: int, length: int, heads: int) -> Tensor:
        W = qkv.shape[1] // 3
        q, k, v = qkv.view(count, length, 3, heads, W // heads).permute(2, 0, 3, 1, 4)  # 3 x [n, H, l, W/H]
        return attention(q, k, v, self.causal).transpose(1, 2).reshape(count * length, W)

    def attend_from(self, q_BW: Tensor, kv_TX: Tensor, heads: int) -> Tensor:
        """Attend from one token per sequence to the whole sequence: ``[B, W]`` and ``[T, 2W]`` -> ``[B, W]``."""
        if self.cells is not None:
            B, L = self.shape
            padded = kv_TX.new_zeros(B * L, kv_TX.shape[1]).index_copy(0, self.cells, kv_TX)
            real = torch.zeros(B * L, dtype=torch.bool, device=q_BW.device).index_fill(0, self.cells, True)
            return _one_query(q_BW, padded, B, L, heads, real.view(B, 1, 1, L))
        if len(self.runs) == 1:
            return _one_query(q_BW, kv_TX, *self.runs[0], heads)
        queries = q_BW.split([count for count, _ in self.runs])
        parts = kv_TX.split([count * length for count, length in self.runs])
        outs = [_one_query(q, kv, *run, heads) for q, kv, run in zip(queries, parts, self.runs, strict=True)]
        return torch.cat(outs)


def _one_query(q: Tensor, kv: Tensor, count: int, length: int, heads: int, mask: Tensor | None = None) -> Tensor:
    W = q.shape[1]
    q = q.view(count, heads, 1, W // heads)  # [n, H, 1, W/H]
    k, v = kv.view(count, length, 2, heads, W // heads).permute(2, 0, 3, 1, 4)  # 2 x [n, H, l, W/H]
    if mask is None:
        return attention(q, k, v, causal=False).reshape(count, W)
    return F.scaled_dot_product_attention(q, k, v, mask).reshape(count, W)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """``[n, H, m, d]`` queries, ``[n, H, l, d]`` keys and values -> ``[n, H, m, d]``.

    Calls torch's kernel except on a CPU, whose fused kernel has a slow backward pass: up to four times slower in
    bfloat16, and in float32 for sequences that fit in one of its blocks (docs/performance.md).
    """
    if q.device.type == "cpu" and not causal and k.shape[2] <= LONGEST_PLAIN.get(q.dtype, 0) and _differentiated(q, k):
        return torch.matmul((torch.matmul(q * q.shape[3] ** -0.5, k.transpose(2, 3))).softmax(dim=3).to(v.dtype), v)
    if q.device.type == "cpu" and causal and q.dtype == torch.bfloat16:  # short texts take half the time in float32
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class Packing(NamedTuple):
    """The texts of a batch without padding, sorted by length, shortest first.

    Attributes:
        layout: of the packed tokens.
        rows: int64 ``[T]``, the row of each token in the batch.
        columns: int64 ``[T]``, the column of each token in the batch.
        ends: int64 ``[B]``, the index in T of each sorted text's last token.
        places: int64 ``[B]``, each text's index in the sorted order: ``sorted[places]`` restores the batch's order.
    """

    layout: Layout
    rows: Tensor
    columns: Tensor
    ends: Tensor
    places: Tensor


def pack(lengths: Sequence[int], device: torch.device, padded_attention: bool | None = None) -> Packing:
    """Compute the packing for texts of these lengths, without synchronising the device.

    Args:
        lengths: of B texts, at least 1 each.
        device: of the tokens.
        padded_attention: whether to call attention once for all texts instead of once per length. None: not on a CPU,
            where calls are cheap and copies are expensive.
    """
    if padded_attention is None:
        padded_attention = device.type != "cpu"
    of_rows = torch.tensor(lengths)  # [B]
    sizes, order = of_rows.sort(stable=True)
    starts = sizes.cumsum(0) - sizes  # [B]
    rows = order.repeat_interleave(sizes)  # [T]
    columns = torch.arange(len(rows)) - starts.repeat_interleave(sizes)  # [T]
    values, counts = sizes.unique_consecutive(return_counts=True)
    runs = tuple(zip(counts.tolist(), values.tolist(), strict=True))
    shape = (len(lengths), int(sizes[-1]))
    cells = None
    if padded_attention and len(runs) > 1:  # in sorted order, too
        cells = torch.arange(len(lengths)).repeat_interleave(sizes) * shape[1] + columns
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    moved = [to_device(tensor, device) for tensor in (rows, columns, starts + sizes - 1, places)]
    return Packing(Layout(runs, True, None if cells is None else to_device(cells, device), shape), *moved)


def length_groups(lengths: Sequence[int], most: int = 4, least_rows: int = 16, worth: float = 0.1) -> list[Tensor]:
    """Group texts of similar length, for an encoder that needs padded texts.

    Args:
        lengths: of B texts.
        most: maximum number of groups.
        least_rows: minimum rows per group: smaller groups cost more than the padding they save.
        worth: fraction of all padded tokens that grouping must save; otherwise there is one group.

    Returns:
        int64 row indices per group; each row is in one group.
    """
    sizes, order = torch.tensor(lengths).sort(stable=True)
    groups = list(order.tensor_split(max(1, min(most, len(lengths) // least_rows))))
    longest = torch.tensor(lengths)
    padded = sum(len(group) * int(longest[group].max()) for group in groups)
    whole = len(lengths) * int(sizes[-1])
    return groups if padded <= (1 - worth) * whole else [torch.arange(len(lengths))]
