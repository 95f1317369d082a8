"""Hard negative captions: from a column of a table to the batch."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules import Captions
from datamodules.open_source import open_source
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing
from lit_clip.models.tokenizer import CLIPTokenizer

ROWS = [["0.png", "a", ["not a"]], ["1.png", "b", []], ["2.png", "c", ["not c", "no c at all"]], ["3.png", "d", None]]


def table(folder: Path, suffix: str) -> Path:
    for name, *_ in ROWS:
        Image.new("RGB", (8, 8)).save(folder / name)
    path = folder / f"captions{suffix}"
    columns = {name: [row[i] for row in ROWS] for i, name in enumerate(("image", "caption", "wrong"))}
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in ROWS))
    else:  # a text in each row
        path.write_text("image,caption,wrong\n" + "".join(f"{a},{b},{(c or [''])[0]}\n" for a, b, c in ROWS))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_one_of_a_rows_negatives_is_drawn_and_validation_reads_none(suffix: str, tmp_path: Path) -> None:
    source = open_source(table(tmp_path, suffix), negative_column="wrong")
    drawn = [{source.load(row, random.Random(seed)).negative for seed in range(20)} for row in range(4)]
    both = {"not c"} if suffix == ".csv" else {"not c", "no c at all"}
    assert drawn == [{"not a"}, {""}, both, {""}]
    assert [source.load(row, None).negative for row in range(4)] == [""] * 4


def test_a_batch_has_the_tokens_of_the_negatives_that_there_are(tmp_path: Path) -> None:
    path, tokenize = table(tmp_path, ".csv"), CLIPTokenizer(16)
    data = Captions(str(path), str(path), negative_column="wrong", batch_size=4, num_workers=0)
    data.preprocessing, data.tokenize = Preprocessing(image_size=8), tokenize
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch.negatives) == ["", "", "not a", "not c"]
    found = [text for text in batch.negatives if text]
    assert batch.negative_tokens.tolist() == tokenize(found)[:, : max(batch.negative_lengths)].tolist()
    assert all(f"not {caption}" == text for caption, text in zip(batch.captions, batch.negatives, strict=True) if text)
    parts = batch.split(3)
    assert [text for part in parts for text in part.negatives] == batch.negatives
    rows = [row for part in parts for row in part.negative_tokens.tolist()]
    assert rows == batch.negative_tokens.tolist()
    longer: CaptionBatch = batch.stretched(9)
    assert (len(longer.images), [text for text in longer.negatives if text]) == (9, found)
    (validation,) = data.val_dataloader()
    assert validation.negatives == ()


def test_a_source_without_columns_refuses_a_column_of_negatives(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a")
    with pytest.raises(InputError, match="is not a table, but negative_column is 'wrong'; leave it out"):
        open_source(tmp_path, negative_column="wrong")
    with pytest.raises(InputError, match="shards have no columns; leave negative_column out"):
        open_source(tmp_path / "a.tar", negative_column="wrong")
