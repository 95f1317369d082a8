"""The recipes that follow the number of pairs: what they choose at each size, and what a run by them learns."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from datamodules import BatchOptions, Captions
from lit_clip.recipes import Choice, Facts, FineTuning, FromScratch, Recipe, Run
from lit_clip.recipes.sizes import FINE_TUNING, FROM_SCRATCH, sizes
from tests.helpers.small_sets import data_for, make_module, write_table

PAIRS = (1, 50, 115, 500, 3_000, 30_000, 3_000_000)
RECIPES = (FineTuning(), FromScratch())


class Data:
    """Opens pairs, and takes their number per step, as ours do."""

    sources = None

    def __init__(self, global_batch_size: int | None = None) -> None:
        self.train_batch_size = global_batch_size


class OwnData:
    """Opens pairs, and takes another option."""

    sources = None

    def __init__(self, batch_size: int = 64) -> None:
        self.train_batch_size = batch_size


def a_run(
    facts: Facts,
    given: Mapping[str, Any] | None = None,
    norm: bool = False,
    logit_bias: float | None = None,
    data: Any = None,
) -> Run:
    """Return a run of a model with or without BatchNorm and bias."""
    model: Any = nn.Sequential(nn.BatchNorm2d(3) if norm else nn.LayerNorm(3))
    module = SimpleNamespace(model=model)
    model.logit_bias = logit_bias
    run = Run(given or {}, lambda: data or Data(), lambda: module)
    run.facts = facts
    return run


def chosen(recipe: Recipe, pairs: int, given: Mapping[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Return the choices for pairs that all have other images and captions, by the last part of their names."""
    run = a_run(Facts(pairs, pairs, pairs), given, **model)
    return {each.option.rpartition(".")[2]: each.value for each in recipe.choices(run)}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_steps_of_a_run_are_counted_with_the_batches_of_all_ranks(recipe: Recipe, world: int) -> None:
    """A rank's batch of 10 is one of 10 pairs for each rank; warm-up is a tenth of what the run has."""
    pairs, epochs = 960, 5
    for given, batch in (("data.batch_size", 10 * world), ("data.global_batch_size", 10)):
        run = a_run(Facts(pairs, pairs, pairs), {given: 10, "trainer.max_epochs": epochs})
        run.world = world
        found = {each.option: each for each in recipe.choices(run)}
        assert found["model.lr_scheduler.warmup_steps"].value == round(0.1 * epochs * (pairs // batch))
    run = a_run(Facts(pairs, pairs, pairs), {"trainer.max_epochs": epochs}, data=OwnData(10))
    run.world = world
    found = {each.option: each for each in recipe.choices(run)}
    assert found["model.lr_scheduler.warmup_steps"].value == round(0.1 * epochs * (pairs // (10 * world)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_steps_of_a_run_are_those_of_batches_without_duplicates(recipe: Recipe, tmp_path: Path) -> None:
    """Of 96 rows 60 have one caption, and batches of 4 have at most one of them each: 12 in place of 24."""
    rows = [f"{row}.png,{'the same' if row < 60 else row}" for row in range(96)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    options = {"batch_size": 4, "num_workers": 0, "batches": BatchOptions(duplicates="avoided")}
    data = Captions(str(tmp_path / "captions.csv"), str(tmp_path / "captions.csv"), **options)  # pyright: ignore[reportArgumentType]
    data.on_error = "skip"  # there are no images
    data.train_source, data.val_source = data.opened_sources(True)
    run = a_run(Facts(96, 96, 37), {"data.batch_size": 4, "trainer.max_epochs": 50}, data=data)
    found = {each.option: each for each in recipe.choices(run)}
    assert found["model.lr_scheduler.warmup_steps"].value == 60


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs", "rate"),
    [
        (1, 1, 150, 3e-4),
        (50, 32, 150, 3e-4),
        (115, 32, 50, 3e-4),
        (500, 64, 22, 3e-4),
        (3_000, 128, 10, 3e-4),
        (30_000, 256, 5, 1e-4),
        (3_000_000, 256, 1, 1e-5),
    ],
)
def test_fine_tuning_follows_the_number_of_pairs(pairs: int, batch: int, epochs: int, rate: float) -> None:
    found = chosen(FineTuning(), pairs)
    assert (found["global_batch_size"], found["max_epochs"], found["lr"]) == (batch, epochs, rate)


@pytest.mark.parametrize("rows", [FINE_TUNING, FROM_SCRATCH])
def test_every_size_gets_a_run_that_can_learn(rows: Any) -> None:
    for pairs in (*PAIRS, *range(1, 3_000), 9_999, 10_000, 99_999, 100_000, 10**9):
        found = sizes(pairs, rows)
        per_epoch = pairs // found.batch  # as the sampler: an incomplete batch is left out
        assert 1 <= found.batch <= pairs
        assert found.steps == found.epochs * per_epoch, pairs
        assert found.steps - found.warmup >= 100, f"{pairs} pairs: the plan warns below it"
        assert found.epochs % found.every == 0, f"{pairs} pairs: the last epoch is not validated"
        assert found.epochs // found.every < 20
        assert 1e-6 < found.rate <= 1e-3


@pytest.mark.parametrize("rows", [FINE_TUNING, FROM_SCRATCH])
def test_more_pairs_never_mean_a_smaller_batch_a_higher_rate_or_fewer_steps_by_half(rows: Any) -> None:
    found = [sizes(pairs, rows) for pairs in PAIRS]
    for fewer, more in zip(found, found[1:], strict=False):
        assert fewer.batch <= more.batch
        assert fewer.epochs >= more.epochs
        assert fewer.rate >= more.rate
        assert 2 * more.steps > fewer.steps


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_given_is_not_chosen_and_the_others_follow_it(recipe: Recipe) -> None:
    found = chosen(recipe, 500, {"data.batch_size": 100, "trainer.max_epochs": 40, "model.optimizer.weight_decay": 0})
    assert found.keys() == {"lr", "warmup_steps"}
    assert found["warmup_steps"] == 20  # a tenth of 40 epochs of five steps
    assert chosen(recipe, 500, {"trainer.max_steps": 60}).keys() == {"global_batch_size", "lr", "warmup_steps"}
    assert chosen(recipe, 500, {"trainer.max_steps": 60})["warmup_steps"] == 6
    unlimited = chosen(recipe, 500, {"trainer.max_steps": -1, "trainer.max_epochs": -1})
    assert "max_epochs" not in unlimited


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({"model.optimizer": "timm.optim.Lion"}, "lr"),
        ({"model.optimizer.class_path": "timm.optim.Lion"}, "lr"),
        ({"model.lr_scheduler": "torch.optim.lr_scheduler.StepLR"}, "warmup_steps"),
        ({"model.lr_scheduler.class_path": "torch.optim.lr_scheduler.StepLR"}, "warmup_steps"),
    ],
)
def test_settings_of_another_optimiser_or_schedule_are_not_chosen(given: dict[str, str], left_out: str) -> None:
    everything = chosen(FineTuning(), 115)
    assert everything.keys() - chosen(FineTuning(), 115, given).keys() == {left_out}


@pytest.mark.parametrize("recipe", RECIPES)
def test_repeated_captions_or_images_are_positives_unless_a_loss_is_given(recipe: Recipe) -> None:
    def losses(facts: Facts, given: Mapping[str, Any] | None = None, **model: Any) -> list[Any]:
        return [each.value for each in recipe.choices(a_run(facts, given, **model)) if each.option == "model.loss"]

    positives = {"class_path": "lit_clip.losses.Contrastive", "init_args": {"duplicates": "positives"}}
    assert losses(Facts(115, 115, 10)) == [positives]
    assert losses(Facts(500, 100, 500)) == [positives]
    assert losses(Facts(115, 115, 115)) == []
    assert losses(Facts(115, 115, 10), {"model.loss": "lit_clip.losses.Sigmoid"}) == []


def test_a_siglip_keeps_its_loss_and_batch_norm_its_statistics() -> None:
    siglip = FineTuning().choices(a_run(Facts(115, 115, 10), logit_bias=-10.0))
    assert "model.loss" not in {each.option for each in siglip}
    assert chosen(FineTuning(), 115, norm=True)["batch_norm"] is True
    assert "batch_norm" not in chosen(FineTuning(), 115)
    assert "batch_norm" not in chosen(FineTuning(), 115, {"model.freeze.batch_norm": False}, norm=True)
    assert "batch_norm" not in chosen(FromScratch(), 115, norm=True)


def test_from_scratch_fine_tunes_where_pretrained_weights_are_given() -> None:
    given = {"model.pretrained": "last.ckpt"}
    assert chosen(FromScratch(), 3_000, given) == chosen(FineTuning(), 3_000, given)
    assert chosen(FromScratch(), 3_000) != chosen(FineTuning(), 3_000)
    assert chosen(FromScratch(), 3_000, {"model.pretrained": None}) == chosen(FromScratch(), 3_000)


@pytest.mark.parametrize("recipe", RECIPES)
def test_data_of_ones_own_keep_their_batch_and_the_others_follow_it(recipe: Recipe) -> None:
    found = chosen(recipe, 640, {"data": "my_data.Prompts", "model": "my_clip.Cautious"}, data=OwnData(320))
    assert "global_batch_size" not in found
    assert found["max_epochs"] >= 75  # of two steps
    assert {"lr", "warmup_steps"} <= found.keys(), "a class that is named sets none of its options"


@pytest.mark.parametrize("recipe", RECIPES)
def test_choices_can_be_typed(recipe: Recipe) -> None:
    for each in recipe.choose(a_run(Facts(115, 115, 10), norm=True)):
        assert json.loads(json.dumps(each.value)) == each.value


# What a recipe may look at, and which of its choices count.


class Two(Recipe):
    """Chooses a rate, and a batch by the data."""

    def choose(self, run: Run) -> list[Choice]:
        return [
            Choice("model.optimizer.lr", 1e-3),
            Choice("data.global_batch_size", run.facts.pairs, unless=("data.batch_size",)),
        ]


def run_of(folder: Path, **given: Any) -> Run:
    module = make_module()
    data = data_for(module, write_table(folder))
    data.train_source, data.val_source = data.sources(True)
    return Run({name.replace("__", "."): value for name, value in given.items()}, lambda: data, lambda: module)


def test_facts_count_distinct_images_and_captions(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows=6)
    rows = table.read_text(encoding="utf-8").splitlines()
    again = f"{rows[1].partition(',')[0]},another caption of the first image"
    table.write_text("\n".join([*rows, again, rows[1]]), encoding="utf-8")
    module = make_module()
    data = data_for(module, table)
    data.train_source, data.val_source = data.sources(True)
    facts = Run({}, lambda: data, lambda: module).facts
    assert (facts.pairs, facts.images, facts.captions, facts.validation) == (8, 6, 7, 8)
    data.captions = dataclasses.replace(data.captions, per_image="one")
    data.train_source, data.val_source = data.opened_sources(True)
    facts = Run({}, lambda: data, lambda: module).facts
    assert (facts.pairs, facts.images) == (6, 6)


def test_images_whose_captions_come_together_are_counted_and_their_captions_are_positives(tmp_path: Path) -> None:
    table = tmp_path / "captions.jsonl"
    write_table(tmp_path, rows=6)
    rows = [{"image": f"{row}.png", "captions": [f"one {row}", f"another {row}"]} for row in range(6)]
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    module = make_module()
    data = data_for(module, table)
    data.captions = dataclasses.replace(data.captions, per_image="together")
    data.train_source, data.val_source = data.opened_sources(True)
    run = Run({"data.captions.per_image": "together"}, lambda: data, lambda: module)
    assert run.facts[:3] == (6, 6, 12)
    chosen = {each.option: each.value for each in FineTuning().choices(run)}
    assert chosen["model.loss"]["init_args"] == {"duplicates": "positives"}


def test_the_digest_of_the_facts_is_that_of_the_pairs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run, same = run_of(tmp_path / "a"), run_of(tmp_path / "a")
    assert run.facts.digest == same.facts.digest
    table = tmp_path / "a/captions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("number 0", "number zero"), encoding="utf-8")
    other = data_for(make_module(), table)
    other.train_source, other.val_source = other.sources(True)
    assert Run({}, lambda: other, make_module).facts.digest != run.facts.digest


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, ["model.optimizer.lr", "data.global_batch_size"]),
        ({"model__optimizer__lr": 1}, ["data.global_batch_size"]),
        ({"model__optimizer": "torch.optim.SGD"}, ["data.global_batch_size"]),
        (
            {"model__optimizer__weight_decay": 1, "model__optimizer__lr_decay": 1},
            ["model.optimizer.lr", "data.global_batch_size"],
        ),
        ({"data__batch_size": 4}, ["model.optimizer.lr"]),
        ({"data__batch_size_of_another": 4}, ["model.optimizer.lr", "data.global_batch_size"]),
    ],
)
def test_what_is_given_is_not_chosen(given: dict[str, Any], chosen: list[str], tmp_path: Path) -> None:
    assert [each.option for each in Two().choices(run_of(tmp_path, **given))] == chosen
