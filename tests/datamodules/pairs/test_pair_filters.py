"""Filters keep what a plain re-derivation of DataComp's baselines keeps, in any number of parts."""

import numpy as np
import pyarrow as pa
import pytest

from datamodules.pairs import score_files
from datamodules.pairs.decisions import read_decisions
from datamodules.pairs.score_files import PairFilters, write_scores
from lit_clip.embedding.pair_scores import SCORES
from lit_clip.errors import InputError

WORDS = ["a", "dog", "in  the", "Ä", "park\n", "photograph", ""]


def pairs(count: int, scores: np.ndarray | None = None) -> pa.Table:
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(count)]
    columns = {
        "row": np.arange(count),
        "pair": np.arange(count),
        "key": [str(number) for number in range(count)],
        "caption": captions,
        "score": rng.normal(0.2, 0.1, count).astype(np.float32) if scores is None else scores,
        "width": rng.integers(150, 700, count).astype(np.int32),
        "height": rng.integers(150, 700, count).astype(np.int32),
        "finding": pa.nulls(count, pa.string()),
    }
    return pa.table(columns, SCORES)


def kept(tmp_path, table: pa.Table, filters: PairFilters) -> list[int]:
    path = tmp_path / "scores.parquet"
    write_scores(path, [table], table["score"].to_numpy(), filters, {}, f"every pair of {len(table)} rows")
    return read_decisions(path).rows.tolist()


def test_words_and_image_size_are_judged_as_by_datacomps_basic_filter(tmp_path) -> None:
    """mlfoundations/datacomp, baselines/apply_filter.py, load_uids_with_basic_filter_helper."""
    table = pairs(2000)
    wanted = []
    for number, pair in enumerate(table.to_pylist()):
        text, width, height = pair["caption"], pair["width"], pair["height"]
        caption_mask = len(text.split()) > 2
        image_mask = min(width, height) >= 200
        wanted += [number] * (caption_mask & image_mask)
    filters = PairFilters(min_caption_words=3, min_image_dim=200)
    assert 100 < len(wanted) < 1500
    assert kept(tmp_path, table, filters) == wanted


def test_the_threshold_of_laions_filter_is_inclusive(tmp_path) -> None:
    """load_uids_with_clip_score_helper: df[df[key] >= threshold]."""
    scores = np.array([0.27, 0.28, 0.29, 0.28000003], dtype=np.float32)
    scores[1] = np.nextafter(np.float32(0.28), np.float32(0))
    assert kept(tmp_path, pairs(4, scores), PairFilters(threshold=0.28)) == [2, 3]
    scores[1] = 0.25
    assert kept(tmp_path, pairs(4, scores), PairFilters(threshold=0.25)) == [0, 1, 2, 3]


@pytest.mark.parametrize("group", [1, 7, 65_536])
@pytest.mark.parametrize("fraction", [0.01, 0.29, 0.3, 0.5, 1.0])
def test_fraction_takes_the_best_and_of_equal_scores_the_first(
    tmp_path, monkeypatch: pytest.MonkeyPatch, fraction: float, group: int
) -> None:
    monkeypatch.setattr(score_files, "GROUP", group)
    scores = np.random.default_rng(1).integers(0, 6, 100).astype(np.float32) / 10  # many are equal
    wanted = sorted(sorted(range(100), key=lambda number: (-scores[number], number))[: round(fraction * 100)])
    assert kept(tmp_path, pairs(100, scores), PairFilters(fraction=fraction)) == wanted


def test_a_fraction_in_percent_is_refused_with_what_is_meant() -> None:
    for fraction, told in ((30.0, "at most 1; 30 % is 0.3"), (0.0, "at most 1"), (1000.0, "at most 1")):
        with pytest.raises(InputError, match=rf"^--fraction {fraction}: must be above 0 and {told}$"):
            PairFilters(fraction=fraction)


def test_fraction_agrees_with_datacomps_threshold_where_no_scores_are_equal(tmp_path) -> None:
    """get_threshold: n = int(len(df) * fraction); -np.sort(-df[key].values)[n], which itself is kept too."""
    table = pairs(1000)
    scores = table["score"].to_numpy()
    n = int(len(scores) * 0.3)
    threshold = -np.sort(-scores)[n]
    theirs = np.flatnonzero(scores >= threshold).tolist()
    ours = kept(tmp_path, table, PairFilters(fraction=0.3))
    assert len(ours) == n
    assert set(theirs) - set(ours) == {int(np.flatnonzero(scores == threshold)[0])}
