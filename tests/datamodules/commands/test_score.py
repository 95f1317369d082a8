"""``lit-clip score`` writes the similarities of a plain loop, on any number of ranks, interrupted or not."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules.commands.shard import shard
from datamodules.open_source import open_source
from datamodules.pairs.kept import kept_pairs
from datamodules.pairs.score_files import ScoreFile
from lit_clip import LitCLIP, load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.models.fingerprint import fingerprint
from lit_clip.tools.hashing import pair_hash
from tests.helpers.encoding import watch_encoding

CAPTIONS = [
    ["a red kite over the beach"],
    ["two dogs", "two dogs, one of them asleep", "animals"],
    ["x"],
    ["a cup of coffee", "a cup of coffee", "breakfast"],  # the same caption twice is one pair
    ["Äpfel"],
    ["two dogs"],  # of another image
    ["a long street with a great many houses on either side of it and no end in sight"],
]
PAIRS = [(row, caption) for row, captions in enumerate(CAPTIONS) for caption in dict.fromkeys(captions)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working directory with seven noise images, in ``several.jsonl`` with all captions, and a CSV."""
    noise = np.random.default_rng(0)
    lines, rows = [], []
    for number, captions in enumerate(CAPTIONS):
        size = noise.integers(20, 90, 2)
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": captions}))
        rows.append((f"{number}.png", captions[0]))
    (tmp_path / "several.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(*words: object) -> None:
    own = "--model" in words
    run_command(["score", *map(str, words), *(["--num_workers", "0", "--accelerator", "cpu"] if own else [])])


def read(path: str = "scores.parquet") -> dict[str, list]:
    return pq.read_table(path).to_pydict()


@torch.no_grad()
def one_by_one(checkpoint: Path, images: list[str], captions: list[str]) -> np.ndarray:
    """Cosines in float64, a pair at a time."""
    model = load_model(checkpoint).double()
    scores = []
    for image, caption in zip(images, captions, strict=True):
        pixels = model.preprocess(Image.open(image))[None].double()
        one, other = model.encode_image(pixels)[0], model.encode_text(model.tokenize(caption))[0]
        scores.append(float(one @ other / one.norm() / other.norm()))
    return np.array(scores)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_a_plain_loop_in_float64(folder: Path, tiny_checkpoint: Path, batch_size: int) -> None:
    score("several.jsonl", "--model", tiny_checkpoint, "--output", "scores.parquet", "--batch_size", batch_size)
    found = read()
    assert list(zip(found["row"], found["caption"], strict=True)) == PAIRS
    assert found["key"] == [f"{row}.png" for row, _ in PAIRS]
    assert found["pair"] == [pair_hash(*pair) for pair in zip(found["key"], found["caption"], strict=True)]
    assert np.abs(found["score"] - one_by_one(tiny_checkpoint, found["key"], found["caption"])).max() < 1e-6
    sizes = [Image.open(key).size for key in found["key"]]
    assert list(zip(found["width"], found["height"], strict=True)) == sizes
    assert set(found["decision"]) == {"keep"}
    assert set(found["finding"]) == {None}
    assert not list(folder.glob(".*"))


def test_metadata_name_the_model_and_the_data(folder: Path, tiny_checkpoint: Path) -> None:
    score("captions.csv", "--model", tiny_checkpoint, "--output", "scores.parquet", "--fraction", 0.5)
    about = {key.decode(): value.decode() for key, value in (pq.read_schema("scores.parquet").metadata or {}).items()}
    assert about["model_sha256"] == fingerprint(load_model(tiny_checkpoint)).model
    assert (about["model"], about["precision"]) == (str(tiny_checkpoint), "32-true")
    assert set(read()["data"]) == {"every pair of 7 rows"}
    assert json.loads(about["data"]) == ["captions.csv"]
    assert json.loads(about["filters"]) == {"fraction": 0.5}


def test_shards_have_the_scores_of_the_table_that_they_were_written_from(folder: Path, tiny_checkpoint: Path) -> None:
    shard("several.jsonl", "shards", shard_size=3, num_workers=0)
    for data, output in (("several.jsonl", "table.parquet"), ("shards", "shards.parquet")):
        score(data, "--model", tiny_checkpoint, "--output", output)
    table, shards = read("table.parquet"), read("shards.parquet")
    assert table["score"] == shards["score"]
    assert table["caption"] == shards["caption"]
    assert shards["key"][:2] == ["00000/000000000", "00000/000000001"]


def test_several_tables_are_scored_like_one(folder: Path, tiny_checkpoint: Path) -> None:
    for data, output in ((["several.jsonl"], "one.parquet"), (["several.jsonl", "captions.csv"], "both.parquet")):
        score(*data, "--model", tiny_checkpoint, "--output", output)
    assert np.allclose(read("one.parquet")["score"], read("both.parquet")["score"][: len(PAIRS)], atol=1e-6)
    assert len(read("both.parquet")["score"]) == len(PAIRS) + len(CAPTIONS)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are encoded from here on."""
    rows: list[int] = []
    watch_encoding(monkeypatch, lambda task, batch: rows.extend(batch.rows))
    return rows


def test_a_damaged_part_is_scored_again(folder: Path, tiny_checkpoint: Path, encoded: list[int]) -> None:
    options = ["captions.csv", "--model", tiny_checkpoint, "--batch_size", "2"]
    with pytest.raises(InputError, match="none of 7 pairs is kept"):  # after all were scored
        score(*options, "--output", "scores.parquet", "--threshold", 2)
    (part,) = (folder / ".scores.parquet.parts").glob("*.npz")
    content = bytearray(part.read_bytes())
    content[len(content) // 4] ^= 0xFF
    encoded.clear()
    part.write_bytes(content)
    score(*options, "--output", "scores.parquet")
    assert encoded == list(range(7))
    assert np.abs(read()["score"] - one_by_one(tiny_checkpoint, read()["key"], read()["caption"])).max() < 1e-6


def test_filters_are_counted_and_named_in_the_table(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["several.jsonl", "--model", tiny_checkpoint, "--output", "scores.parquet"]
    score(*options, "--fraction", 0.5, "--min_caption_words", 2)
    found = read()
    order = np.argsort(-np.array(found["score"], dtype=np.float32), kind="stable")
    best = {int(number) for number in order[: len(PAIRS) // 2]}
    one_word = {number for number, (_, caption) in enumerate(PAIRS) if len(caption.split()) < 2}
    for number, (decision, finding) in enumerate(zip(found["decision"], found["finding"], strict=True)):
        wrong = ["clip_score"] * (number not in best) + ["caption_num_words"] * (number in one_word)
        assert (decision, finding) == ("drop" if wrong else "keep", ", ".join(wrong) or None)
    assert capsys.readouterr().err.splitlines()[-3:] == [
        f"clip_score: {len(PAIRS) - len(best)} removed",
        f"caption_num_words: {len(one_word)} removed",
        f"scores.parquet: {len(PAIRS)} pairs, {len(best - one_word)} kept",
    ]


def test_a_table_of_scores_is_filtered_anew_without_a_model(folder: Path, tiny_checkpoint: Path) -> None:
    options = ["several.jsonl", "--model", tiny_checkpoint]
    score(*options, "--output", "scores.parquet", "--fraction", 0.5, "--min_image_dim", 30)
    score(*options, "--output", "wanted.parquet", "--threshold", 0.01)
    score("scores.parquet", "--output", "scores.parquet", "--threshold", 0.01)
    assert Path("scores.parquet").read_bytes() == Path("wanted.parquet").read_bytes()
    with pytest.raises(InputError, match="--model: scores.parquet has scores already; leave it out"):
        score("scores.parquet", "--model", tiny_checkpoint, "--output", "other.parquet")


def test_a_bad_image_is_an_error_or_is_listed_with_its_reason(folder: Path, tiny_checkpoint: Path) -> None:
    (folder / "2.png").write_text("junk")
    (folder / "6.png").unlink()
    options = ["several.jsonl", "--model", tiny_checkpoint, "--output", "scores.parquet", "--batch_size", 3]
    with pytest.raises(InputError, match=r"several.jsonl row 3: cannot read image .*, or set --on_error skip"):
        score(*options)
    score(*options, "--on_error", "skip", "--fraction", 0.5)
    found = read()
    assert found["row"] == [row for row, _ in PAIRS]
    bad = [number for number, row in enumerate(found["row"]) if row in (2, 6)]
    for number in bad:
        assert (found["decision"][number], found["score"][number], found["caption"][number]) == ("drop", None, None)
    assert "several.jsonl row 3: cannot read" in found["finding"][bad[0]]
    assert "several.jsonl row 7: no such image file" in found["finding"][bad[1]]
    assert found["decision"].count("keep") == (len(PAIRS) - 2) // 2  # the share of those that have a score
    score("scores.parquet", "--output", "again.parquet", "--fraction", 0.5)
    assert read("again.parquet") == found


def test_a_score_that_is_not_finite_is_an_error_or_is_listed(folder: Path, tiny_config: CLIPConfig) -> None:
    from lightning.pytorch import Trainer

    module = LitCLIP(tiny_config)
    with torch.no_grad():
        module.model.token_embedding.weight[module.tokenize("x")[0, 1]] = 3e38  # features overflow
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "damaged.ckpt", weights_only=True)
    options = ["captions.csv", "--model", "damaged.ckpt", "--output", "scores.parquet", "--batch_size", 1]
    with pytest.raises(InputError, match=r"2.png: features that are not finite"):
        score(*options)
    score(*options, "--on_error", "skip")
    found = read()
    assert [found[name][2] for name in ("caption", "score", "decision", "finding")] == [
        *("x", None, "drop", "score is not finite")
    ]
    assert found["decision"].count("keep") == 6


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("words", [["--fraction", "0.5"], ["--threshold", "-1"], []])
def test_a_table_with_a_score_that_is_no_number_is_refused(
    folder: Path, tiny_checkpoint: Path, words: list[str], number: float
) -> None:
    score("several.jsonl", "--model", tiny_checkpoint, "--output", "scores.parquet")
    table = pq.read_table("scores.parquet")
    scores = table["score"].to_numpy().copy()
    scores[3] = number
    place = table.schema.get_field_index("score")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(scores)), "scores.parquet")
    line = rf"^scores.parquet: the score of row 3 is {number}; write it with lit-clip score$"
    with pytest.raises(InputError, match=line):
        score("scores.parquet", "--output", "again.parquet", *words)
    assert not Path("again.parquet").exists()
    with pytest.raises(InputError, match=line):
        kept_pairs(open_source("several.jsonl"), "scores.parquet")


def test_scores_and_metadata_of_other_types_are_refused(folder: Path, tiny_checkpoint: Path) -> None:
    score("several.jsonl", "--model", tiny_checkpoint, "--output", "scores.parquet")
    table = pq.read_table("scores.parquet")
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"model": b"\xff"}), "scores.parquet")
    with pytest.raises(InputError, match=r"^scores.parquet: not a readable file of scores \(not UTF-8 text"):
        ScoreFile(Path("scores.parquet"))
    assert kept_pairs(open_source("several.jsonl"), "scores.parquet")  # who the model was does not decide
    place = table.schema.get_field_index("score")
    pq.write_table(table.set_column(place, "score", table["score"].cast(pa.string())), "scores.parquet")
    with pytest.raises(InputError, match=r"^scores\.parquet: column 'score' holds string, not numbers"):
        kept_pairs(open_source("several.jsonl"), "scores.parquet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output scores.csv", "--output scores.csv: must be a .parquet file"),
        ("--output no/scores.parquet", "--output no/scores.parquet: there is no folder no"),
        ("--output s.parquet --fraction 1.5", "--fraction 1.5: must be above 0 and at most 1"),
        ("--output s.parquet --fraction 0.5 --threshold 0.1", "--threshold: give it or --fraction, not both"),
        ("--output s.parquet --fraction 0.1", "--fraction 0.1: keeps none of 7 pairs; raise it"),
        ("--output s.parquet --threshold 2", r"none of 7 pairs is kept \(removed by clip_score 7\)"),
        ("--output s.parquet --min_image_dim 0", "--min_image_dim 0: must be at least 1"),
    ],
)
def test_impossible_options_are_one_line(folder: Path, tiny_checkpoint: Path, words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score("captions.csv", "--model", tiny_checkpoint, *words.split())
    assert not list(folder.glob("*.parquet"))


def test_a_model_is_needed_to_score(folder: Path) -> None:
    with pytest.raises(InputError, match="--model: not given; it is needed to score pairs"):
        score("captions.csv", "--output", "scores.parquet")
