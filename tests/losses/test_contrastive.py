"""The losses against hand-computed values, plain loops and open_clip."""

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Pairs, Sigmoid, WeightedContrastive, duplicates
from lit_clip.losses.contrastive import Duplicates, contrastive_loss, sigmoid_loss, unit
from lit_clip.losses.duplicates import pair_ids, token_hash
from lit_clip.losses.loss import evaluate_loss
from lit_clip.losses.weighted import ModelFeatures, distillation_loss
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.tools.hashing import stable_hash
from tests.helpers.ranks import PAIRS, make_batch
from tests.helpers.ranks_losses import POLICIES


def random_units(size: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return float64 unit features of images and texts, ``[size, dim]`` each."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, size, dim, generator=generator, dtype=torch.float64)
    return unit(image), unit(text)


def loss_in_plain_loops(image: list[list[float]], text: list[list[float]], scale: float) -> float:
    """Figure 3 of the paper: the mean over pairs and directions of -log softmax at the matching pair."""

    def one_direction(queries: list[list[float]], candidates: list[list[float]]) -> float:
        total = 0.0
        for i, query in enumerate(queries):
            logits = [scale * sum(a * b for a, b in zip(query, candidate, strict=True)) for candidate in candidates]
            total -= logits[i] - math.log(sum(math.exp(logit) for logit in logits))
        return total / len(queries)

    return (one_direction(image, text) + one_direction(text, image)) / 2


def test_loss_and_gradients_of_a_worked_example() -> None:
    # Values to 6 digits from a line-by-line review of the paper; G is dL/dZ of the cosine logits Z.
    U = torch.tensor([[1, 0], [0, 1], [-1, 0]], dtype=torch.float64, requires_grad=True)
    V = torch.tensor([[0.8, 0.6], [0, 1], [-0.8, 0.6]], dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(math.log(2), dtype=torch.float64, requires_grad=True)
    G = torch.tensor(
        [[-0.101808, 0.04483, 0.009437], [0.104735, -0.114388, 0.104735], [0.009437, 0.04483, -0.101808]],
        dtype=torch.float64,
    )
    loss = contrastive_loss(U, V, U, V, log_scale.exp())
    loss.backward()
    close = {"rtol": 0, "atol": 2e-6}  # six printed digits, times a scale of 2
    torch.testing.assert_close(loss.item(), 0.398242, **close)
    torch.testing.assert_close(log_scale.grad, torch.tensor(-0.333398, dtype=torch.float64), **close)
    torch.testing.assert_close(U.grad, 2 * G @ V.detach(), **close)
    torch.testing.assert_close(V.grad, 2 * G.T @ U.detach(), **close)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss_equals_plain_loops(size: int, scale: float) -> None:
    image, text = random_units(size, dim=5, seed=size)
    loss = contrastive_loss(image, text, image, text, torch.tensor(scale, dtype=torch.float64))
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(loss_in_plain_loops(image.tolist(), text.tolist(), scale), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("ranks", "local"), [(7, 1), (3, 5)])
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(kind: str, ranks: int, local: int) -> None:
    leaves = [x.requires_grad_() for x in random_units(ranks * local, dim=6, seed=4)]
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (20.0, -5.0))

    def loss(rows: slice) -> Tensor:
        image, text = leaves
        if kind == "sigmoid":
            return sigmoid_loss(image[rows], text, scale, bias, rows.start)
        return contrastive_loss(image[rows], text[rows], image, text, scale, rows.start)

    whole = loss(slice(0, ranks * local))
    mean = torch.stack([loss(slice(row, row + local)) for row in range(0, ranks * local, local)]).mean()
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    for ours, expected in zip(torch.autograd.grad(mean, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_features_give_a_float32_loss(dtype: torch.dtype, autocast: bool) -> None:
    image, text = (x.to(dtype) for x in random_units(33, dim=16, seed=5))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = contrastive_loss(image, text, image, text, torch.tensor(100.0))
        other = sigmoid_loss(image, text, torch.tensor(100.0), torch.tensor(-10.0))
    exact = loss_in_plain_loops(image.tolist(), text.tolist(), 100.0)  # for the rounded features
    assert loss.dtype == other.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-5)  # logits in bfloat16 would be off by up to 0.4
    exact = sigmoid_loss_in_plain_loops(image.tolist(), text.tolist(), 100, -10)
    assert other.item() == pytest.approx(exact, rel=1e-5)


def test_unit_converts_half_precision_and_no_other_to_float32() -> None:
    features = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(6))
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        units = unit(features.to(dtype))
        assert units.dtype == wide
        torch.testing.assert_close(units.norm(dim=-1), torch.ones(3, 5, dtype=wide), rtol=0, atol=1e-6)


def sigmoid_loss_in_plain_loops(image: list[list[float]], text: list[list[float]], scale: float, bias: float) -> float:
    """Equation 1 of the paper (Zhai et al. 2023): -1/B of the sum over all pairs of log sigmoid(z (t x.y + b))."""
    total = 0.0
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            sign = 1 if i == j else -1
            logit = scale * sum(a * b for a, b in zip(x, y, strict=True)) + bias
            total += math.log1p(math.exp(-sign * logit))
    return total / len(image)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (100.0, -3.0)])
def test_sigmoid_loss_equals_plain_loops(size: int, scale: float, bias: float) -> None:
    image, text = random_units(size, dim=5, seed=size)
    t, b = (torch.tensor(x, dtype=torch.float64) for x in (scale, bias))
    loss = sigmoid_loss(image, text, t, b)
    expected = sigmoid_loss_in_plain_loops(image.tolist(), text.tolist(), scale, bias)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_sigmoid_loss_and_gradients_equal_open_clips() -> None:
    ours, theirs = (
        [*(x.clone().requires_grad_() for x in random_units(7, dim=5, seed=1))]
        + [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, -10.0)]
        for _ in range(2)
    )
    loss, expected = sigmoid_loss(*ours), open_clip.loss.SigLipLoss()(*theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-10, atol=1e-14)


def test_a_bias_learned_with_large_batches_fits_small_ones_if_the_loss_knows_of_them() -> None:
    """Unknown, the share of right pairs, 32 times larger, pulls the features of all images and texts together."""
    image, noise = random_units(512, dim=32, seed=6)
    text, scale = unit(image + 2 * noise), torch.tensor(20.0, dtype=torch.float64)
    bias = torch.tensor(-8.0, dtype=torch.float64, requires_grad=True)
    slope = bias
    for _ in range(10):  # Newton's method: the best bias for all 512 pairs at once
        (slope,) = torch.autograd.grad(sigmoid_loss(image, text, scale, bias), bias)
        likely = (scale * image @ text.T + bias).sigmoid()
        bias = (bias - slope / (likely * (1 - likely)).sum(dim=1).mean()).detach().requires_grad_()
    batch = CaptionBatch(
        torch.zeros(16, 3, 8, 8), torch.zeros(16, 4, dtype=torch.long), [str(row) for row in range(16)]
    )

    def pull(loss: Sigmoid) -> float:
        """Return how strongly batches of 16 pull all cosines up together, as they would a bias."""
        slopes = []
        for rows in torch.arange(512).split(16):
            pairs = Pairs(image[rows], text[rows], scale, bias, RankCounts(0, (16,)), batch, [batch], 0)
            slopes += torch.autograd.grad(evaluate_loss(loss, pairs).loss, bias)
        return -torch.stack(slopes).mean().item()

    assert abs(slope) < 1e-9
    assert pull(Sigmoid()) > 0.7
    assert abs(pull(Sigmoid(pretraining_batch=512))) < 0.1


def test_distillation_loss_and_gradients_equal_open_clips() -> None:
    (image, text), theirs = random_units(7, dim=5, seed=1), random_units(7, dim=9, seed=2)
    image, text = image.requires_grad_(), text.requires_grad_()
    scale, their_scale = (torch.tensor(x, dtype=torch.float64) for x in (14.0, 50.0))
    student, teacher = ModelFeatures(image, text, scale), ModelFeatures(*theirs, their_scale)
    ours = distillation_loss(student.logits(slice(None), image, text), teacher.logits(slice(None), *theirs))
    _, expected = open_clip.loss.DistillClipLoss()(image, text, scale, *theirs, their_scale)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for our, their in zip(*(torch.autograd.grad(x, (image, text)) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-14)


# Weighted pairs: with equal weights the plain contrastive loss; which weights change what.


def pairs_of(weights: list[float]) -> Pairs:
    generator = torch.Generator().manual_seed(3)
    image, text = (unit(torch.randn(PAIRS, 16, generator=generator)).requires_grad_() for _ in range(2))
    batch = make_batch(slice(0, PAIRS))._replace(extra={"weight": torch.tensor(weights)})
    return Pairs(image, text, torch.tensor(9.0), None, RankCounts(0, (PAIRS,)), batch, [batch], 0)


@pytest.mark.parametrize("duplicates", POLICIES)
def test_equal_weights_give_the_value_and_the_gradients_of_contrastive(duplicates: Duplicates) -> None:
    found = []
    for loss in (WeightedContrastive(duplicates), Contrastive(duplicates)):
        pairs = pairs_of([0.3] * PAIRS)
        value = evaluate_loss(loss, pairs).loss
        value.backward()
        found.append([value.detach(), pairs.image.grad, pairs.text.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_weights_of_nothing_but_zeros_train_nothing() -> None:
    pairs = pairs_of([0.0] * PAIRS)
    value = evaluate_loss(WeightedContrastive("positives"), pairs).loss
    value.backward()
    assert pairs.image.grad is not None
    assert (value.item(), pairs.image.grad.abs().max().item()) == (0, 0)


def test_pairs_without_weights_are_refused() -> None:
    pairs = pairs_of([1.0] * PAIRS)
    pairs.batch.extra.clear()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match=r"the data have no weights; set data\.columns\.weight"):
        WeightedContrastive()(pairs)
    pairs.batch.extra["weight"] = torch.ones(PAIRS, 2)  # pyright: ignore[reportIndexIssue]
    with pytest.raises(InputError, match="return one number for a pair"):
        WeightedContrastive()(pairs)


# Ids that two pairs share if and only if they are duplicates.


TEXTS = ["a cat", "a dog", "a cat!", "!a cat", "a cat", "", "!", "!!", "! !", "cat a", "the cat sat on the mat " * 9]


def test_texts_share_a_hash_only_if_their_tokens_are_equal() -> None:
    tokens = CLIPTokenizer(77)(TEXTS)
    equal = (tokens[:, None] == tokens[None]).all(dim=-1)
    hashes = token_hash(tokens, 0)
    assert torch.equal(hashes[:, None] == hashes[None], equal)
    assert int(equal.sum()) == len(TEXTS) + 2  # "a cat" twice


@pytest.mark.parametrize("pad_id", [0, 1])
def test_padding_does_not_change_the_hash(pad_id: int) -> None:
    tokens = torch.tensor([[7, 8, 9], [7, 9, 8]])
    padded = torch.nn.functional.pad(tokens, (0, 5), value=pad_id)
    assert torch.equal(token_hash(tokens, pad_id), token_hash(padded, pad_id))
    assert token_hash(tokens, pad_id).unique().numel() == 2


def test_a_million_texts_have_no_hash_collisions() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49408, (1_000_000, 8), generator=generator)
    assert token_hash(tokens, 0).unique().numel() == len(tokens)


def test_hashes_of_keys_are_the_same_in_every_process() -> None:
    assert stable_hash("photos/1.jpg") == 204653242225689059


def test_pairs_with_the_same_image_caption_or_group_share_an_id_and_missing_groups_do_not() -> None:
    tokens = CLIPTokenizer(16)(["a cat", "a dog", "a cat", "a bird", "a cow", "a fish"])
    ids = pair_ids(["1", "2", "3", "1", "5", "6"], tokens, 0, ["", "pet", "", "", "pet", ""])
    same = (ids[:, None] == ids[None]).any(dim=-1)
    expected = torch.eye(6, dtype=torch.bool)
    for i, j in ((0, 2), (0, 3), (1, 4)):  # caption, image, group
        expected[i, j] = expected[j, i] = True
    assert torch.equal(same, expected)
    assert torch.equal(pair_ids(["1"], tokens[:1], 0), pair_ids(["1"], tokens[:1], 0, [""]))


def test_groups_for_only_some_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="1 groups for 2 pairs"):
        pair_ids(["1", "2"], CLIPTokenizer(16)(["a", "b"]), 0, ["x"])


@pytest.mark.parametrize(("parts", "sizes"), [(1, [7]), (3, [2, 2, 3]), (7, [1] * 7), (9, [1] * 7)])
def test_a_batch_is_split_in_order_into_non_empty_parts(parts: int, sizes: list[int]) -> None:
    rows = torch.arange(7)
    batch = CaptionBatch(
        rows[:, None, None, None], rows[:, None], [str(i) for i in range(7)], [f"{i}" for i in range(7)]
    )
    split = batch.split(parts)
    assert [len(part.keys) for part in split] == sizes
    assert torch.equal(torch.cat([part.tokens for part in split]), batch.tokens)
    assert [key for part in split for key in part.keys] == batch.keys
    assert all(part.groups == () for part in split)


class Copies(TorchDispatchMode):
    """Record copies to another device, and values that are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = isinstance(result, torch.Tensor) and any(
            isinstance(x, torch.Tensor) and x.device != result.device for x in args
        )
        if moved or func is torch.ops.aten._local_scalar_dense.default:
            self.names.append(func._schema.name)
        return result


def test_a_step_copies_keys_alone_to_the_device_and_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """All by ``to_device``, which does not synchronise; the hash's numbers once, whatever the texts' length."""
    asked: list[tuple[int, ...]] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        asked.append(tuple(tensor.shape))
        return tensor.to(device)

    monkeypatch.setattr(duplicates, "to_device", to_device)
    duplicates._multipliers.cache_clear()
    with Copies() as seen:
        for length in (7, 12, 77):
            pair_ids(["1", "2"], torch.zeros(2, length, dtype=torch.long, device="meta"), 0)
    assert asked == [(2, 2), (128,), (2, 2), (2, 2)]
    assert seen.names == ["aten::_to_copy"] * len(asked)
