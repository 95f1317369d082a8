"""``lit-clip evaluate`` of queries and documents of texts and images equals a plain loop, and is shown everywhere."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.evaluation.predictions import read_predictions
from tests.commands.test_evaluate import evaluate, noise_png, root, write_suite
from tests.datamodules.evaluation.test_retrieval_sets import write_beir
from tests.evaluation.test_image_retrieval import loops

__all__ = ["root"]
READER = "datamodules.evaluation.QueriesAndDocuments"
QUERIES = [("a red hat", None), ("a hat", 3), (None, 5), ("blue", 7), ("green", None), (None, 2)]
DOCUMENTS = [(f"thing {row}" if row % 3 else None, row if row % 3 != 1 else None) for row in range(30)]
JUDGED = [(query, (7 * query + 3 * number) % 30, number % 3) for query in range(6) for number in range(8)]


def write_products(folder: Path) -> None:
    """Write the set as the hub has them: images in the tables."""
    tables: dict[str, dict[str, list[Any]]] = {}
    for name, rows in (("queries", QUERIES), ("corpus", DOCUMENTS)):
        images = [None if image is None else {"bytes": noise_png(image, image % 6), "path": None} for _, image in rows]
        tables[name] = {"id": [f"{name[0]}{row}" for row in range(len(rows))], "text": [text for text, _ in rows]}
        tables[name]["image"] = images
    pairs = [(f"q{query}", f"c{document}", grade) for query, document, grade in JUDGED]
    tables["qrels"] = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*pairs, strict=True)), strict=True))
    for name, columns in tables.items():
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / name / "test-00000-of-00001.parquet", row_group_size=7)


@pytest.fixture
def products(root: Path) -> Path:
    write_products(root / "data/products")
    write_beir(root / "data/beir")
    entry = {"data": {"class_path": READER, "init_args": {"root": "products"}}, "metric": "map", "text_weight": 0.3}
    write_suite(root, products=entry, beir=entry | {"data": {"class_path": READER, "init_args": {"root": "beir"}}})
    return root


@torch.no_grad()
def plain_features(rows: list[tuple[str | None, int | None]], text_weight: float) -> Tensor:
    model, found = load_model("last.ckpt"), []
    for text, image in rows:
        parts = []
        if image is not None:
            pixels = model.preprocess(Image.open(io.BytesIO(noise_png(image, image % 6))))[None]
            parts.append((1 - text_weight, model.encode_image(pixels, normalize=True)[0]))
        if text is not None:
            parts.append((text_weight, model.encode_text(model.tokenize([text]), normalize=True)[0]))
        mixed = torch.stack([part if len(parts) == 1 else weight * part for weight, part in parts]).sum(dim=0)
        found.append(mixed / mixed.norm())
    return torch.stack(found)


def test_metrics_equal_a_plain_loop_and_are_shown_everywhere(
    products: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = evaluate()["sets"]
    found = sets["products"]["tasks"]["document_retrieval"]
    score_QN = (plain_features(QUERIES, 0.3) @ plain_features(DOCUMENTS, 0.3).T).double().numpy()
    expected = loops(score_QN, [f"c{row}" for row in range(30)], JUDGED)
    for name, values in expected.items():
        assert found["metrics"][name] == pytest.approx(sum(values) / 6, abs=1e-6), name
    assert (found["value"], found["queries"], found["documents"]) == (found["metrics"]["map"], 6, 30)
    shown = f"{100 * found['value']:.1f}"
    assert shown in capsys.readouterr().out
    for file in ("report.html", "results.tex"):
        assert shown in Path("out", file).read_text(encoding="utf-8"), file
    assert "nDCG@10" in Path("out/report.html").read_text(encoding="utf-8")
    assert "products,document_retrieval,,map," in Path("out/results.csv").read_text(encoding="utf-8")
    kept = read_predictions(Path("out"), "products", "document_retrieval")
    assert kept["score"].tolist() == pytest.approx(expected["ndcg@10"], abs=1e-6)
    assert sets["beir"]["tasks"]["document_retrieval"]["documents"] == 3  # texts alone
    # Another weight gives another result, of the same features; an old run is compared query by query.
    shutil.copytree("out", "before")
    monkeypatch.setattr("lit_clip.evaluation.store.encode", lambda *_: pytest.fail("images were encoded again"))
    suite = Path("suite.yaml").read_text(encoding="utf-8").replace("text_weight: 0.3", "text_weight: 0.9")
    Path("suite.yaml").write_text(suite, encoding="utf-8")
    results = evaluate("--compare", "before", "--sets", "products")
    assert results["sets"]["products"]["tasks"]["document_retrieval"]["metrics"] != found["metrics"]
    (compared,) = results["comparisons"]
    assert (compared["metric"], compared["images"], compared["reason"]) == ("ndcg@10", 6, "")


def test_a_broken_image_is_an_error_or_is_skipped_and_the_text_alone_is_left(products: Path) -> None:
    rows = [{"_id": "d1", "image": "1.png", "text": "thing 1"}, {"_id": "d2", "text": "x"}, {"_id": "d3", "text": "y"}]
    (products / "data/beir/corpus.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (products / "data/beir/1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="document d1"):
        evaluate("--sets", "beir")
    rows[1] |= {"image": "2.png"}
    (products / "data/beir/corpus.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (products / "data/beir/2.png").write_bytes(noise_png(1, 1))
    found = evaluate("--sets", "beir", "--on_error", "skip")["sets"]["beir"]
    assert found["splits"]["test"]["images"] == 1
    assert found["tasks"]["document_retrieval"]["metrics"]["recall@5"] == 1


def test_wrong_settings_are_one_line(products: Path) -> None:
    for change, message in (
        ({"text_weight": 2}, "products: text_weight: 2.0 must be between 0 and 1"),
        ({"data": {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "test"}}}, "no queries and"),
    ):
        entry = {"data": {"class_path": READER, "init_args": {"root": "products"}}, "metric": "mrr"}
        write_suite(products, products=entry | change)
        with pytest.raises(InputError, match=message) as error:
            evaluate()
        assert "\n" not in str(error.value)
