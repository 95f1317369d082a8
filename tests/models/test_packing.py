"""Packed texts have the padded form's features and gradients, in float64, and need no arithmetic for padding."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lit_clip import CLIP
from lit_clip.models import packing, transformer
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.packing import Layout, length_groups, pack
from lit_clip.models.running import PartialForward
from lit_clip.models.transformer import TextTransformer
from tests.helpers.towers import TEXTS, save_family, text_model

CONTEXT, END = 24, 99


def small_clip(layers: int = 3, context: int = CONTEXT, causal: bool = True) -> CLIP:
    torch.manual_seed(0)
    image = VisionTransformerConfig(image_size=32, patch_size=8, width=32, layers=layers, heads=2)
    text = TextTransformerConfig(
        context_length=context, vocab_size=END + 1, width=32, layers=layers, heads=2, causal=causal
    )
    model = CLIP(CLIPConfig(16, image, text)).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def texts(lengths: list[int], context: int = CONTEXT) -> Tensor:
    """Create random ids and an end, followed by ids that must be ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (len(lengths), context), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = END
    return tokens


def random_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    return torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def caption_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths like those of captions: 15 tokens on average, at most 77."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (2.62 + 0.45 * normal).exp().round().clamp(5, 77).long().tolist()


LENGTHS = [
    [7],
    [1],
    [5, 5, 5],
    [1] * 50,
    [24] * 9,
    [24, 1, 9, 9, 2, 17, 24, 3],
    list(range(1, 25)),
    random_lengths(61, 24),
]


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


def in_rows(monkeypatch: pytest.MonkeyPatch, row_length: int = 32) -> None:
    """Pack texts as on an accelerator."""
    monkeypatch.setattr(TextTransformer, "_row_length", lambda *_: row_length)


@pytest.mark.parametrize("row_length", [None, 24, 32, 48])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_texts_have_the_padded_forms_features_and_gradients(
    lengths: list[int], row_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows, too: of 24 tokens, which the longest texts fill, and where much is left over."""
    model, tokens = small_clip(), texts(lengths)
    if row_length:
        in_rows(monkeypatch, row_length)
    expected, expected_gradients = gradients(model, lambda: padded(model, tokens))
    for told in (None, lengths):
        found, found_gradients = gradients(model, lambda told=told: model.encode_text(tokens, lengths=told))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert found_gradients.keys() == expected_gradients.keys()
        for name, gradient in found_gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-11, msg=name)
            assert (gradient - expected_gradients[name]).norm() <= 1e-12 * expected_gradients[name].norm(), name


def test_texts_in_rows_may_start_from_stored_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = small_clip(), LENGTHS[5]
    tokens = texts(lengths)
    expected = padded(model, tokens)
    stored = (model.token_embedding(tokens) + model.positional_embedding).detach()
    stored[torch.arange(CONTEXT) >= torch.tensor(lengths)[:, None]] = 7.0
    in_rows(monkeypatch)
    entering = PartialForward(stored, 0, model.transformer.resblocks[0])
    torch.testing.assert_close(model.read_text(tokens, lengths, entering), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        behind = model.transformer.resblocks[0](stored.flatten(0, 1), Layout(((len(lengths), CONTEXT),), True))
    entering = PartialForward(behind.view_as(stored), 1, model.transformer.resblocks[1])
    found = model.read_text(tokens, lengths, entering)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_texts_that_are_not_causal_are_computed_whole_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding belongs to them: SigLIP's end of text is the last position."""
    model, tokens = small_clip(causal=False), texts(LENGTHS[5])
    expected = model.encode_text(tokens)
    in_rows(monkeypatch)
    assert torch.equal(model.encode_text(tokens), expected)


@pytest.mark.parametrize("lengths", [LENGTHS[5], caption_lengths(64), [9] * 5])
def test_rows_hold_each_token_once_and_a_token_reads_its_text_up_to_itself(lengths: list[int]) -> None:
    row_length = 80
    found = pack(lengths, torch.device("cpu"), row_length)
    (count, length), *others = found.layout.runs
    assert (length, others) == (row_length, [])
    cells = [(found.rows[end], found.columns[end]) for end in found.ends.tolist()]
    assert cells == [(row, length - 1) for row, length in enumerate(lengths)]
    assert found.places is None
    mask = found.layout.mask
    assert mask is not None
    assert mask.shape == (count, 1, row_length, row_length)
    held = set()
    for end, n in zip(found.ends.tolist(), lengths, strict=True):
        for column in range(n):
            cell = end - n + 1 + column
            held.add(cell)
            assert found.columns[cell] == column
            assert found.rows[cell] == found.rows[end]
            row, place = divmod(cell, row_length)
            assert mask[row, 0, place].nonzero().flatten().tolist() == list(range(place - column, place + 1))
    assert len(held) == sum(lengths)
    for cell in set(range(count * row_length)) - held:  # what is left over reads itself, so no softmax is empty
        row, place = divmod(cell, row_length)
        assert mask[row, 0, place].nonzero().flatten().tolist() == [place]


@pytest.mark.parametrize("count", [64, 256, 1024, 4096])
def test_rows_are_full_and_their_number_repeats(count: int) -> None:
    """Of all computed tokens at least nine in ten are a text's, and batches have few shapes."""
    batches = [caption_lengths(count, seed) for seed in range(10)]
    rows = [pack(lengths, torch.device("meta"), 80).layout.runs[0][0] for lengths in batches]
    assert min(sum(lengths) / (80 * n) for lengths, n in zip(batches, rows, strict=True)) > 0.9
    assert len(set(rows)) <= 4
    assert pack([77] * count, torch.device("meta"), 80).layout.runs == ((count, 80),)


def test_texts_on_a_device_are_packed_without_reading_it() -> None:
    """The meta device has no values that could be read."""
    lengths = caption_lengths(64)
    model = small_clip(context=77).to("meta")
    tokens = torch.zeros(64, max(lengths), dtype=torch.long, device="meta")
    shapes: list[torch.Size] = []
    model.transformer.resblocks[0].register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    model.encode_text(tokens, lengths=lengths).sum().backward()
    model.encode_text(tokens, lengths=[9] * 64)
    rows = pack(lengths, torch.device("cpu"), 80).layout.runs[0][0]
    assert shapes == [(rows * 80, 32), (64 * 9, 32)]  # texts of one length need no rows
    assert rows * 80 < 1.1 * sum(lengths)


class Operators(TorchDispatchMode):
    """Count the operators that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("one_query", [True, False])
def test_the_gradients_of_attentions_inputs_are_copied_once(
    causal: bool, one_query: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values are views of one tensor; its gradient is stacked, and nothing else is copied."""
    monkeypatch.setattr(packing, "LONGEST_PLAIN", {})  # torch's kernel, as on a device
    n, length, W = 4, 20, 64
    qkv, query = torch.randn(n * length, 3 * W, requires_grad=True), torch.randn(n, W, requires_grad=True)
    layout = Layout(((n, length),), causal)
    out = layout.attend_from(query, qkv[:, W:].contiguous(), 2) if one_query else layout.attend(qkv, 2)
    with Operators() as operators:
        out.backward(torch.ones_like(out))
    assert operators.count["stack"] == 1
    assert operators.count["clone"] + operators.count["copy_"] + operators.count["_to_copy"] == 0


def test_the_number_of_operators_does_not_depend_on_the_lengths_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_clip()
    in_rows(monkeypatch)

    def operators(lengths: list[int]) -> Counter[str]:
        model.zero_grad()
        tokens = texts(lengths)
        with Operators() as found:
            model.encode_text(tokens, lengths=lengths).sum().backward()
        return found.count

    first = operators(LENGTHS[5])
    assert first == operators(LENGTHS[6]) == operators(LENGTHS[7])
    layers = len(model.transformer.resblocks)
    for name in ("index_copy", "clone", "constant_pad_nd"):  # no layer pads or copies
        assert first[name] == 0
    assert first["stack"] == layers


def test_a_traced_graph_keeps_the_padding_and_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small_clip(), texts(LENGTHS[5])
    packed = model.encode_text(tokens)
    monkeypatch.setattr(transformer, "is_traced", lambda: True)
    torch.testing.assert_close(model.encode_text(tokens), packed, rtol=1e-12, atol=1e-12)


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_batch_costs_as_many_flops_as_its_texts_one_by_one() -> None:
    model, lengths = small_clip().requires_grad_(False), LENGTHS[5]
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
