"""Retrieval with graded relevance against pytrec_eval and plain loops; a text with an image finds more than either."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lit_clip.embedding.index import combined
from lit_clip.evaluation.data import Items, JudgedDocuments
from lit_clip.evaluation.document_retrieval import EncodedDocuments, document_retrieval
from lit_clip.retrieval import metrics
from lit_clip.retrieval.metrics import similarities

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
    encoded = EncodedDocuments(images, torch.cat([query_QD, document_ND]), rows, "")
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
    encoded = EncodedDocuments(images, texts, {colour: row for row, colour in enumerate(COLOURS)}, "")
    image_alone, both, text_alone = (
        document_retrieval(encoded, image_ID, list(range(60)), weight)["ndcg@10"].mean() for weight in (0, 0.5, 1)
    )
    assert max(image_alone, text_alone) < 0.7
    assert both > max(image_alone, text_alone) + 0.2
    mixed = combined(image_ID[:30], texts[[COLOURS.index(colour) for _, colour in things]], 0.5).double()
    assert mixed.norm(dim=1).tolist() == pytest.approx([1] * 30)
