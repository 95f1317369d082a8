"""Kernels that a step could use, forward and backward, beside those that it uses."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import architecture
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.inputs import named
from gpu.setting import Row, Setting, attempt, gap, seconds_per_call
from lit_clip import create_model
from lit_clip.distributed import RankCounts
from lit_clip.losses.tiled import PairLayout, sharded_contrastive_loss

HEADS, WIDTH, CONTEXT, ROW = 8, 64, 77, 80  # of ViT-B-32's text encoder; a row holds several texts
TILES = ((1024, 2048), (2048, 4096), (4096, 8192), (8192, 16384))


def rows(setting: Setting) -> Iterator[Row]:
    yield from best_of("text attention", "rows", text_attention(setting))
    for tokens, batch, heads in ((50, 1024, 12), (197, 512, 12), (257, 128, 16)):
        what = f"image attention, {tokens} tokens"
        yield from best_of(what, "flash", image_attention(setting, what, tokens, batch, heads))
    yield from best_of("loss tiles", "default", loss_tiles(setting))
    yield from best_of("AdamW", "fused", adamw(setting))


def best_of(what: str, ours: str, found: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, and one that says how much faster the fastest is than what is used now."""
    speeds: dict[str, float] = {}
    for row in found:
        yield {**row, "what": f"{what}: {row['what']}"}
        if "ms" in row:
            speeds[row["what"]] = row["ms"]
    if ours in speeds:
        best = min(speeds, key=lambda name: speeds[name])
        yield {"what": f"{what}: fastest", "fastest": best, **gap(speeds[ours] / speeds[best], f"{what}: {best}")}


def timed(setting: Setting, work: Callable[[], Tensor]) -> Row:
    """Time forward and backward pass."""

    def both() -> None:
        work().sum().backward()

    return {"ms": seconds_per_call(both, 1 if setting.tiny else 20, setting) * 1000}


def random_inputs(setting: Setting, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values in bfloat16."""

    def draw() -> Tensor:
        return torch.randn(*shape, device=setting.device, dtype=torch.bfloat16, requires_grad=True)

    return draw(), draw(), draw()


def text_attention(setting: Setting) -> Iterator[Row]:
    """Yield causal attention over texts of about 14 tokens, in several arrangements."""
    draw = random.Random(0)
    lengths = [min(CONTEXT, max(5, int(draw.lognormvariate(2.65, 0.45)))) for _ in range(8 if setting.tiny else 1024)]
    longest = max(lengths)
    inputs = random_inputs(setting, len(lengths), HEADS, longest, WIDTH)
    yield attempt(
        setting, "padded", lambda: timed(setting, lambda: F.scaled_dot_product_attention(*inputs, is_causal=True))
    )
    yield attempt(setting, "varlen", lambda: timed(setting, varlen(setting, lengths)), cuda=True)
    yield attempt(setting, "rows", lambda: timed(setting, in_rows(setting, lengths)))
    yield attempt(setting, "flex", lambda: timed(setting, flex(setting, lengths)), needs=15, cuda=True)


def varlen(setting: Setting, lengths: list[int]) -> Callable[[], Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *lengths]).cumsum(0).to(setting.device, torch.int32)
    inputs, longest = random_inputs(setting, sum(lengths), HEADS, WIDTH), max(lengths)

    def run() -> Tensor:
        out = varlen_attn(*inputs, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out

    return run


def documents(lengths: list[int]) -> Tensor:
    """Put texts into rows of ``ROW`` tokens, longest first: int64 ``[R, ROW]``, the text of each token, or -1."""
    rows: list[list[int]] = []
    free: list[int] = []
    for text in np.argsort(-np.array(lengths), kind="stable").tolist():
        row = next((row for row, space in enumerate(free) if space >= lengths[text]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(ROW)
        rows[row] += [text] * lengths[text]
        free[row] -= lengths[text]
    return torch.tensor([row + [-1] * (ROW - len(row)) for row in rows])


def in_rows(setting: Setting, lengths: list[int]) -> Callable[[], Tensor]:
    texts = documents(lengths).to(setting.device)
    causal = torch.ones(ROW, ROW, dtype=torch.bool, device=setting.device).tril()
    mask = ((texts[:, :, None] == texts[:, None, :]) & causal)[:, None]  # [R, 1, ROW, ROW]
    inputs = random_inputs(setting, len(texts), HEADS, ROW, WIDTH)
    return lambda: F.scaled_dot_product_attention(*inputs, mask)


def flex(setting: Setting, lengths: list[int]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    whole = sum(lengths)
    text = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(setting.device)

    def causal(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (text[query] == text[key]) & (query >= key)

    mask = create_block_mask(causal, None, None, whole, whole, device=setting.device, _compile=True)
    inputs = random_inputs(setting, 1, HEADS, whole, WIDTH)
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(*inputs, block_mask=mask)


def image_attention(setting: Setting, what: str, tokens: int, batch: int, heads: int) -> Iterator[Row]:
    inputs = random_inputs(setting, 2 if setting.tiny else batch, heads, tokens, WIDTH)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, backend in backends.items():
        yield attempt(setting, name, partial(_with_backend, setting, backend, inputs), cuda=name != "flash")


def _with_backend(setting: Setting, backend: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor]) -> Row:
    with sdpa_kernel(backend):
        return timed(setting, lambda: F.scaled_dot_product_attention(*inputs))


def loss_tiles(setting: Setting) -> Iterator[Row]:
    """Yield the tiled softmax loss with its default tiles and with others, with and without TF32."""
    pairs = 64 if setting.tiny else 16384
    features = [F.normalize(torch.randn(pairs, 512, device=setting.device), dim=1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(14.3, device=setting.device, requires_grad=True)

    def loss(layout: PairLayout) -> Tensor:
        return sharded_contrastive_loss(features[0], features[1], scale, layout).loss

    ranks = RankCounts(0, (pairs,))
    yield attempt(setting, "default", lambda: timed(setting, lambda: loss(PairLayout(ranks))))
    for tile in TILES:
        name = f"{tile[0]} x {tile[1]}"
        yield attempt(
            setting, name, lambda tile=tile: timed(setting, lambda: loss(PairLayout(ranks, tile=tile))), needs=2
        )
    yield attempt(setting, "default, TF32", lambda: with_tf32(setting, lambda: loss(PairLayout(ranks))), cuda=True)


def with_tf32(setting: Setting, work: Callable[[], Tensor]) -> Row:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return timed(setting, work)
    finally:
        torch.set_float32_matmul_precision(before)


def adamw(setting: Setting) -> Iterator[Row]:
    parameters = list(create_model(architecture(named(setting, "ViT-B-32"))).to(setting.device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    for name in ("foreach", "fused"):
        yield attempt(setting, name, partial(_optimizer_step, setting, parameters, name))


def _optimizer_step(setting: Setting, parameters: list[nn.Parameter], form: str) -> Row:
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, foreach=form == "foreach", fused=form == "fused")
    return {"ms": seconds_per_call(optimizer.step, 1 if setting.tiny else 20, setting) * 1000}
