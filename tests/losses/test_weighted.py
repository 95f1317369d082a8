"""Weighted pairs: with equal weights the plain contrastive loss; which weights change what."""

import pytest
import torch

from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Pairs, WeightedContrastive
from lit_clip.losses.contrastive import Duplicates, unit
from lit_clip.losses.loss import evaluate_loss
from tests.helpers.ranks import PAIRS, make_batch
from tests.helpers.ranks_losses import POLICIES


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


def test_of_two_results_of_a_query_the_one_with_the_greater_weight_becomes_the_more_similar() -> None:
    """The probabilities of a caption's images become their shares of the weight."""
    pairs, weights = pairs_of([1.0] * PAIRS), torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    batch = pairs.batch._replace(extra={"weight": weights})  # 2 and 6 have the same caption
    features = [pairs.image.detach().requires_grad_(), pairs.text.detach().requires_grad_()]
    optimizer = torch.optim.Adam(features, lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        both = [unit(each) for each in features]
        step = Pairs(*both, pairs.scale, None, pairs.ranks, batch, [batch], 0)
        evaluate_loss(WeightedContrastive("positives"), step).loss.backward()
        optimizer.step()
    image, text = (unit(each.detach()) for each in features)
    probabilities = (pairs.scale * text[2] @ image.T).softmax(dim=0)
    assert probabilities[2] + probabilities[6] > 0.95
    assert probabilities[2] / probabilities[6] == pytest.approx(3, rel=0.1)


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
