"""``lit-clip embed`` takes whatever training takes, and ``lit-clip search`` takes what it wrote."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules.commands.shard import shard
from datamodules.open_source import open_source
from lit_clip import LitCLIP, load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.feature_files import read_features
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig

ROWS = [("a.png", "a red kite"), ("b.png", "two dogs"), ("a.png", "a kite"), ("c.png", "Äpfel"), ("b.png", "two dogs")]
QUERIES = ["a red kite", "two dogs asleep"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the same three images in a table, parquet, shards, COCO's JSON and class folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    noise = np.random.default_rng(0)
    Path("images").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        image = Image.fromarray(noise.integers(0, 256, (40, 30, 3), dtype=np.uint8))
        image.save(f"images/{name}")
        Path(f"classes/class_{name[0]}").mkdir(parents=True)
        image.save(f"classes/class_{name[0]}/{name}")
    Path("images/t.csv").write_text("image,caption\n" + "".join(f"{image},{text}\n" for image, text in ROWS))
    content = [
        {"image": {"bytes": Path("images", name).read_bytes(), "path": name}, "text": text} for name, text in ROWS
    ]
    Path("parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(content), "parquet/train-00000-of-00001.parquet")
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("abc")]
    texts = [{"image_id": "abc".index(name[0]), "caption": text} for name, text in ROWS]
    Path("images/captions.json").write_text(json.dumps({"images": images, "annotations": texts}))
    shard("images/t.csv", "shards", workers=0)
    return tmp_path


def embed(*words: str) -> None:
    run_command(["embed", *words, "--num_workers", "0", "--accelerator", "cpu"])


DATA = {
    "images/t.csv": ["a.png", "b.png", "c.png"],
    "parquet": [f"train-00000-of-00001.parquet:{row}" for row in range(5)],
    "shards": [],  # named by the writer of the shards
    "images/captions.json": ["a.png", "b.png", "c.png"],
    "classes": [f"classes/class_{name}/{name}.png" for name in "abc"],
}


@torch.no_grad()
@pytest.mark.parametrize("output", ["features.npy", "features.parquet"])
@pytest.mark.parametrize("data", DATA)
def test_features_of_pairs_equal_those_of_each_image(
    folder: Path, tiny_checkpoint: Path, data: str, output: str
) -> None:
    embed(data, "--model", str(tiny_checkpoint), "--output", output)
    found, model = read_features(Path(output)), load_model(tiny_checkpoint)
    assert found.keys == DATA[data] or (data == "shards" and len(found.keys) == 5)
    assert found.keys == sorted(set(found.keys))
    if data == "classes":
        images = {key: Image.open(key) for key in found.keys}
    else:
        source = open_source(data)
        images = {source.read(row).key: source.load(row, None).image for row in range(len(source))}
    for key, feature in zip(found.keys, found.features, strict=True):
        expected = model.encode_image(model.preprocess(images[key])[None], normalize=True)[0]
        assert np.abs(feature - expected.numpy()).max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("output", ["features.npy", "features.parquet"])
def test_each_distinct_caption_of_an_image_has_a_row(folder: Path, tiny_checkpoint: Path, output: str) -> None:
    embed("images/t.csv", "--captions", "--model", str(tiny_checkpoint), "--output", output)
    found, model = read_features(Path(output)), load_model(tiny_checkpoint)
    assert list(zip(found.keys, found.captions, strict=True)) == [ROWS[0], ROWS[2], ROWS[1], ROWS[3]]
    for caption, feature in zip(found.captions, found.features, strict=True):
        expected = model.encode_text(model.tokenize(caption), normalize=True)[0]
        assert np.abs(feature - expected.numpy()).max() < 1e-5
    embed(
        "classes", "--captions", "--templates", "a photo of a {}.", "--model", str(tiny_checkpoint), "--output", output
    )
    assert read_features(Path(output)).captions == [f"a photo of a class {name}." for name in "abc"]


def test_a_folder_that_holds_its_own_features_is_still_a_folder_of_images(folder: Path, tiny_checkpoint: Path) -> None:
    for _ in range(2):
        embed("classes", "--model", str(tiny_checkpoint), "--output", "classes/features.parquet")
        assert read_features(Path("classes/features.parquet")).keys == DATA["classes"]


def test_bad_images_of_a_table_are_an_error_or_are_listed(folder: Path, tiny_checkpoint: Path) -> None:
    Path("images/b.png").write_text("junk")
    words = ["images/t.csv", "--model", str(tiny_checkpoint), "--output", "features.npy"]
    with pytest.raises(InputError, match=r"^images/t.csv row 3: cannot read .*, or set --on_error skip"):
        embed(*words)
    embed(*words, "--on_error", "skip")
    assert read_features(Path("features.npy")).keys == ["a.png", "c.png"]
    assert Path("features.npy.skipped.txt").read_text().startswith("b.png\timages/t.csv row 3: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images/t.csv", "images"], "images: holds images, and images/t.csv pairs; embed them into separate files"),
        (["absent.csv"], "absent.csv: no such file"),
        (
            ["images/t.csv", "--caption_column", "text"],
            "no column 'text'; its columns are image, caption",
        ),
        (["classes", "--captions"], r"set --templates \(such as imagenet\) if each subfolder is a class"),
    ],
)
def test_mistakes_are_one_line(folder: Path, tiny_checkpoint: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed(*words, "--model", str(tiny_checkpoint), "--output", "features.npy")
    assert not list(folder.glob("features*"))


def search(capsys: pytest.CaptureFixture[str], *words: str) -> list[tuple[str, float]]:
    capsys.readouterr()
    run_command(["search", *words, "--num_workers", "0"])
    rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [(key.strip(), float(score)) for _, score, key in rows]


@torch.no_grad()
@pytest.mark.parametrize("output", ["features.npy", "features.parquet"])
def test_a_search_of_features_ranks_as_a_plain_product_does(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    model = load_model(tiny_checkpoint)
    options = ["--model", str(tiny_checkpoint), "--output", output]
    for data, shown in ((["images"], 3), (["images/t.csv"], 3), (["parquet"], 0), (["images/t.csv", "--captions"], 4)):
        embed(*data, *options)
        stored = read_features(Path(output))
        found = search(capsys, output, *QUERIES, "--model", str(tiny_checkpoint))
        names = (
            [f"{a}: {b}" for a, b in zip(stored.keys, stored.captions, strict=True)] if stored.captions else stored.keys
        )
        for number, query in enumerate(QUERIES):
            here = found[number * len(names) : (number + 1) * len(names)]
            scores = np.asarray(stored.features) @ model.encode_text(model.tokenize(query), normalize=True)[0].numpy()
            assert dict(here) == pytest.approx(dict(zip(names, scores.tolist(), strict=True)), abs=1e-4)
            assert [score for _, score in here] == sorted((score for _, score in here), reverse=True)
        images = re.findall(r'<img src="data:image/jpeg;base64,', Path("search.html").read_text(encoding="utf-8"))
        assert len(images) == (0 if stored.captions else len(QUERIES) * shown)


def test_features_of_another_model_and_other_files_are_refused(
    folder: Path, tiny_checkpoint: Path, tiny_config: CLIPConfig
) -> None:
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(LitCLIP(tiny_config))
    trainer.save_checkpoint(folder / "other.ckpt", weights_only=True)
    for output in ("features.npy", "features.parquet"):
        embed("images", "--model", str(tiny_checkpoint), "--output", output)
        with pytest.raises(InputError, match=f"^{output}: features of another model .*{tiny_checkpoint.name}"):
            run_command(["search", output, "kite", "--model", "other.ckpt"])
    np.save("plain.npy", np.zeros((3, 4), np.float32))
    for file, problem in {
        "plain.npy": "plain.keys.json: there is no such file",
        "absent.parquet": "absent.parquet: there is no such file",
        "parquet/train-00000-of-00001.parquet": "not a readable file of features .*; write it with lit-clip embed",
    }.items():
        with pytest.raises(InputError, match=problem):
            run_command(["search", file, "kite", "--model", str(tiny_checkpoint)])
    with pytest.raises(InputError, match=r"--index i.npz: features.npy holds features already"):
        run_command(["search", "features.npy", "kite", "--index", "i.npz", "--model", str(tiny_checkpoint)])


@torch.no_grad()
@pytest.mark.parametrize("output", ["features.npy", "features.parquet"])
def test_search_in_smaller_features_scores_what_the_file_stores(
    folder: Path, tiny_checkpoint: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle reads the file itself: int8 levels of the first 9 dimensions, decoded as documented."""
    model = ["--model", str(tiny_checkpoint)]
    embed("images/t.csv", *model, "--output", "whole.npy")
    embed("images/t.csv", *model, "--output", output, "--dimensions", "9", "--dtype", "int8")
    if output.endswith(".npy"):
        codes, about = np.load(output), json.loads(Path("features.keys.json").read_text())
        scale = json.loads(about["int8_scale"])
    else:
        table = pq.read_table(output)
        codes = np.array(table["feature"].to_pylist(), dtype=np.int8)
        assert table.schema.field("feature").type == pa.list_(pa.int8(), 9)
        scale = json.loads((table.schema.metadata or {})[b"int8_scale"])
    assert codes.dtype == np.int8
    assert codes.shape == (3, 9)
    stored = np.array(scale["start"]) + np.array(scale["step"]) * (codes.astype(np.float64) + 128)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    whole = np.load("whole.npy")[:, :9]
    assert np.abs(stored - whole / np.linalg.norm(whole, axis=1, keepdims=True)).max() < 0.02
    clip = load_model(tiny_checkpoint)
    query = clip.encode_text(clip.tokenize(QUERIES[0])).double().numpy()[0, :9]
    expected = sorted(stored @ query / np.linalg.norm(query), reverse=True)
    capsys.readouterr()
    run_command(["search", output, QUERIES[0], *model])
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [float(row[2]) for row in rows] == pytest.approx(expected, abs=1e-4)


def test_the_check_prints_the_recall_of_whole_and_stored_features(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_checkpoint), "--output", "features.npy", "--check", "images/t.csv"]
    embed("images/t.csv", *options, "--dimensions", "1")
    out = capsys.readouterr().out
    assert "3 images, 4 captions" in out
    rows = {
        row[1].strip(): [float(cell) for cell in row[2:5]]
        for row in (line.split("│") for line in out.splitlines())
        if len(row) > 4
    }
    assert list(rows) == [f"{way}, recall@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10)]
    for whole, stored, difference in rows.values():
        assert stored - whole == pytest.approx(difference, abs=0.011)
    assert rows["image to text, recall@5"][:2] == rows["text to image, recall@5"][:2] == [100, 100]
    clip, source = load_model(tiny_checkpoint), open_source("images/t.csv")
    images = torch.stack([clip.preprocess(source.load(row, None).image) for row in (0, 1, 3)])
    texts = ["a red kite", "two dogs", "two dogs", "a kite", "Äpfel"]
    with torch.no_grad():
        text, image = (f[:, :1].sign() for f in (clip.encode_text(clip.tokenize(texts)), clip.encode_image(images)))
    scores = (text @ image.T).numpy()
    wins = [
        all(scores[row, own] > scores[row, other] for other in {0, 1, 2} - {own})
        for row, own in enumerate((0, 1, 1, 0, 2))
    ]
    assert rows["text to image, recall@1"][1] == pytest.approx(100 * np.mean(wins), abs=0.01)  # a tie is a miss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dimensions", "0"], "--dimensions 0: must be from 1 to 15; the model's features have 16"),
        (["--dimensions", "16"], "--dimensions 16: must be from 1 to 15"),
        (["--check", "images/t.csv"], "--check images/t.csv: full features lose nothing; give --dimensions or --dtype"),
        (["--dtype", "int8", "--check", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_sizes_that_mean_nothing_are_refused_before_anything_is_encoded(
    folder: Path, tiny_checkpoint: Path, options: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        embed("images/t.csv", "--model", str(tiny_checkpoint), "--output", "features.npy", *options)
    assert not Path("features.npy").exists()


def test_a_single_row_has_no_range_for_int8(folder: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="--dtype int8: .* there is only one"):
        embed("images/a.png", "--model", str(tiny_checkpoint), "--output", "features.npy", "--dtype", "int8")
