"""A recipe's choices are options as if they had been typed."""

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from PIL import Image

from lit_clip import module
from lit_clip.cli.main import main
from lit_clip.cli.recipes import _world, given_settings
from lit_clip.recipes import Run
from tests.conftest import TINY_YAML
from tests.helpers.fixtures import forget_modules_of

RECIPE = """
from pathlib import Path
from lit_clip.recipes import Choice, Recipe

class Own(Recipe):
    def __init__(self, rate: float = 0.5) -> None:
        self.rate = rate

    def choose(self, run):
        with Path("asked.txt").open("a") as file:
            file.write(f"{run.facts.pairs} pairs\\n")
        loss = {"class_path": "lit_clip.losses.Contrastive", "init_args": {"duplicates": "positives"}}
        return [
            Choice("model.optimizer.lr", self.rate, "tried"),
            Choice("model.loss", loss),
            Choice("data.global_batch_size", min(run.facts.pairs, 6), "few", ("data.batch_size",)),
            Choice("trainer.callbacks.EMA.decay", 0.75, "short"),
            Choice("trainer.max_epochs", 1),
            Choice("trainer.max_time", "00:01:00:00"),
        ]

class Measuring(Own):
    measures = True

class OfModel(Own):
    def choose(self, run):
        return [Choice("model.optimizer.lr", 1 / run.module.model.config.embed_dim)]
"""
CONFIG = f"""
recipe: {{class_path: own_recipe.Own, init_args: {{rate: 0.25}}}}
seed_everything: 3
model:
  architecture: {TINY_YAML}
  optimizer: {{weight_decay: 0.125}} # its class's other defaults are not given
  lr_scheduler: {{warmup_steps: 0}}
data:
  class_path: datamodules.Captions
  init_args: {{train: captions.csv, val: captions.csv, num_workers: 0}}
trainer:
  accelerator: cpu
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: runs}}}}
  enable_progress_bar: false
  callbacks: [callbacks.EMA]
"""
Fit = Callable[..., str]


@pytest.fixture
def fit(
    caption_table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Fit]:
    """Run ``lit-clip fit`` in a folder with a recipe, a configuration and a table; return what it prints."""
    (tmp_path / "own_recipe.py").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(CONFIG, encoding="utf-8")
    rows = list(csv.reader(caption_table.open(encoding="utf-8")))
    rows = [rows[0], *([str(caption_table.parent / row[0]), *row[1:]] for row in rows[1:9])]
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "own_recipe", raising=False)

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["lit-clip", "fit", "--config", "run.yaml", *words])
        caplog.clear()
        status: Any = 0
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code or 0
        printed = capfd.readouterr()
        assert status == code, printed.err
        return printed.out + printed.err + caplog.text

    yield run
    forget_modules_of(tmp_path)  # examples/ has an own_recipe.py too


def settings_of(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("fit_config.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def test_what_a_recipe_chooses_is_shown_used_and_saved(fit: Fit, tmp_path: Path) -> None:
    printed = fit()
    assert "Recipe: Own(rate=0.25)" in printed
    assert "Contrastive: duplicates positives" in " ".join(printed.split())
    saved = settings_of(tmp_path)
    assert saved["recipe"] is None  # a resumed run keeps what was chosen
    optimizer = saved["model"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (0.25, 0.125)
    assert saved["model"]["loss"]["init_args"]["duplicates"] == "positives"
    assert saved["data"]["init_args"]["global_batch_size"] == 6
    ema, _ = saved["trainer"]["callbacks"]
    assert ema["init_args"]["decay"] == 0.75
    assert (saved["trainer"]["max_epochs"], saved["seed_everything"]) == (1, 3)
    assert saved["trainer"]["max_time"] == "00:01:00:00"  # a text, without quotes


def proofs_of(folder: Path) -> list[dict[str, Any]]:
    named = [each for each in settings_of(folder)["trainer"]["callbacks"] if each["class_path"].endswith(".Proof")]
    return [each["init_args"] for each in named]


def test_a_run_with_a_recipe_ends_with_what_training_changed(fit: Fit, tmp_path: Path) -> None:
    printed = fit()
    assert "callbacks.Proof" in printed
    assert printed.index("checkpoint: ") < printed.index("Before and after")
    assert len(proofs_of(tmp_path)) == 1
    assert list(tmp_path.rglob("report.html"))


def test_what_should_be_no_worse_is_typed_in_a_short_form(fit: Fit, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kind").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "kind/1.png")
    printed = fit("--rest", "one", "--rest=two")
    assert "one zero-shot top-1" in printed
    assert "two zero-shot top-1" in printed
    assert settings_of(tmp_path)["rest"] == ["one", "two"]  # a resumed run measures them, too


@pytest.mark.slow
def test_the_comparison_has_options_as_other_callbacks_and_can_be_taken_out(fit: Fit, tmp_path: Path) -> None:
    fit("--trainer.callbacks.Proof.examples", "3", "--trainer.callbacks.EMA.decay", "0.5")
    assert proofs_of(tmp_path) == [{"rest": None, "examples": 3}]
    shutil.rmtree(tmp_path / "runs")
    assert "Before and after" not in fit("--trainer.callbacks-=Proof")
    assert proofs_of(tmp_path) == []
    shutil.rmtree(tmp_path / "runs")
    fit("--trainer.callbacks+=callbacks.Proof")
    assert len(proofs_of(tmp_path)) == 1


def test_rest_without_a_comparison_is_one_line(fit: Fit) -> None:
    assert "--rest: needs callbacks.Proof" in fit("--recipe", "null", "--rest", "one", code=2)
    assert "Proof.rest: nowhere" in fit("--rest", "nowhere", code=2)


def test_what_is_typed_or_written_is_kept(fit: Fit, tmp_path: Path) -> None:
    typed = ["--model.optimizer.lr", "0.125", "--data.batch_size=2", "--trainer.callbacks.EMA.decay", "0.5"]
    printed = fit(*typed, "--recipe.rate", "0.75")
    assert "Recipe: Own(rate=0.75)" in printed
    assert "global_batch_size" not in printed
    saved = settings_of(tmp_path)
    assert saved["model"]["optimizer"]["init_args"]["lr"] == 0.125
    assert saved["data"]["init_args"]["batch_size"] == 2
    assert saved["data"]["init_args"]["global_batch_size"] is None
    ema, _ = saved["trainer"]["callbacks"]
    assert ema["init_args"]["decay"] == 0.5
    assert saved["trainer"]["max_epochs"] == 1


def test_the_same_command_resumes_its_run(fit: Fit, tmp_path: Path) -> None:
    fit()
    printed = fit("--trainer.max_epochs", "2", "--ckpt_path", "last")
    assert "no complete checkpoint" not in printed
    steps = [int(file.stem.rpartition("step=")[2]) for file in tmp_path.rglob("*.ckpt")]
    assert max(steps) == 2  # one step of six of eight pairs in each epoch


def test_what_was_measured_is_chosen_again_without_asking(fit: Fit, tmp_path: Path) -> None:
    measuring = ["--recipe", "own_recipe.Measuring", "--print_plan"]
    fit(*measuring)
    assert "recipe: measured by an earlier run" in fit(*measuring)
    assert (tmp_path / "asked.txt").read_text(encoding="utf-8") == "8 pairs\n"
    (kept,) = (tmp_path / "cache").rglob("recipes/*.json")
    fit(*measuring, "--trainer.max_steps", "2")  # another command
    assert (tmp_path / "asked.txt").read_text(encoding="utf-8") == "8 pairs\n8 pairs\n"
    kept.write_text("[", encoding="utf-8")
    printed = fit(*measuring, code=2)
    assert str(kept) in printed
    assert "delete it" in printed


def test_only_the_model_of_the_run_is_created(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the recipe and the data creates no model of LitCLIP's defaults beside it."""
    created, create = [], module.create_model
    monkeypatch.setattr(module, "create_model", lambda name, *more: created.append(name) or create(name, *more))
    fit("--print_plan")
    assert len(created) == 1


def test_a_recipe_may_look_at_the_model(fit: Fit) -> None:
    assert "0.0625" in fit("--recipe", "own_recipe.OfModel", "--trainer.max_epochs", "1", "--print_plan")


def test_other_data_than_pairs_are_left_alone(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "own_data.py").write_text(
        "from lightning.pytorch import LightningDataModule\nclass Data(LightningDataModule): ...\n", encoding="utf-8"
    )
    config = yaml.safe_load(CONFIG)
    config["data"] = {"class_path": "own_data.Data"}
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    printed = fit("--trainer.max_epochs", "0", code=2)  # this data module has no loader either
    assert "recipe: Own(rate=0.25) chooses nothing for Data, which opens no pairs" in printed


def test_data_that_open_no_pairs_get_an_end_from_scratch_too(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "own_data.py").write_text(
        "from lightning.pytorch import LightningDataModule\nclass Data(LightningDataModule): ...\n", encoding="utf-8"
    )
    config = yaml.safe_load(CONFIG)
    config |= {"data": {"class_path": "own_data.Data"}, "recipe": "lit_clip.recipes.FromScratch"}
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    printed = fit("--trainer.max_steps", "7", code=2)
    assert "the number of pairs is not known" in " ".join(printed.split())
    assert "max_epochs" not in printed
    assert "max_epochs" in fit(code=2)


@pytest.mark.parametrize(
    ("settings", "environment", "ranks"),
    [
        ({"devices": 3}, {}, 3),
        ({"devices": "2", "num_nodes": 2}, {}, 4),
        ({"devices": [0, 1]}, {}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, {}, 1),
        ({"devices": -1, "accelerator": "cpu"}, {}, 1),
        ({"devices": 1}, {"WORLD_SIZE": "4"}, 4),
    ],
)
def test_batches_are_chosen_for_the_ranks_that_the_trainer_will_have(
    settings: dict[str, Any], environment: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = Namespace(**{"devices": "auto", "num_nodes": 1, "accelerator": "auto", **settings})
    assert _world(Namespace(trainer=trainer)) == ranks
    run = Run({}, lambda: None, lambda: None, world=ranks)
    assert [run.divisible(batch) for batch in (1, 32)] == [ranks, 32 // ranks * ranks]


def test_given_settings_have_the_names_that_are_typed() -> None:
    config = yaml.safe_load(CONFIG)
    config["data"]["init_args"]["seed"] = 4
    config["model"]["freeze"] = {"image": {"unlock_last": 2}}
    config["model"]["optimizer"] = {"class_path": "a.Default", "init_args": {"lr": 1}}
    config["model"]["lr_scheduler"] = {"class_path": "a.Other"}
    config["trainer"]["callbacks"] = [{"class_path": "callbacks.EMA", "init_args": {"decay": 1}}]
    default = {"class_path": "a.Default"}
    given = given_settings(config, {"optimizer": default, "lr_scheduler": default})
    assert given["data.train"] == "captions.csv"
    assert given["data.seed"] == 4
    assert given["model.freeze.image.unlock_last"] == 2
    assert given["model.architecture.text.width"] == 16
    assert given["trainer.callbacks.EMA.decay"] == 1
    assert given["recipe.rate"] == 0.25
    assert not any("init_args" in name for name in given)
    assert given["model.optimizer.lr"] == 1
    assert "model.optimizer.class_path" not in given  # the parser adds it
    assert given["model.lr_scheduler.class_path"] == "a.Other"
