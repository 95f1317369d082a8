"""``lit-clip mine`` writes the hard negatives of a plain loop, with every option, on one and two ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import Captions, Columns
from datamodules.commands.mine import MiningWindow, hard_negatives
from datamodules.commands.shard import shard
from datamodules.open_source import open_source
from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError

ROWS = [
    ("0.png", ["a red kite", "a kite over the beach"], ""),
    ("1.png", ["two dogs"], "dogs"),
    ("2.png", ["Two  dogs", "animals"], ""),
    ("3.png", ["breakfast"], ""),
    ("0.png", ["a holiday"], ""),  # the first image again
    ("4.png", ["a sleeping dog"], "dogs"),
    ("5.png", ["x"], ""),
]
TRUE = {  # captions that are no negatives of an image, in small letters
    "0.png": {"a red kite", "a kite over the beach", "a holiday"},
    "1.png": {"two dogs", "a sleeping dog"},
    "2.png": {"two dogs", "animals"},
    "3.png": {"breakfast"},
    "4.png": {"two dogs", "a sleeping dog"},
    "5.png": {"x"},
}
EVERY = ["a red kite", "a kite over the beach", "two dogs", "animals", "breakfast", "a holiday", "a sleeping dog", "x"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working directory with ``pairs.jsonl`` and its images."""
    noise = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": image, "caption": captions, "group": group}) for image, captions, group in ROWS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mine(*words: object) -> None:
    run_command(["mine", *map(str, words), "--num_workers", "0", "--accelerator", "cpu"])


def read(path: str = "negatives.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def one_by_one(checkpoint: Path) -> dict[str, list[str]]:
    """All negatives of each image, the most similar first, by cosines in float64, a pair at a time."""
    model, found = load_model(checkpoint).double(), {}
    for image, true in TRUE.items():
        one = model.encode_image(model.preprocess(Image.open(image))[None].double(), normalize=True)[0]
        texts = {text: model.encode_text(model.tokenize(text), normalize=True)[0] for text in EVERY if text not in true}
        found[image] = sorted(texts, key=lambda text: -float(one @ texts[text]))
    return found


def test_negatives_are_those_of_a_plain_loop_and_rows_are_those_of_the_data(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["pairs.jsonl", "--model", tiny_checkpoint, "--columns.group", "group", "--batch_size", 3]
    mine(*options, "--output", "negatives.jsonl", "--num_negatives", 4, "--among", 8, "--skip", 1)
    expected = one_by_one(tiny_checkpoint)
    found = read()
    assert [(row["image"], row["caption"], row.get("group", "")) for row in found] == ROWS
    for row in found:
        assert [text.lower().replace("  ", " ") for text in row["negative"]] == expected[row["image"]][1:5]
    assert not list(folder.glob(".*"))
    assert "negatives.jsonl: 24 hard negatives of 6 images" in capsys.readouterr().err


def test_training_draws_them_and_the_command_says_how(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "there").mkdir()
    options = ["pairs.jsonl", "--model", tiny_checkpoint, "--columns.group", "group"]
    mine(*options, "--output", "there/negatives.jsonl", "--num_negatives", 2)
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--data.columns.negative negative --data.columns.group group --data.columns.root" in told
    columns = Columns(negative="negative", group="group", root=told.split()[-1])
    table = "there/negatives.jsonl"
    data = Captions(table, table, columns, batch_size=7, num_workers=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    negatives = {row["image"]: row["negative"] for row in read(table)}
    assert all(text in negatives[key] for key, text in zip(batch.keys, batch.negatives, strict=True))


def test_a_margin_may_leave_an_image_without_any_and_says_so(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine("pairs.jsonl", "--model", tiny_checkpoint, "--output", "negatives.jsonl", "--margin", 1.9)
    assert all(row["negative"] == [] for row in read())
    assert "0 hard negatives of 6 images; 6 have none" in capsys.readouterr().err
    assert len(open_source("negatives.jsonl", columns=Columns(negative="negative"))) == len(ROWS)


def test_unreadable_images_are_errors_or_left_out(folder: Path, tiny_checkpoint: Path) -> None:
    (folder / "3.png").write_text("junk")
    options = ["pairs.jsonl", "--model", tiny_checkpoint, "--output", "negatives.jsonl"]
    with pytest.raises(InputError, match=r"pairs.jsonl row 4: cannot read image .*--on_error skip"):
        mine(*options)
    mine(*options, "--on_error", "skip")
    assert [row["image"] for row in read()] == [image for image, _, _ in ROWS if image != "3.png"]


def test_images_without_a_file_are_refused(folder: Path, tiny_checkpoint: Path) -> None:
    shard("pairs.jsonl", "shards", shard_size=4, num_workers=0)
    with pytest.raises(InputError, match="^shards: its images are not files, which a table could name"):
        mine("shards", "--model", tiny_checkpoint, "--output", "negatives.jsonl")
    with pytest.raises(InputError, match=r"^--output negatives.csv: must be a .jsonl file"):
        mine("pairs.jsonl", "--model", tiny_checkpoint, "--output", "negatives.csv")


N, M, D = 300, 500, 16


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_loop(images: Any, texts: Any, own: Any, other: Any, window: MiningWindow) -> list[list[int]]:
    """One image and caption at a time, in the order of the definition."""
    found = []
    for image in range(len(images)):
        cosines = [float(np.dot(images[image].astype(np.float64), text)) for text in texts.astype(np.float64)]
        true = own[image] | other[image]
        candidates = [number for number in np.argsort([-cosine for cosine in cosines]).tolist() if number not in true]
        candidates = candidates[: window.among]
        if window.margin is not None:
            least = min(cosines[number] for number in own[image])
            candidates = [number for number in candidates if cosines[number] + window.margin <= least]
        if window.most_similar is not None:
            candidates = [number for number in candidates if cosines[number] <= window.most_similar]
        found.append(candidates[window.skip :][: window.num_negatives])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_negatives": 7, "skip": 4, "among": 11}, marks=pytest.mark.slow),
        pytest.param({"num_negatives": 5, "among": 499, "margin": 0.2}, marks=pytest.mark.slow),
        {"skip": 2, "among": 40, "margin": 0.0, "most_similar": 0.45},
        {"num_negatives": 1000, "among": 2000, "most_similar": -0.3},
    ],
)
def test_negatives_are_those_of_a_plain_loop(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    images, texts = unit(rng.normal(size=(N, D))), unit(rng.normal(size=(M, D)))
    own = [set(rng.choice(M, 1 + image % 3, replace=False).tolist()) for image in range(N)]
    other = [set(rng.choice(M, 20, replace=False).tolist()) if image % 5 == 0 else set() for image in range(N)]
    window = MiningWindow(**options)
    found = [[number for number, _ in each] for each in hard_negatives(images, texts, own, other, window)]
    assert found == by_loop(images, texts, own, other, window)
    assert any(found)


def test_planted_negatives_are_found_and_planted_true_captions_are_not() -> None:
    """Of each image: its caption at a cosine of 0.8, another that is as true at 0.81, and a hard negative at 0.7."""
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(N, 256)))

    def at(cosine: float) -> np.ndarray:
        noise = rng.normal(size=images.shape)
        noise -= (noise * images).sum(axis=1, keepdims=True) * images
        return unit(cosine * images + np.sqrt(1 - cosine**2) * unit(noise))

    texts = np.concatenate([at(0.8), at(0.81), at(0.7)])
    own: list[set[int]] = [{image} for image in range(N)]
    none: list[set[int]] = [set() for _ in range(N)]

    def found(**options: Any) -> list[int]:
        window = MiningWindow(num_negatives=1, **options)
        return [each[0][0] for each in hard_negatives(images, texts, own, none, window)]

    true, planted = [N + image for image in range(N)], [2 * N + image for image in range(N)]
    assert found() == true  # what the options are for
    for options in ({"margin": 0.05}, {"most_similar": 0.75}, {"skip": 1}):
        assert found(**options) == planted, options


def test_options_that_leave_nothing_are_refused() -> None:
    for options, message in [
        ({"num_negatives": 0}, "^--num_negatives 0: must be at least 1"),
        ({"skip": -1}, "^--skip -1: must be at least 0"),
        ({"skip": 8, "among": 10}, "^--among 10: must be at least --skip and --num_negatives together"),
        ({"margin": -0.1}, "^--margin -0.1: must be at least 0"),
    ]:
        with pytest.raises(InputError, match=message):
            MiningWindow(**options)
