"""Tiled losses: value and gradients of the definition, without a B x B tensor."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_clip.distributed import RankCounts
from lit_clip.losses import tiled
from lit_clip.losses.contrastive import Duplicates, contrastive_loss, sigmoid_loss, unit
from lit_clip.losses.tiled import PairLayout, ShardedLoss, default_tile, sharded_contrastive_loss, sharded_sigmoid_loss

KINDS = ("softmax", "sigmoid")


def leaves(pairs: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return image and text features before normalisation, the logarithm of the scale, and the bias."""
    generator = torch.Generator().manual_seed(pairs)
    features = torch.randn(2, pairs, dim, generator=generator, dtype=dtype)
    numbers = torch.tensor([2.5, -3.0], dtype=dtype)
    return [x.clone().requires_grad_() for x in (*features, *numbers)]


def sharded(kind: str, inputs: list[Tensor], layout: PairLayout) -> ShardedLoss:
    image, text, log_scale, bias = unit(inputs[0]), unit(inputs[1]), inputs[2], inputs[3]
    if kind == "softmax":
        return sharded_contrastive_loss(image, text, log_scale.exp(), layout)
    return sharded_sigmoid_loss(image, text, log_scale.exp(), bias, layout)


def dense(kind: str, inputs: list[Tensor], same: Tensor, duplicates: Duplicates) -> Tensor:
    image, text, log_scale, bias = unit(inputs[0]), unit(inputs[1]), inputs[2], inputs[3]
    if kind == "softmax":
        return contrastive_loss(image, text, image, text, log_scale.exp(), 0, same, duplicates)
    return sigmoid_loss(image, text, log_scale.exp(), bias, 0, same, duplicates)


def with_gradients(loss: Tensor, inputs: list[Tensor], upstream: float = 3.0) -> list[Tensor]:
    (upstream * loss).backward()
    return [loss.detach(), *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignored"])
@pytest.mark.parametrize("tile", [(1, 1), (3, 4), (7, 2), (64, 64)])
@pytest.mark.parametrize("pairs", [1, 2, 7, 31])
def test_value_and_gradients_equal_the_definition(
    kind: str, duplicates: Duplicates, tile: tuple[int, int], pairs: int
) -> None:
    generator = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.randint(0, top, (pairs,), generator=generator) for top in (pairs // 2 + 1, 3 * pairs)], 1)
    same = (ids[:, None] == ids[None]).any(dim=-1)
    ours, theirs = leaves(pairs, 5), leaves(pairs, 5)
    result = sharded(kind, ours, PairLayout(RankCounts(0, (pairs,)), ids, duplicates, tile=tile))
    expected = with_gradients(dense(kind, theirs, same, duplicates), theirs)
    for our, their in zip(with_gradients(result.loss, ours), expected, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-12)


def test_the_loss_of_each_duplicate_policy_by_hand() -> None:
    # A pair, its duplicate and a third pair; all cosines are 1 or 0, so exponentials are e or 1.
    image = text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    scale, ids, e = torch.tensor(1.0, dtype=torch.float64), torch.tensor([[5], [5], [8]]), math.e

    def loss(duplicates: Duplicates) -> float:
        return sharded_contrastive_loss(
            image, text, scale, PairLayout(RankCounts(0, (3,)), ids, duplicates)
        ).loss.item()

    duplicate, third = math.log(2 * e + 1) - 1, math.log(e + 2) - 1
    assert loss("negatives") == pytest.approx((2 * duplicate + third) / 3, rel=1e-12)
    assert loss("positives") == pytest.approx((2 * duplicate + third) / 3, rel=1e-12)  # both logits are equal
    assert loss("ignored") == pytest.approx((2 * (math.log(e + 1) - 1) + third) / 3, rel=1e-12)
    zero = torch.tensor(0.0, dtype=torch.float64)

    def sigmoid(duplicates: Duplicates) -> float:
        return sharded_sigmoid_loss(
            image, text, scale, zero, PairLayout(RankCounts(0, (3,)), ids, duplicates)
        ).loss.item()

    positive, negative, zero_logit = math.log1p(1 / e), math.log1p(e), math.log(2)
    assert sigmoid("negatives") == pytest.approx((3 * positive + 2 * negative + 4 * zero_logit) / 3, rel=1e-12)
    assert sigmoid("positives") == pytest.approx((5 * positive + 4 * zero_logit) / 3, rel=1e-12)
    assert sigmoid("ignored") == pytest.approx((3 * positive + 4 * zero_logit) / 3, rel=1e-12)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignored"])
def test_no_tensor_is_larger_than_the_features_or_a_tile(kind: str, duplicates: Duplicates) -> None:
    pairs, dim, tile = 200, 8, (16, 32)
    inputs, ids = leaves(pairs, dim), torch.arange(pairs)[:, None] // 3
    with Largest() as largest:
        sharded(kind, inputs, PairLayout(RankCounts(0, (pairs,)), ids, duplicates, tile=tile)).loss.backward()
    assert largest.elements <= 2 * pairs * dim  # both modalities' features, created together above
    assert largest.elements >= tile[0] * tile[1]  # the tiles were seen


class Launches(TorchDispatchMode):
    """Count operations; views launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "most"), [("cuda", 80), ("cpu", 760)])
def test_a_gpu_gets_few_large_tiles(device: str, most: int) -> None:
    """Operations of the softmax loss and its gradient for 8,192 pairs: two tiles instead of 32."""
    layout = PairLayout(RankCounts(0, (8192,)), tile=default_tile(torch.device(device)))
    with FakeTensorMode():
        features = [torch.randn(8192, 16, requires_grad=True) for _ in range(2)]
        with Launches() as launches:
            sharded_contrastive_loss(features[0], features[1], torch.tensor(10.0), layout).loss.backward()
    assert 0.9 * most < launches.count <= most


def test_the_tile_is_that_of_the_features_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(tiled, "default_tile", lambda device: asked.append(device) or (2, 3))
    for kind in KINDS:
        sharded(kind, leaves(5, 4), PairLayout(RankCounts(0, (5,))))
    assert asked == [torch.device("cpu")] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_hits_count_images_nearest_to_their_own_text(kind: str) -> None:
    inputs = leaves(50, 4)
    with torch.no_grad():
        inputs[1][:20] = inputs[0][:20] + 0.1 * inputs[1][:20]
    scores = unit(inputs[0]) @ unit(inputs[1]).T
    nearest = scores.argmax(dim=1) == torch.arange(50)
    result = sharded(kind, inputs, PairLayout(RankCounts(0, (50,)), tile=(7, 9)))
    assert result.hits.item() == int(nearest.sum()) > 5
    assert not result.hits.requires_grad
    equal = torch.ones(50, 4, dtype=torch.float64)  # with equal features no image is nearer to its own text
    assert sharded(kind, [equal, equal, *inputs[2:]], PairLayout(RankCounts(0, (50,)), tile=(7, 9))).hits.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_features_are_summed_in_float32(kind: str) -> None:
    inputs = leaves(40, 16, torch.float32)
    half = [x.detach().bfloat16() for x in inputs[:2]]
    exact = [x.double() for x in half]
    layout = PairLayout(RankCounts(0, (40,)), tile=(16, 16))
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "softmax":
            ours = sharded_contrastive_loss(half[0], half[1], scale, layout).loss
            expected = contrastive_loss(exact[0], exact[1], exact[0], exact[1], scale.double())
        else:
            ours = sharded_sigmoid_loss(half[0], half[1], scale, bias, layout).loss
            expected = sigmoid_loss(exact[0], exact[1], scale.double(), bias.double())
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_extreme_scales_neither_overflow_nor_vanish() -> None:
    inputs = leaves(30, 4, torch.float32)
    inputs[2] = torch.tensor(math.log(1e4), requires_grad=True)  # logits from -10,000 to 10,000
    result = with_gradients(sharded("softmax", inputs, PairLayout(RankCounts(0, (30,)), tile=(8, 8))).loss, inputs)
    reference = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(dense("softmax", reference, torch.eye(30) > 0, "negatives"), reference)
    for our, their in zip(result, expected, strict=True):
        assert our.isfinite().all()
        torch.testing.assert_close(our.double(), their, rtol=1e-3, atol=1e-2)


def test_a_nan_feature_makes_the_loss_nan() -> None:
    inputs = leaves(6, 4)
    with torch.no_grad():
        inputs[0][3, 1] = math.nan
    for kind in KINDS:
        assert sharded(kind, inputs, PairLayout(RankCounts(0, (6,)), tile=(2, 2))).loss.isnan()
