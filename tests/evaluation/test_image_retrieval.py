"""Image-to-image retrieval against scikit-learn, torchmetrics and plain loops."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from lit_clip.errors import InputError
from lit_clip.evaluation import image_retrieval as module
from lit_clip.evaluation.image_retrieval import image_retrieval
from lit_clip.evaluation.intervals import UnitScores

LABELS = torch.tensor([0] * 14 + [1] * 2 + [2] + [3] * 5 + [5] * 8)  # of 2 there is one image, of 4 none


def features() -> torch.Tensor:
    """Return features of lengths other than 1, near those of their class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    return 3 * (centres[LABELS] + 1.3 * torch.randn(len(LABELS), 8, generator=generator))


def means(units: dict[str, UnitScores]) -> dict[str, float]:
    return {name: scores.mean() for name, scores in units.items()}


def similarities() -> tuple[np.ndarray, list[int]]:
    unit = features().double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    return (unit @ unit.T).numpy(), [row for row in range(len(LABELS)) if row != 16]


def test_precision_and_recall_equal_scikit_learn_and_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7 * len(LABELS))
    found = image_retrieval(features(), LABELS, results=len(LABELS) - 1)
    cosine, queries = similarities()
    assert found.rows.tolist() == queries
    others = [[row for row in range(len(LABELS)) if row != query] for query in queries]
    right = [(LABELS[rows] == LABELS[query]).numpy() for query, rows in zip(queries, others, strict=True)]
    precision = [average_precision_score(r, cosine[q, o]) for q, o, r in zip(queries, others, right, strict=True)]
    np.testing.assert_allclose(found.units["map@29"].values, precision, rtol=1e-9)
    scores = torch.tensor(np.concatenate([cosine[q, o] for q, o in zip(queries, others, strict=True)]))
    # torchmetrics drops right ones whose score is not positive
    indexes = torch.arange(len(queries)).repeat_interleave(len(LABELS) - 1)
    arguments = (scores + 2) / 4, torch.tensor(np.concatenate(right)), indexes
    assert means(found.units)["map@29"] == pytest.approx(float(RetrievalMAP()(*arguments)), rel=1e-6)
    for k in (1, 5, 10):
        expected = float(RetrievalHitRate(top_k=k)(*arguments))
        assert means(found.units)[f"image_to_image_recall@{k}"] == pytest.approx(expected, rel=1e-6)
    assert [
        int(cosine[q, o].argmax() + (cosine[q, o].argmax() >= q)) for q, o in zip(queries, others, strict=True)
    ] == (found.nearest.tolist())


def test_precision_of_the_first_results_is_of_as_many_right_ones_as_they_can_hold() -> None:
    found, (cosine, queries) = image_retrieval(features(), LABELS, results=4), similarities()
    expected = []
    for query in queries:
        order = [row for row in np.argsort(-cosine[query]).tolist() if row != query][:4]
        hits = [int(LABELS[row] == LABELS[query]) for row in order]
        possible = min(4, LABELS.tolist().count(int(LABELS[query])) - 1)
        expected.append(sum(hit * sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits)) / possible)
    np.testing.assert_allclose(found.units["map@4"].values, expected, rtol=1e-12)
    assert found.entry()["value"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("neighbours", [1, 5, 20, 99])
def test_the_vote_of_neighbours_equals_scikit_learns(neighbours: int) -> None:
    found, (_, queries), right = image_retrieval(features(), LABELS, neighbours=neighbours), similarities(), []
    for query in queries:
        others = np.array([row for row in range(len(LABELS)) if row != query])
        classifier = KNeighborsClassifier(
            min(neighbours, len(others)), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        classifier.fit(features().numpy()[others], LABELS.numpy()[others])
        right.append(classifier.predict(features().numpy()[[query]])[0] == LABELS[query].item())
    assert found.units["knn_top1"].values.tolist() == right
    assert 0 < sum(right) < len(right)


@pytest.mark.parametrize(("labels", "results"), [([0, 0, 0, 1, 1, 2], 3), ([0, 0, 1, 1], 10), ([0, 0], 2)])
def test_the_baseline_is_the_mean_over_all_orders(labels: list[int], results: int) -> None:
    expected = []
    for query, label in enumerate(labels):
        others = [other == label for row, other in enumerate(labels) if row != query]
        for order in itertools.permutations(others) if any(others) else ():
            hits = order[:results]
            precision = sum(hit * sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits))
            expected.append((len(others), precision / min(results, sum(others))))
    found = image_retrieval(torch.randn(len(labels), 3), torch.tensor(labels), results).baseline
    assert found == pytest.approx(np.mean([value for _, value in expected]))


def test_images_without_features_find_nothing_and_are_not_found() -> None:
    broken = features()
    broken[[0, 14]] = torch.nan
    found = image_retrieval(broken, LABELS)
    values = {name: dict(zip(found.rows.tolist(), scores.values, strict=True)) for name, scores in found.units.items()}
    assert all(scores[0] == scores[14] == scores[15] == 0 for scores in values.values())  # 15's only other one is 14
    assert values["map@10"][1] > 0


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1, 2], "no class has two images"), ([0, 0, -1], "needs images of one class each")]
)
def test_a_set_that_has_nothing_to_find_is_refused(labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=f"^image_retrieval: {message}; remove it from the"):
        image_retrieval(torch.eye(3), torch.tensor(labels))
