"""Retrieval among images, documents and places against peers and plain loops."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from lit_clip.embedding.index import combined
from lit_clip.errors import InputError
from lit_clip.evaluation import image_retrieval as module
from lit_clip.evaluation import overlap
from lit_clip.evaluation.data import Items, JudgedDocuments
from lit_clip.evaluation.document_retrieval import EncodedDocuments, document_retrieval
from lit_clip.evaluation.image_retrieval import distances_km, image_retrieval, nearest_km, nearest_rows, within_km
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.retrieval import metrics
from lit_clip.retrieval.metrics import similarities

LABELS = torch.tensor([0] * 14 + [1] * 2 + [2] + [3] * 5 + [5] * 8)  # of 2 there is one image, of 4 none


def features() -> torch.Tensor:
    """Return features of lengths other than 1, near those of their class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    return 3 * (centres[LABELS] + 1.3 * torch.randn(len(LABELS), 8, generator=generator))


def means(units: dict[str, UnitScores]) -> dict[str, float]:
    return {name: scores.mean() for name, scores in units.items()}


def cosines_of_labelled() -> tuple[np.ndarray, list[int]]:
    unit = features().double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    return (unit @ unit.T).numpy(), [row for row in range(len(LABELS)) if row != 16]


def test_precision_and_recall_equal_scikit_learn_and_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7 * len(LABELS))
    found = image_retrieval(features(), LABELS, results=len(LABELS) - 1)
    cosine, queries = cosines_of_labelled()
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
    found, (cosine, queries) = image_retrieval(features(), LABELS, results=4), cosines_of_labelled()
    expected = []
    for query in queries:
        order = [row for row in np.argsort(-cosine[query]).tolist() if row != query][:4]
        hits = [int(LABELS[row] == LABELS[query]) for row in order]
        possible = min(4, LABELS.tolist().count(int(LABELS[query])) - 1)
        expected.append(sum(hit * sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits)) / possible)
    np.testing.assert_allclose(found.units["map@4"].values, expected, rtol=1e-12)


@pytest.mark.parametrize("neighbours", [1, 5, 20, 99])
def test_the_vote_of_neighbours_equals_scikit_learns(neighbours: int) -> None:
    found, (_, queries), right = image_retrieval(features(), LABELS, neighbours=neighbours), cosines_of_labelled(), []
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


def test_distances_equal_the_spherical_law_of_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(50, 2, generator=generator) * 2 - 1).double() * torch.tensor([90.0, 180.0]) for _ in range(2))
    for found, (lat, lon), (lat2, lon2) in zip(distances_km(a, b).tolist(), a.tolist(), b.tolist(), strict=True):
        angle = math.sin(math.radians(lat)) * math.sin(math.radians(lat2))
        angle += math.cos(math.radians(lat)) * math.cos(math.radians(lat2)) * math.cos(math.radians(lon - lon2))
        assert found == pytest.approx(6371.0088 * math.acos(angle), rel=1e-6)
    paris, london, antipodes = torch.tensor([[48.8566, 2.3522], [51.5074, -0.1278], [-48.8566, -177.6478]])
    assert float(distances_km(paris[None], london[None])) == pytest.approx(343.6, abs=1)
    assert float(distances_km(paris[None], antipodes[None])) == pytest.approx(math.pi * 6371.0088)


def test_within_km_counts_queries_by_the_distance_to_their_nearest_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = torch.randn(13, 8), torch.randn(101, 8) * torch.rand(101, 1)
    expected = [max(range(101), key=lambda m: float(torch.cosine_similarity(q, reference[m], dim=0))) for q in query]
    where = torch.rand(101, 2).double() * 3
    truth = where[expected]
    truth[:4, 0] += torch.tensor([0.1, 1.0, 5.0, 20.0])  # about 11, 111, 556 and 2224 km further north
    for entries in (2**24, 7):
        monkeypatch.setattr(overlap, "REFERENCES", entries)
        assert nearest_rows(query, reference).tolist() == expected
        found = means(within_km(nearest_km(query, reference, truth, where)))
        assert [round(13 * value) for value in found.values()] == [9, 10, 11, 12, 13]
        assert list(found) == ["within_1km", "within_25km", "within_200km", "within_750km", "within_2500km"]


def test_a_tie_between_neighbours_goes_to_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "REFERENCES", 2)
    reference = torch.eye(4)[[3, 1, 1, 2, 1, 3]]
    assert nearest_rows(torch.eye(4)[[1, 3]], reference).tolist() == [1, 0]


def test_coordinates_that_are_not_on_earth_are_an_error() -> None:
    with pytest.raises(InputError, match="references: row 1: latitude must be between -90 and 90"):
        nearest_km(torch.eye(2), torch.eye(2), torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))


def test_features_that_are_nan_are_right_nowhere() -> None:
    features, places = torch.eye(3), torch.tensor([[0.0, 0.0], [10.0, 10.0], [20.0, 20.0]])
    query = features.clone()
    query[2] = torch.nan
    assert nearest_km(query, features, places, places).tolist() == [0.0, 0.0, math.inf]
    assert means(within_km(nearest_km(query, features, places, places)))["within_2500km"] == 2 / 3


NAMES = {"ndcg@10": "ndcg_cut_10", "map": "map", "mrr": "recip_rank"}
NAMES |= {f"recall@{k}": f"recall_{k}" for k in (1, 5, 10, 100)}
Relevance = list[tuple[int, int, int]]


class Documents(JudgedDocuments):
    """Queries and documents of texts alone, whose features the test gives; ids do not sort like rows."""

    def __init__(self, queries: int, documents: int, relevance: Relevance) -> None:
        self.queries, self.documents = (
            Items([f"{7 * row % size}" for row in range(size)], [f"{kind} {row}" for row in range(size)], [-1] * size)
            for kind, size in (("query", queries), ("document", documents))
        )
        self.relevance = relevance

    def __len__(self) -> int:
        return 0

    def images(self, index: int) -> list[Any]:
        return []

    def stamp(self) -> str:
        return ""


def unit(rows: int, width: int, seed: int) -> Tensor:
    """Return features of few values, so that many products are equal."""
    values = torch.randint(0, 3, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    return torch.nn.functional.normalize(values + 0.001, dim=1)


def example(seed: int, queries: int = 23, documents: int = 211) -> tuple[Documents, Tensor, Tensor]:
    """Return a set of grades from -1 to 3, of a query without a relevant document too, and features with ties."""
    rng = np.random.default_rng(seed)
    relevance: Relevance = []
    for query in range(queries):
        rows = rng.choice(documents, rng.integers(1, 40), replace=False).tolist()
        relevance += [(query, row, 0 if query == 3 else int(rng.integers(-1, 4))) for row in rows]
    rng.shuffle(relevance)
    relevance = [(int(q), int(d), int(g)) for q, d, g in relevance]
    return Documents(queries, documents, relevance), unit(queries, 4, seed), unit(documents, 4, seed + 100)


def found(images: Documents, query_QD: Tensor, document_ND: Tensor) -> dict[str, np.ndarray]:
    texts = [*images.queries.texts, *images.documents.texts]
    rows = {text: row for row, text in enumerate(texts)}
    encoded = EncodedDocuments(images, torch.cat([query_QD, document_ND]), rows)
    units = document_retrieval(encoded, torch.empty(0, query_QD.shape[1]), [], 0.5)
    return {name: scores.values for name, scores in units.items()}


def loops(score_QN: np.ndarray, keys: list[str], relevance: Relevance) -> dict[str, list[float]]:
    """Return each metric of each query by its definition; of equal scores the last id comes first."""
    scores: dict[str, list[float]] = {name: [] for name in NAMES}
    for query, score_N in enumerate(score_QN.tolist()):
        grades = {document: grade for q, document, grade in relevance if q == query and grade > 0}
        order = sorted(range(len(keys)), key=lambda row: (score_N[row], keys[row]), reverse=True)
        hits = [grades.get(row, 0) for row in order]
        dcg = sum(grade / math.log2(place + 2) for place, grade in enumerate(hits[:10]))
        best = sum(grade / math.log2(place + 2) for place, grade in enumerate(sorted(hits, reverse=True)[:10]))
        places = [place for place, grade in enumerate(hits, start=1) if grade]
        scores["ndcg@10"].append(dcg / best if grades else 0)
        scores["map"].append(sum(n / place for n, place in enumerate(places, start=1)) / max(1, len(grades)))
        scores["mrr"].append(1 / places[0] if places else 0)
        for k in (1, 5, 10, 100):
            scores[f"recall@{k}"].append(sum(place <= k for place in places) / max(1, len(grades)))
    return scores


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tiles", [(1024, 4096), (5, 17)])
def test_metrics_of_ties_and_grades_equal_plain_loops(
    seed: int, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CAPTIONS", tiles[0])
    monkeypatch.setattr(metrics, "IMAGES", tiles[1])
    images, query_QD, document_ND = example(seed)
    score_QN = similarities(query_QD, document_ND).numpy()
    assert len(np.unique(score_QN)) < score_QN.size / 4  # ties
    ours, expected = found(images, query_QD, document_ND), loops(score_QN, images.documents.keys, images.relevance)
    assert ours.keys() == expected.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_ties_and_grades_equal_pytrec_eval(seed: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    images, query_QD, document_ND = example(seed)
    keys, score_QN = images.documents.keys, similarities(query_QD, document_ND).tolist()
    judged: dict[str, dict[str, int]] = {}
    for query, document, grade in images.relevance:
        judged.setdefault(f"q{query}", {})[keys[document]] = grade
    run = {f"q{query}": dict(zip(keys, row, strict=True)) for query, row in enumerate(score_QN)}
    measures = {"ndcg_cut.10", "map", "recip_rank", "recall.1,5,10,100"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    for name, values in found(images, query_QD, document_ND).items():
        expected = [theirs[f"q{query}"][NAMES[name]] for query in range(len(score_QN))]
        np.testing.assert_allclose(values, expected, atol=1e-6, err_msg=name)


def test_what_cannot_be_read_is_found_last_and_a_query_without_features_finds_nothing() -> None:
    images, query_QD, document_ND = example(1)
    document_ND[7], query_QD[2] = torch.nan, torch.nan
    images.relevance = [(0, 7, 3), (0, 8, 1), (1, 9, 1), (2, 9, 1)]
    ours = found(images, query_QD, document_ND)
    assert ours["recall@100"][0] <= 0.5
    assert all(values[2] == 0 for values in ours.values())
    score_QN = similarities(query_QD[:2], document_ND).nan_to_num(-2).numpy()
    expected = loops(score_QN, images.documents.keys, [(0, 8, 1), (1, 9, 1)])
    assert ours["mrr"][:2].tolist() == expected["mrr"]


SHAPES = ("circle", "square", "bar", "column", "cross", "ring")
COLOURS = ("red", "green", "blue", "black", "pink")


def drawn(shape: str, seed: int) -> Image.Image:
    """Draw a shape at a place of its own, in grey."""
    left, top = np.random.default_rng(seed).integers(0, 5, 2).tolist()
    image, box = Image.new("L", (32, 32)), (left + 4, top + 4, left + 22, top + 22)
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse(box, fill=255 if shape == "circle" else 0, outline=255, width=4)
    if shape == "square":
        draw.rectangle(box, fill=255)
    if shape in ("bar", "cross"):
        draw.rectangle((box[0], top + 11, box[2], top + 15), fill=255)
    if shape in ("column", "cross"):
        draw.rectangle((left + 11, box[1], left + 15, box[3]), fill=255)
    return image


def test_an_image_and_a_text_together_find_what_neither_finds_alone() -> None:
    """Of 30 things the image shows the shape alone, and the text has the colour alone."""
    things = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    pixels = [np.asarray(drawn(shape, seed).resize((8, 8)), float) for seed in (0, 1) for shape, _ in things]
    image_ID = torch.tensor(np.stack([np.append(each - each.mean(), np.zeros(5)) for each in pixels])).float()
    image_ID = torch.nn.functional.normalize(image_ID, dim=1)
    images = Documents(30, 30, [(row, row, 1) for row in range(30)])
    images.queries, images.documents = (
        Items([str(row) for row in range(30)], [colour for _, colour in things], list(range(first, first + 30)))
        for first in (0, 30)
    )
    texts = torch.eye(69)[64:]
    encoded = EncodedDocuments(images, texts, {colour: row for row, colour in enumerate(COLOURS)})
    image_alone, both, text_alone = (
        document_retrieval(encoded, image_ID, list(range(60)), weight)["ndcg@10"].mean() for weight in (0, 0.5, 1)
    )
    assert max(image_alone, text_alone) < 0.7
    assert both > max(image_alone, text_alone) + 0.2
    mixed = combined(image_ID[:30], texts[[COLOURS.index(colour) for _, colour in things]], 0.5).double()
    assert mixed.norm(dim=1).tolist() == pytest.approx([1] * 30)
