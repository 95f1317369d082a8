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
from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.feature_files import read_features
from lit_clip.errors import InputError
from tests.helpers.encoding import changed_copy

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
    shard("images/t.csv", "shards", num_workers=0)
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
    embed("images/t.csv", "--fields", "caption", "--model", str(tiny_checkpoint), "--output", output)
    found, model = read_features(Path(output)), load_model(tiny_checkpoint)
    assert list(zip(found.keys, found.captions, strict=True)) == [ROWS[0], ROWS[2], ROWS[1], ROWS[3]]
    for caption, feature in zip(found.captions, found.features, strict=True):
        expected = model.encode_text(model.tokenize(caption), normalize=True)[0]
        assert np.abs(feature - expected.numpy()).max() < 1e-5
    embed(
        *("classes", "--fields", "caption", "--classes.templates", "a photo of a {}."),
        *("--model", str(tiny_checkpoint), "--output", output),
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
        (["images/t.csv", "--columns.caption", "text"], "no column 'text'; its columns are image, caption"),
        (["images/t.csv", "--text_weight", "0.2"], "--text_weight 0.2: is for --fields image,caption"),
        (["images/t.csv", "--fields", "image,caption", "--text_weight", "1"], "above 0 and below 1"),
        (["classes", "--fields", "caption"], r"set --classes.templates \(such as imagenet\) if each subfolder is"),
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
    captions = ["images/t.csv", "--fields", "caption"]
    for data, shown in ((["images"], 3), (["images/t.csv"], 3), (["parquet"], 0), (captions, 4)):
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
        assert len(images) == (0 if stored.captions else 2 * len(QUERIES) * shown)  # each with its heat map


@pytest.fixture
def products(folder: Path) -> Path:
    """A table of two things: one with two images and titles, and one with an image."""
    rows = [("p1", "a.png", "a red kite"), ("p1", "b.png", "a kite"), ("p2", "c.png", "two dogs")]
    lines = ["sku,image,title", *(",".join(row) for row in rows)]
    Path("images/products.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


THINGS = ["images/products.csv", "--columns.group", "sku", "--columns.caption", "title", "--fields", "image,caption"]


@torch.no_grad()
@pytest.mark.parametrize("output", ["things.npy", "things.parquet"])
@pytest.mark.parametrize("text_weight", [0.5, 0.25])
def test_a_thing_is_the_weighted_mean_of_all_its_images_and_texts(
    products: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], output: str, text_weight: float
) -> None:
    embed(*THINGS, "--text_weight", str(text_weight), "--model", str(tiny_checkpoint), "--output", output)
    stored, model = read_features(Path(output)), load_model(tiny_checkpoint)

    def mean(*inputs: str | Path) -> np.ndarray:
        return model.encode(list(inputs)).double().numpy().mean(axis=0)

    things = {
        "p1": (mean(Path("images/a.png"), Path("images/b.png")), mean("a red kite", "a kite")),
        "p2": (mean(Path("images/c.png")), mean("two dogs")),
    }
    assert stored.keys == list(things)
    assert stored.images == ["a.png", "c.png"]
    for feature, (image, text) in zip(stored.features, things.values(), strict=True):
        mixed = (1 - text_weight) * image + text_weight * text
        assert np.abs(feature - mixed / np.linalg.norm(mixed)).max() < 1e-5
    found = search(capsys, output, "a red kite", "--model", str(tiny_checkpoint))
    assert sorted(name for name, _ in found) == ["p1", "p2"]
    assert Path("search.html").read_text(encoding="utf-8").count("<img src") == 4  # each with its heat map


def test_without_a_group_each_image_with_its_captions_is_a_thing(folder: Path, tiny_checkpoint: Path) -> None:
    embed("images/t.csv", "--fields", "image,caption", "--model", str(tiny_checkpoint), "--output", "things.npy")
    stored = read_features(Path("things.npy"))
    assert (stored.keys, stored.images) == (["a.png", "b.png", "c.png"], [])


def test_a_thing_is_of_the_images_that_can_be_read(
    products: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*THINGS, "--model", str(tiny_checkpoint), "--output", "things.npy"]
    Path("images/a.png").write_text("junk")
    Path("images/c.png").write_text("junk")
    with pytest.raises(InputError, match=r"row 2: cannot read .*--on_error skip"):
        embed(*words)
    embed(*words, "--on_error", "skip")
    stored = read_features(Path("things.npy"))
    assert (stored.keys, stored.images) == (["p1"], ["b.png"])
    assert "1 thing left out" in capsys.readouterr().err
    assert len(Path("things.npy.skipped.txt").read_text().splitlines()) == 2


def test_an_image_that_changed_after_an_interruption_is_encoded_again(
    products: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*THINGS, "--model", str(tiny_checkpoint), "--output"]

    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("datamodules.commands.embed.write_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(*words, "things.npy")
    assert list(Path(".things.npy.parts").glob("*.npz"))
    Image.new("RGB", (30, 20), "red").save("images/c.png")
    embed(*words, "things.npy")
    embed(*words, "anew.npy")
    resumed, anew = (read_features(Path(name)).features for name in ("things.npy", "anew.npy"))
    assert np.abs(resumed - anew).max() < 1e-5  # of an image by itself and of a batch


@pytest.fixture
def tuned(folder: Path, tiny_checkpoint: Path) -> dict[str, str]:
    """Copies of the model of which one encoder, or the temperature, was trained on."""
    names = {"image": "visual.proj", "text": "token_embedding.weight", "scale": "logit_scale"}
    return {part: changed_copy(tiny_checkpoint, f"{part}.ckpt", name) for part, name in names.items()}


@pytest.mark.parametrize(
    ("words", "valid"),
    [
        (["images"], {"text", "scale"}),
        (["images/t.csv", "--fields", "caption"], {"image", "scale"}),
        (["images/t.csv", "--fields", "image,caption"], {"scale"}),
    ],
)
def test_vectors_stay_valid_until_their_own_encoder_changes(
    tuned: dict[str, str], tiny_checkpoint: Path, words: list[str], valid: set[str]
) -> None:
    embed(*words, "--model", str(tiny_checkpoint), "--output", "features.parquet")
    for part, model in tuned.items():
        command = ["search", "features.parquet", "kite", "--model", model]
        if part in valid:
            run_command(command)
        else:
            with pytest.raises(InputError, match="features of another model"):
                run_command(command)


def test_a_folders_index_stays_while_the_image_encoder_is_the_same(
    tuned: dict[str, str], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(model: str) -> str:
        run_command(["search", "images", "kite", "--model", model, "--num_workers", "0"])
        return capsys.readouterr().err

    assert "3 of 3 images are new" in told(str(tiny_checkpoint))
    assert "new" not in told(tuned["text"])
    assert "everything is encoded again" in told(tuned["image"])


def test_features_of_another_model_and_other_files_are_refused(tuned: dict[str, str], tiny_checkpoint: Path) -> None:
    for output in ("features.npy", "features.parquet"):
        embed("images", "--model", str(tiny_checkpoint), "--output", output)
        with pytest.raises(InputError, match=f"^{output}: features of another model .*{tiny_checkpoint.name}"):
            run_command(["search", output, "kite", "--model", tuned["image"]])
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
