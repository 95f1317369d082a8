"""The pairs that a table of decisions keeps are read, on any ranks, and no others; filters keep what DataComp's do."""

import csv
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from datamodules.captions import Captions
from datamodules.commands.shard import shard
from datamodules.open_source import open_source
from datamodules.openmoji import EmojiPairs, read_table
from datamodules.pairs import score_files
from datamodules.pairs.decisions import ALL_PAIRS, label_of, read_decisions
from datamodules.pairs.findings import DataOptions, Finding, write_findings
from datamodules.pairs.kept import kept_pairs
from datamodules.pairs.mixture import Mixture
from datamodules.pairs.score_files import SCORES, PairFilters, write_scores
from datamodules.pairs.source import Columns, PairSource
from datamodules.shards.pairs import TarPairs
from lit_clip.errors import InputError
from lit_clip.tools.hashing import pair_hash
from tests.helpers.small_sets import make_module, make_trainer, trained_on

ROWS = 24


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working directory with 24 images of one colour, ``captions.csv`` and ``several.jsonl``."""
    rows = [(f"{number}.png", f"number {number}") for number in range(ROWS)]
    for number, (name, _) in enumerate(rows):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    lines = [json.dumps({"image": name, "caption": [text, f"{text} again", f"{text} too"]}) for name, text in rows]
    (tmp_path / "several.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(source: PairSource, path: str, keep: float, seed: int = 0) -> set[tuple[str, str]]:
    """Write random scores of a source; return key and caption of the pairs that are kept."""
    found = [(row, source.key(row), caption) for row in range(len(source)) for caption in source.captions(row)]
    scores = np.random.default_rng(seed).permutation(len(found)).astype(np.float32)
    columns = {
        "row": [row for row, _, _ in found],
        "pair": [pair_hash(key, caption) for _, key, caption in found],
        "key": [key for _, key, _ in found],
        "caption": [caption for _, _, caption in found],
        "score": scores,
        "width": np.full(len(found), 8, dtype=np.int32),
        "height": np.full(len(found), 8, dtype=np.int32),
        "finding": pa.nulls(len(found), pa.string()),
    }
    filters, label = PairFilters(fraction=keep), label_of(source, ALL_PAIRS)
    write_scores(Path(path), [pa.table(columns, SCORES)], scores, filters, {"model_sha256": "0"}, label)
    best = np.flatnonzero(scores >= len(found) - int(keep * len(found) + 1e-6))
    return {found[number][1:] for number in best}


def test_every_rank_of_fit_reads_its_share_of_exactly_the_kept_pairs(folder: Path) -> None:
    kept = write(open_source("captions.csv"), "scores.parquet", 0.5)
    assert len(kept) == ROWS // 2
    for world in (1, 2, 3):
        ranks = []
        for rank in range(world):
            data = Captions("captions.csv", "captions.csv", batch_size=1, num_workers=0, keep="scores.parquet")
            ranks += trained_on(data, rank, world)
        assert Counter(ranks) == Counter(kept)
        assert len(data.val_source or []) == ROWS  # what is given as val is not filtered


def test_of_several_captions_only_the_kept_are_drawn_and_all_alike(folder: Path) -> None:
    source = open_source("several.jsonl")
    kept = write(source, "scores.parquet", 0.5)
    pairs = kept_pairs(source, "scores.parquet")
    by_key = {key: {caption for other, caption in kept if other == key} for key, _ in kept}
    assert [pairs.key(index) for index in range(len(pairs))] == sorted(by_key, key=lambda key: int(key[:-4]))
    assert {len(captions) for captions in by_key.values()} == {1, 2, 3}
    rng = random.Random(0)
    for index in range(len(pairs)):
        key = pairs.key(index)
        drawn = Counter(pairs.text(index, rng).caption for _ in range(100))
        assert drawn.keys() == by_key[key]
        assert min(drawn.values()) > 0.5 * 100 / len(drawn)
        assert {pairs.load(index, rng).caption for _ in range(12)} <= by_key[key]
        assert pairs.load(index, None).caption == pairs.captions(index)[0]
        assert set(pairs.read(index).captions) == set(pairs.captions(index)) == by_key[key]


def test_kept_pairs_of_tar_shards_are_those_of_the_table(folder: Path) -> None:
    shard("several.jsonl", "shards", shard_size=7, num_workers=0)
    captions = {caption for _, caption in write(open_source("several.jsonl"), "table.parquet", 0.4)}
    assert captions == {caption for _, caption in write(TarPairs("shards"), "shards.parquet", 0.4)}
    data = Captions("shards", "captions.csv", batch_size=1, num_workers=2, keep="shards.parquet")
    read = [trained_on(data, epoch=number) for number in range(2)]
    assert {caption for pairs in read for _, caption in pairs} <= captions
    assert Counter(key for key, _ in read[0]) == Counter(key for key, _ in read[1])
    assert [key for key, _ in read[0]] != [key for key, _ in read[1]]


def test_shard_writes_exactly_the_kept_pairs(folder: Path) -> None:
    kept = write(open_source("several.jsonl"), "scores.parquet", 0.3)
    shard("several.jsonl", "shards", shard_size=5, num_workers=0, keep="scores.parquet")
    written = TarPairs("shards")
    pairs = [(written.read(row).image, caption) for row in range(len(written)) for caption in written.captions(row)]
    assert Counter(pairs) == Counter(((folder / key).read_bytes(), caption) for key, caption in kept)
    write(open_source("several.jsonl"), "scores.parquet", 0.3, seed=1)
    with pytest.raises(InputError, match="shards: begun with other data"):
        shard("several.jsonl", "shards", shard_size=5, num_workers=0, keep="scores.parquet")


def find(source: PairSource, path: str, drop: float, seed: int) -> set[tuple[str, str]]:
    """Write findings that drop random pairs, and the last row whole; return key and caption of the others."""
    rng, lines, kept = random.Random(seed), [], set()
    for row in range(len(source) - 1):
        key, captions = source.key(row), source.captions(row)
        for caption in captions:
            line = Finding.of_pair(row, key, caption, len(captions))
            line.add("copy", "drop" if rng.random() < drop else "keep")
            lines += [line] if line.decision == "drop" or rng.random() < 0.5 else []
            kept |= {(key, caption)} if line.decision == "keep" else set()
    lines.append(Finding.of_row(len(source) - 1, source.key(len(source) - 1)))
    lines[-1].add("broken image", "drop")
    write_findings(Path(path), lines, source, DataOptions(["several.jsonl"], Columns(), None))
    return kept


@pytest.mark.parametrize(
    "names", [["a.csv", "b.csv"], ["a.csv", "one.parquet"], ["one.parquet", "two.parquet", "b.csv", "a.csv"]]
)
def test_of_several_tables_a_pair_is_kept_if_all_keep_it(folder: Path, names: list[str]) -> None:
    source = open_source("several.jsonl")
    kept = {"a.csv": find(source, "a.csv", 0.3, 0), "b.csv": find(source, "b.csv", 0.5, 1)}
    kept |= {"one.parquet": write(source, "one.parquet", 0.7), "two.parquet": write(source, "two.parquet", 0.8, seed=1)}
    wanted = set.intersection(*(kept[name] for name in names))
    pairs = kept_pairs(source, names)
    found = [(pairs.key(row), caption) for row in range(len(pairs)) for caption in pairs.captions(row)]
    assert sorted(found) == sorted(wanted)
    data = Captions("several.jsonl", "several.jsonl", batch_size=1, num_workers=0, keep=names)
    read = {pair for epoch in range(12) for pair in trained_on(data, epoch=epoch)}
    assert read <= wanted
    assert {key for key, _ in read} == {key for key, _ in wanted}
    shard("several.jsonl", "shards", num_workers=0, keep=names)
    written = TarPairs("shards")
    assert sorted(text for row in range(len(written)) for text in written.captions(row)) == sorted(c for _, c in wanted)


def test_several_tables_are_refused_by_the_name_of_the_wrong_one(folder: Path) -> None:
    source = open_source("several.jsonl")
    find(source, "a.csv", 0.3, 0)
    write(open_source(["several.jsonl", "captions.csv"]), "b.parquet", 0.5)
    with pytest.raises(InputError, match=r"^data\.keep: b\.parquet: is of 48 rows"):
        kept_pairs(source, ["a.csv", "b.parquet"], "data.keep")
    first, last = ([Finding.of_row(row, source.key(row)) for row in part] for part in (range(12), range(12, ROWS)))
    for path, lines in (("first.csv", first), ("last.csv", last)):
        for line in lines:
            line.add("broken image", "drop")
        write_findings(Path(path), lines, source, DataOptions(["several.jsonl"], Columns(), None))
    with pytest.raises(InputError, match=r"^--keep: first\.csv, last\.csv: together keep no pair"):
        kept_pairs(source, ["first.csv", "last.csv"], "--keep")
    with pytest.raises(InputError, match="^--keep: an empty list"):
        kept_pairs(source, [], "--keep")


def test_each_part_of_a_mixture_has_its_own_scores(folder: Path) -> None:
    one = write(open_source("captions.csv"), "one.parquet", 0.5)
    two = write(open_source("several.jsonl"), "two.parquet", 0.25)
    parts = [
        {"data": "captions.csv", "weight": 1, "keep": "one.parquet"},
        {"data": "several.jsonl", "weight": 1, "keep": "two.parquet"},
        {"data": "captions.csv", "weight": 1},
    ]
    data = Captions(parts, "captions.csv", batch_size=1, num_workers=0)
    read = {pair for number in range(4) for pair in trained_on(data, epoch=number)}
    assert {pair for pair in read if pair[0][:2] == "0:"} == {(f"0:{key}", caption) for key, caption in one}
    assert {pair for pair in read if pair[0][:2] == "1:"} <= {(f"1:{key}", caption) for key, caption in two}
    assert len({pair for pair in read if pair[0][:2] == "2:"}) == ROWS
    with pytest.raises(InputError, match="data.keep: each part of a mixture has its own"):
        Captions(parts, "captions.csv", keep="one.parquet").setup("fit")


def test_without_val_the_held_out_images_are_those_of_the_whole_data(folder: Path) -> None:
    kept = write(open_source("captions.csv"), "scores.parquet", 0.9)
    whole = Captions("captions.csv", num_workers=0, seed=2)
    part = Captions("captions.csv", num_workers=0, seed=2, keep="scores.parquet")
    sources = []
    for data in (whole, part):
        data.setup("fit")
        sources.append([{each.key(row) for row in range(len(each))} for each in (data.train_source, data.val_source)])
    (train, val), (kept_train, kept_val) = sources
    keys = {key for key, _ in kept}
    assert (kept_train, kept_val) == (train & keys, val & keys)
    assert kept_val


def test_several_tables_with_scores_are_divided_by_image(folder: Path) -> None:
    for name, word in (("more.csv", "more"), ("most.csv", "most")):
        lines = [f"{number}.png,{word} {number} {again}" for number in range(ROWS) for again in range(2)]
        Path(name).write_text("\n".join(["image,caption", *lines]))
    write(open_source(["more.csv", "most.csv"]), "scores.parquet", 0.8)
    data = Captions(["more.csv", "most.csv"], num_workers=0, keep="scores.parquet")
    data.setup("fit")
    assert data.train_source
    assert data.val_source
    train, val = ({each.key(row) for row in range(len(each))} for each in (data.train_source, data.val_source))
    assert (len(train), len(val), train & val) == (ROWS - 2, 2, set())


def test_another_table_of_scores_is_refused_inside_an_epoch(folder: Path) -> None:
    source = open_source("several.jsonl")
    for name, seed in (("one.parquet", 0), ("two.parquet", 1)):  # the same rows, in the same order; other captions
        write(source, name, 0.98, seed)
        assert len(kept_pairs(source, name)) == ROWS
    mixed = [{"data": "several.jsonl", "weight": 1}, {"data": "captions.csv", "weight": 1}]

    def run(steps: int, resume: str | None = None, mixture: bool = False, **keep: str) -> None:
        data = [{**mixed[0], **keep}, mixed[1]] if mixture else "several.jsonl"
        options = {} if mixture else keep
        pairs = Captions(data, "captions.csv", batch_size=4, num_workers=0, **options)  # pyright: ignore[reportArgumentType]
        trainer = make_trainer(folder, [], max_steps=steps, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(make_module(), pairs, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint("saved.ckpt")

    for mixture in (False, True):
        run(1, mixture=mixture, keep="one.parquet")
        shutil.copy("one.parquet", "same.parquet")
        run(2, "saved.ckpt", mixture, keep="same.parquet")
        with pytest.raises(InputError, match="digest of the pairs that data.keep keeps '.*' there and .* here"):
            run(3, "saved.ckpt", mixture, keep="two.parquet")
    run(1)
    assert "data.keep" not in str(torch.load("saved.ckpt", weights_only=True)["Captions"])


def test_a_file_of_other_or_changed_data_is_refused(folder: Path) -> None:
    write(open_source("captions.csv"), "scores.parquet", 0.5)
    table = Path("captions.csv").read_text()
    Path("captions.csv").write_text(table + "0.png,one more\n")
    with pytest.raises(InputError, match=r"scores.parquet: is of 24 rows, and the data have 25 rows; it is"):
        kept_pairs(open_source("captions.csv"), "scores.parquet")
    Path("captions.csv").write_text(table.replace("number", "figure"))
    with pytest.raises(InputError, match=r"scores.parquet: decided on row \d+ with other captions than"):
        kept_pairs(open_source("captions.csv"), "scores.parquet")


def test_a_change_beyond_the_first_pairs_is_refused_when_its_pair_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.pairs.kept.CHECKED", 2)
    write(open_source("captions.csv"), "scores.parquet", 1.0)
    Path("captions.csv").write_text(Path("captions.csv").read_text().replace("number 23", "figure 23"))
    pairs = kept_pairs(open_source("captions.csv"), "scores.parquet")
    for use in (lambda row: pairs.load(row, None), pairs.read, pairs.captions, lambda row: pairs.text(row, None)):
        use(22)
        with pytest.raises(InputError, match=r"decided on row 23 with other captions than 23.png has now"):
            use(23)


def test_something_else_and_a_whole_mixture_are_refused(folder: Path) -> None:
    Path("scores.parquet").write_text("junk")
    for name, message in (
        ("scores.parquet", "not a readable table of decisions"),
        ("captions.csv", "not one column 'row'; its columns are image, caption"),
        ("gone.csv", "there is no such file"),
        ("0.png", "must be a .parquet, .csv or .tsv or .txt file"),
    ):
        with pytest.raises(InputError, match=f"^data.keep: {name}: {message}"):
            kept_pairs(open_source("several.jsonl"), name, "data.keep")
    shard("captions.csv", "shards", num_workers=0)
    source = Mixture([TarPairs("shards"), open_source("captions.csv")], [1, 3])
    write(source, "scores.parquet", 0.5)
    with pytest.raises(InputError, match="a mixture repeats rows; filter or divide its parts, not the mixture"):
        kept_pairs(source, "scores.parquet").order(0, 0)


def test_a_source_that_only_loads_pairs_is_filtered_too(folder: Path) -> None:
    source = EmojiPairs(read_table()[:ROWS], [folder / f"{number}.png" for number in range(ROWS)])
    kept = write(source, "scores.parquet", 0.25)
    pairs = kept_pairs(source, "scores.parquet")
    loaded = [pairs.load(index, random.Random(0)) for index in range(len(pairs))]
    assert {(pair.key, pair.caption) for pair in loaded} == kept


def test_kept_pairs_take_a_few_bytes_each(folder: Path) -> None:
    source = open_source("captions.csv")
    write(source, "scores.parquet", 1.0)
    kept = kept_pairs(source, "scores.parquet")
    values = [*vars(kept).values(), *vars(kept.decisions).values(), *kept.decisions.copies]
    arrays = {id(value): value for value in values if isinstance(value, np.ndarray)}
    assert sum(array.nbytes for array in arrays.values()) == 12 * ROWS


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
