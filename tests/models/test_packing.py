"""Packed texts have the padded form's features and gradients, in float64, and need no arithmetic for padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_clip import CLIP
from lit_clip.models import packing, transformer
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.packing import length_groups, pack
from tests.helpers.towers import TEXTS, save_family, text_model

CONTEXT, END = 24, 99


def small_clip(layers: int = 3) -> CLIP:
    torch.manual_seed(0)
    image = VisionTransformerConfig(image_size=32, patch_size=8, width=32, layers=layers, heads=2)
    text = TextTransformerConfig(context_length=CONTEXT, vocab_size=END + 1, width=32, layers=layers, heads=2)
    model = CLIP(CLIPConfig(16, image, text)).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def texts(lengths: list[int]) -> Tensor:
    """Create random ids and an end, followed by ids that must be ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (len(lengths), CONTEXT), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = END
    return tokens


LENGTHS = [[7], [5, 5, 5], [24, 1, 9, 9, 2, 17, 24, 3], list(range(1, 25))]


def padded(model: CLIP, tokens: Tensor) -> Tensor:
    """Compute the plain form: all positions go through all blocks, then the end is selected."""
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
    for block in model.transformer.resblocks:
        attention: Any = block.attn
        y = block.ln_1(x)
        out, _ = torch.nn.functional.multi_head_attention_forward(
            *(y.transpose(0, 1),) * 3,
            attention.embed_dim,
            attention.num_heads,
            attention.in_proj_weight,
            attention.in_proj_bias,
            None,
            None,
            False,
            0.0,
            attention.out_proj.weight,
            attention.out_proj.bias,
            attn_mask=mask,
            need_weights=False,
        )
        x = x + out.transpose(0, 1)
        x = x + block.mlp(block.ln_2(x))
    x = x[torch.arange(len(x)), tokens.argmax(1)]
    return model.ln_final(x) @ model.text_projection


def gradients(model: CLIP, encode: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    features = encode()
    (features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)).sum().backward()
    return features.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded_attention", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_texts_have_the_padded_forms_features_and_gradients(
    lengths: list[int], padded_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = small_clip(), texts(lengths)
    monkeypatch.setattr(transformer, "pack", lambda sizes, device: pack(sizes, device, padded_attention))
    expected, expected_gradients = gradients(model, lambda: padded(model, tokens))
    for told in (None, lengths):
        found, found_gradients = gradients(model, lambda told=told: model.encode_text(tokens, lengths=told))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert found_gradients.keys() == expected_gradients.keys()
        for name, gradient in found_gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-11, msg=name)


def test_a_traced_graph_keeps_the_padding_and_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small_clip(), texts(LENGTHS[2])
    packed = model.encode_text(tokens)
    monkeypatch.setattr(transformer, "is_traced", lambda: True)
    torch.testing.assert_close(model.encode_text(tokens), packed, rtol=1e-12, atol=1e-12)


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_batch_costs_as_many_flops_as_its_texts_one_by_one() -> None:
    model, lengths = small_clip().requires_grad_(False), LENGTHS[2]
    tokens = texts(lengths)
    whole = flops(lambda: model.encode_text(tokens))
    one_by_one = sum(
        flops(lambda row=row, n=n: model.encode_text(tokens[row, None, :n])) for row, n in enumerate(lengths)
    )
    assert whole == one_by_one
    assert whole < flops(lambda: padded(model, tokens)) / 2


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_last_block_computes_only_the_pooled_tokens(tower: str) -> None:
    """Keys and values take 2 W^2 of a block's 12 W^2 multiply-adds per token; only they are needed for every token.

    The counter does not count the CPU's fused attention.
    """
    two, three = (small_clip(layers).requires_grad_(False) for layers in (2, 3))
    images, tokens = torch.zeros(2, 3, 32, 32, dtype=torch.double), texts([24, 24])
    W, T = 32, {"image": 2 * 17, "text": 2 * 24}[tower]

    def cost(model: CLIP) -> int:
        return flops(lambda: model.encode_image(images) if tower == "image" else model.encode_text(tokens))

    whole_block = 2 * 12 * W * W * T
    assert cost(three) - cost(two) == whole_block
    last = 2 * (2 * W * W * T + 10 * W * W * 2)
    outside = 2 * (2 * W * 16) + (2 * (3 * 8 * 8) * W * 2 * 16 if tower == "image" else 0)
    assert cost(two) == whole_block + last + outside


def test_an_empty_batch_gives_no_features() -> None:
    model = small_clip()
    assert model.encode_text(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 16)
    assert model.encode_image(torch.zeros(0, 3, 32, 32, dtype=torch.double)).shape == (0, 16)


@pytest.mark.parametrize(("rows", "least_rows"), [(64, 16), (67, 16), (7, 2)])
def test_groups_hold_each_text_once_and_save_padding(rows: int, least_rows: int) -> None:
    lengths = torch.randint(3, 70, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = length_groups(lengths, least_rows=least_rows)
    assert sorted(torch.cat(groups).tolist()) == list(range(rows))
    assert 1 < len(groups) <= 4
    assert min(len(group) for group in groups) >= least_rows
    cost = sum(len(group) * max(lengths[row] for row in group.tolist()) for group in groups)
    assert cost < 0.9 * rows * max(lengths)


def test_texts_of_similar_length_stay_together() -> None:
    assert [group.tolist() for group in length_groups([9] * 40 + [10])] == [list(range(41))]
    assert len(length_groups([3, 70] * 10)) == 1  # too few for two groups of 16


def test_a_hugging_face_encoder_gives_the_same_features_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family("bert", tmp_path)
    model = text_model(tmp_path).double().eval()
    tokens = model.tokenize([*TEXTS, *["a dog and a cat"] * 30, *["the"] * 30, TEXTS[1]])
    calls: list[tuple[int, ...]] = []
    encode = model.text._encode
    monkeypatch.setattr(
        model.text, "_encode", lambda part, *rest: (calls.append(tuple(part.shape)), encode(part, *rest))[1]
    )
    found, found_gradients = gradients(model, lambda: model.encode_text(tokens))
    assert len(calls) == 4
    assert sum(rows for rows, _ in calls) == len(tokens)
    model.text.in_groups = False
    expected, expected_gradients = gradients(model, lambda: model.encode_text(tokens))
    assert calls[4:] == [tuple(tokens.shape)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-8, atol=1e-9, msg=name)


def test_a_packing_locates_each_token() -> None:
    found = pack([3, 1, 2], torch.device("cpu"), padded_attention=True)
    assert found.layout.runs == ((1, 1), (1, 2), (1, 3))
    assert list(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == [
        (1, 0), (2, 0), (2, 1), (0, 0), (0, 1), (0, 2)
    ]  # fmt: skip
    assert found.ends.tolist() == [0, 2, 5]
    assert found.places.tolist() == [2, 0, 1]
    assert found.layout.cells is not None
    assert found.layout.cells.tolist() == [0, 3, 4, 6, 7, 8]
    assert packing.pack([4, 4], torch.device("cpu"), padded_attention=True).layout.cells is None


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize(("queries", "length", "causal"), [(9, 9, False), (9, 9, True), (1, 9, False), (70, 70, False)])
@pytest.mark.parametrize("longest_plain", [0, 256])
def test_attention_is_softmax_of_scaled_products(
    dtype: torch.dtype,
    tolerance: float,
    queries: int,
    length: int,
    causal: bool,
    longest_plain: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "LONGEST_PLAIN", dict.fromkeys((torch.float32, torch.bfloat16), longest_plain))
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, queries, 8), (2, 3, length, 8), (2, 3, length, 8))
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact
    scores = q @ k.transpose(2, 3) / 8**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(3) @ v
    found = packing.attention(*inputs, causal)
    assert found.dtype == dtype
    for result in (expected, found):
        (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for x, reference in zip(inputs, exact, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_attention_is_torchs_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's forward pass is as fast, and rounds less."""
    monkeypatch.setattr(packing, "LONGEST_PLAIN", dict.fromkeys((torch.float32, torch.bfloat16), 256))
    q, k, v = (torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(n)).to(dtype) * 8 for n in range(3))
    kernels = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(packing.attention(q, k, v, causal=False), kernels)
    q.requires_grad_()
    with torch.no_grad():
        assert torch.equal(packing.attention(q, k, v, causal=False), kernels)
    assert not torch.equal(packing.attention(q, k, v, causal=False), kernels)


def test_causal_attention_in_bfloat16_is_computed_in_float32_under_autocast_too() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=generator).bfloat16() for _ in range(3))
    wide = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = packing.attention(q, k, v, causal=True)
    assert torch.equal(found, wide.bfloat16())


def test_the_tokenizers_lengths_can_be_passed() -> None:
    model, tokens = small_clip(), texts(LENGTHS[2])
    lengths = tokens.argmax(1) + 1
    assert torch.equal(model.encode_text(tokens, lengths=lengths), model.encode_text(tokens))
