"""Validation on several ranks equals that on one: each sample once, the same numbers, no deadlock."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules import Captions
from datamodules.openmoji import draw, read_table
from lit_clip.retrieval.retrieval_set import RetrievalSet, token_hashes
from tests.helpers import forks
from tests.helpers.ranks_evaluation import (
    CASES,
    check_what_is_alike,
    evaluate_cases,
    evaluate_rows,
    make_module,
    random_rows,
    validate_tables,
)

Ranks = Callable[..., None]
SIZES = (1, 21, 1000)
SIDES = (("image", "text"), ("text", "image"))


def brute_force(image: Tensor, text: Tensor, keys: list[str], tokens: Tensor, scale: float) -> dict[str, float]:
    """Compute the metrics from the full similarity matrix, by the field's rule and with copies of captions merged."""
    scores, targets = image.double() @ text.double().T, torch.arange(len(keys))
    loss = (F.cross_entropy(scale * scores, targets) + F.cross_entropy(scale * scores.T, targets)) / 2
    captions = [tuple(row) for row in tokens.tolist()]
    image_N = torch.tensor([keys.index(key) for key in keys])
    text_N = torch.tensor([captions.index(caption) for caption in captions])
    scores = scores[image_N][:, text_N]  # copies score equal
    images, texts = image_N.unique().tolist(), text_N.unique().tolist()
    ranks: dict[str, list[int]] = {name: [] for name in ("image_to_text", "text_to_image")}
    for i in images:
        wrong, score = image_N != i, scores[i]
        ties = [(score == score[own]) & ((text_N != text_N[own]) | (targets < own)) for own in targets[~wrong]]
        before = [wrong & ((score > score[own]) | tie) for own, tie in zip(targets[~wrong], ties, strict=True)]
        ranks["image_to_text"].append(min(int(each.sum()) for each in before))
    ranks["text_to_image"] = [int((scores[images, row] >= scores[row, row]).sum()) - 1 for row in targets]
    if len(texts) < len(keys):
        right = {*zip(image_N.tolist(), text_N.tolist(), strict=True)}
        is_right = torch.tensor([[(i, t) in right for t in texts] for i in images])
        merged = scores[images][:, texts]
        sides = {
            "merged_image_to_text": (merged, is_right, images),
            "merged_text_to_image": (merged.T, is_right.T, text_N),
        }
        for name, (score, good, asked) in sides.items():
            best = score.where(good, -torch.inf).amax(dim=1, keepdim=True)
            places = ((score >= best) & ~good).sum(dim=1).tolist()
            queries = images if asked is images else texts
            ranks[name] = [places[queries.index(int(query))] for query in asked]
    metrics = {"loss": float(loss)}
    for name, of_queries in ranks.items():
        of_queries.sort()
        metrics |= {f"{name}_recall@{k}": sum(rank < k for rank in of_queries) / len(of_queries) for k in (1, 5, 10)}
        metrics[f"{name}_median_rank"] = of_queries[(len(of_queries) - 1) // 2] + 1
    merged = "merged_" * (len(texts) < len(keys))
    sides_that_count = SIDES[:1] if 4 * len(texts) <= len(images) else SIDES
    recalls = [metrics[f"{merged}{side}_to_{other}_recall@{k}"] for side, other in sides_that_count for k in (1, 5, 10)]
    metrics["mean_recall"] = sum(recalls) / len(recalls)
    return metrics


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_metrics_with_shared_images_and_captions_equal_brute_force(size: int, batch_size: int) -> None:
    expected = brute_force(*random_rows(size), scale=20.0)
    assert evaluate_rows(size, batch_size, None).metrics == pytest.approx(expected, abs=1e-6)
    assert size < 1000 or 0.1 < expected["text_to_image_recall@1"] < expected["text_to_image_recall@10"] < 1


@pytest.mark.parametrize(("images", "names"), [(32, 8), (31, 8)])
def test_where_names_are_of_kinds_the_mean_recall_is_of_naming_images(images: int, names: int) -> None:
    """Four images a name or more: which of a kind's images a name finds first is chance."""
    image, text, keys, _ = random_rows(images)
    keys, tokens = [f"{row}.jpg" for row in range(images)], torch.arange(images)[:, None] % names
    pairs = RetrievalSet()
    pairs.add(image, text, keys, token_hashes(tokens, 16, 0))
    metrics = pairs.evaluate(torch.zeros(0, 12), torch.tensor(20.0), None).metrics
    named = [metrics[f"merged_image_to_text_recall@{k}"] for k in (1, 5, 10)]
    found = [metrics[f"merged_text_to_image_recall@{k}"] for k in (1, 5, 10)]
    counted = named if images == 32 else [*named, *found]
    assert metrics["mean_recall"] == pytest.approx(sum(counted) / len(counted), abs=1e-9)
    assert sum(named) != sum(found)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, drawings_cache: Path) -> dict[int, Path]:
    """Tables by number of rows: four captions per drawing, some of which belong to several drawings."""
    folder = tmp_path_factory.mktemp("tables")
    drawn = [(emoji.name, path) for emoji, path in zip(read_table(), draw(drawings_cache), strict=True)][::7]
    tables = {}
    for size in (*SIZES, 24):
        tables[size] = folder / f"{size}.csv"
        with tables[size].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            for row in range(size):
                name, path = drawn[row // 4]
                writer.writerow([path, f"{name}, {row % 4}" if row % 5 else "a drawing"])
    return tables


@pytest.fixture(scope="module")
def one_process(tables: dict[int, Path], drawings_cache: Path) -> dict[int, dict[str, float]]:
    """Metrics that one process logs when it validates each of the tables."""
    results = validate_tables(str(drawings_cache), [str(tables[size]) for size in SIZES])
    return dict(zip(SIZES, results, strict=True))


# Of three ranks two have none of one pair, and the parts of 1,000 are unequal; the others' take ten seconds.
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_logs_the_metrics_of_one_process(
    world: int,
    one_process: dict[int, dict[str, float]],
    tables: dict[int, Path],
    drawings_cache: Path,
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    """1, 21 and 1,000 pairs, and zero-shot sets with one image and with two classes, so that some ranks have none.

    First rows whose images and captions occur on several ranks, with both losses; then ``Trainer.validate``.
    """
    output, paths = tmp_path / "results.json", [str(tables[size]) for size in SIZES]
    ranks("evaluate", world, str(output), str(drawings_cache), *paths, script="ranks_evaluation.py")
    results = json.loads(output.read_text())
    for case, result, expected in zip(CASES, results["cases"], evaluate_cases(), strict=True):
        copies = case[0] > 1
        assert len(result) == 10 + 8 + copies * (8 + 6), "merged captions have recalls, median ranks and baselines too"
        assert result == pytest.approx(expected, rel=1e-6, abs=1e-6), case
    for size, result in zip(SIZES, results["tables"], strict=True):
        assert result.keys() == one_process[size].keys()
        assert len(result) == 10 + 3 + 3 + 2 + (size > 1) * 8
        assert result == pytest.approx(one_process[size], rel=1e-6, abs=1e-6), size


@pytest.mark.parametrize("size", SIZES)
def test_validation_logs_the_metrics_of_brute_force(
    size: int, one_process: dict[int, dict[str, float]], tables: dict[int, Path]
) -> None:
    module = make_module()
    table = str(tables[size])
    data = Captions(table, table, batch_size=size, num_workers=0)
    data.preprocessing, data.tokenize = module.preprocessing, module.tokenize
    data.setup("validate")
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        image, text = module.eval()(batch)
    expected = brute_force(image, text, batch.keys, batch.tokens, module.model.logit_scale.exp().item())
    found = {name.removeprefix("val/"): one_process[size][name] for name in one_process[size] if "val/" in name}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_batch_norm_validates_during_training_although_a_rank_has_no_pairs(
    tables: dict[int, Path], drawings_cache: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """DDP broadcasts buffers in the first batch: ranks that had one waited forever for the rank that had none."""
    output, arguments = tmp_path / "results.json", [str(drawings_cache), str(tables[24]), str(tables[1])]
    ranks("fit", 2, str(output), *arguments, script="ranks_evaluation.py", timeout=90)
    result = json.loads(output.read_text())
    assert result["val/loss"] == pytest.approx(0, abs=1e-6)
    assert result["val/text_to_image_recall@1"] == 1
    assert 0 < result["zero_shot/two_classes/top1"] < 1


def test_block_size_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = brute_force(*random_rows(1000), scale=20.0)
    monkeypatch.setattr("lit_clip.retrieval.retrieval_set.BLOCK", 10 * 12 * 4)  # ten rows
    assert evaluate_rows(1000, 7, None).metrics == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pairs", [1, 2, 21])
def test_the_losss_baseline_is_that_of_equal_features(pairs: int) -> None:
    """With the sigmoid loss its bias must be the best there is: that of the probability 1 / N."""
    same = torch.ones(pairs, 4) / 2
    best = torch.tensor(1.0 / (pairs - 1)).log() - 20 if pairs > 1 else torch.tensor(100.0)
    for bias in (None, best):
        found = RetrievalSet()
        found.add(same, same, [str(i) for i in range(pairs)], np.arange(pairs))
        evaluation = found.evaluate(same[:0], torch.tensor(20.0), bias)
        assert evaluation.metrics["loss"] == pytest.approx(evaluation.baselines["loss"], abs=1e-5)


def test_equal_features_of_all_images_or_captions_are_noted() -> None:
    """One pair alone is equal to nothing; on several ranks ``evaluate_cases`` asserts the same."""
    check_what_is_alike()
    assert evaluate_rows(1, 7, None).alike == ""
    assert evaluate_rows(21, 7, None).alike == ""
    repeated, one = RetrievalSet(), torch.eye(3)[:1].expand(2, 3)
    repeated.add(torch.eye(3)[:2], one, ["a", "b"], np.zeros(2, np.int64))  # one caption of two images
    assert repeated.evaluate(one[:0], torch.tensor(1.0), None).alike == "captions"


def test_a_set_is_empty_after_its_evaluation() -> None:
    pairs, nothing = RetrievalSet(), torch.zeros(0, 3)
    one = torch.eye(3)[:1]
    for _ in range(2):
        pairs.add(one, one, ["a.jpg"], token_hashes(torch.ones(1, 2, dtype=torch.long), 5, 0))
        joined = pairs.join(nothing)
        assert joined is not None
        assert joined.image.tolist() == joined.text.tolist() == one.tolist()
        assert pairs.evaluate(nothing, torch.tensor(1.0), None).metrics == {}


def test_token_hash_ignores_padding_and_nothing_else() -> None:
    short, long = torch.tensor([[5, 6], [5, 0]]), torch.tensor([[5, 6, 0, 0], [6, 5, 0, 0], [5, 6, 1, 0]])
    hashes = [*token_hashes(short, 6, 0), *token_hashes(long, 6, 0)]
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 4


def test_keys_that_are_not_valid_unicode_stay_distinct() -> None:
    pairs, features = RetrievalSet(), torch.eye(3)
    keys = ["\udcff.jpg", "\udcfe.jpg", "\udcff.jpg"]
    pairs.add(features, features, keys, token_hashes(torch.arange(3)[:, None], 4, 9))
    joined = pairs.join(torch.zeros(0, 3))
    assert joined is not None
    assert joined.image.tolist() == features[:2].tolist()
    assert joined.own_pairs.image.tolist() == [0, 1, 0]


MEMORY = """
import torch
from pathlib import Path
from lit_clip.losses.contrastive import unit
from lit_clip.retrieval.retrieval_set import RetrievalSet, token_hashes
torch.set_num_threads(1)
def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
pairs = RetrievalSet()
for start in range(0, 24000, 1000):
    tokens = torch.arange(start, start + 1000)
    keys = [str(i // 5) for i in tokens.tolist()]
    pairs.add(torch.randn(1000, 32), torch.randn(1000, 32), keys, token_hashes(tokens[:, None], 4, 0))
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
metrics = pairs.evaluate(torch.zeros(0, 32), torch.tensor(10.0), None).metrics
print(len(metrics), held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.slow
def test_memory_is_bounded_by_the_features_and_a_tile(tmp_path: Path) -> None:
    """4,800 images and 24,000 captions: all similarities would take 460 MB, a bool for each 115 MB."""
    (tmp_path / "memory.py").write_text(MEMORY)
    (done,) = forks.run([forks.Program(forks.script, ["memory.py"], tmp_path, {**os.environ})], 100)
    assert done.returncode == 0, done.stderr
    metrics, megabytes = done.stdout.split()
    assert int(metrics) == 10
    assert float(megabytes) < 110
