"""The recipes that follow the number of pairs: what they choose at each size, and what a run by them learns."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from datamodules import BatchOptions, Captions
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.module import LitCLIP
from lit_clip.recipes import Choice, Facts, FineTuning, FromScratch, PretrainedEncoders, Recipe, Run, speed
from lit_clip.recipes.pretrained_encoders import (
    DEEP,
    KINDS,
    LEAST,
    LEVELS,
    SENTENCES,
    VALIDATIONS,
    Work,
    plan_for,
    rule_for,
    together_for,
    too_short,
    work_for,
)
from lit_clip.recipes.sizes import FINE_TUNING, FROM_SCRATCH, sizes
from lit_clip.recipes.speed import Speed, measure
from tests.helpers.coloured_sets import paint
from tests.helpers.small_sets import data_for, make_module, write_table
from tests.helpers.towers import WORDS, save_family

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


# Pretrained encoders on one's own pairs: what is measured, and what fits into a time.


SPEEDS = [
    (freeze, Speed(0.01, 0.001, *step))
    for freeze, step in zip(LEVELS, ((0.006, 0.003), (0.004, 0.003), (0.0002, 0.0001)), strict=True)
]
PHOTOGRAPHS = Facts(pairs=30_000, images=6_000, captions=28_000, validation=3_000)
CLOTHES = Facts(3_000, 3_000, 10, 300)


def work_of(facts: Facts) -> Work:
    """Return what a run trains on, with all captions of an image together."""
    return work_for(facts, rule_for(facts), facts.pairs > facts.images)


def seconds_of(facts: Facts, plan: Any) -> float:
    """Add up a plan's time by hand."""
    speed, work = next(speed for freeze, speed in SPEEDS if freeze == plan.freeze), work_of(facts)
    validated = facts.validation * facts.images / facts.pairs
    images = facts.images * max(1, plan.versions) + validated
    trained = plan.steps * work.batch * (speed.image_step + work.captions * speed.text_step)
    forward = validated * speed.image_step + facts.validation * speed.text_step
    learned = facts.images * max(1, min(plan.versions, 4, 8_000 // facts.images))
    heads = 20 + (learned * speed.image_step + facts.pairs * speed.text_step) / 3
    validations = (VALIDATIONS + 2) * (2.0 + forward / 3) + heads
    return images * speed.image + facts.captions * speed.text + trained + validations


@pytest.mark.parametrize("minutes", [3, 5, 8, 10, 20, 60])
@pytest.mark.parametrize("facts", [PHOTOGRAPHS, Facts(115, 115, 90, 11), CLOTHES])
def test_a_plan_fits_into_its_time(minutes: int, facts: Facts) -> None:
    plan = plan_for(facts, work_of(facts), SPEEDS, 60 * minutes)
    assert seconds_of(facts, plan) <= 60 * minutes
    assert plan.encoding + plan.training == pytest.approx(seconds_of(facts, plan))


def test_more_time_is_used_first_for_blocks_and_then_for_steps_and_versions() -> None:
    plans = [plan_for(PHOTOGRAPHS, work_of(PHOTOGRAPHS), SPEEDS, 60 * minutes) for minutes in (5, 6, 10, 60)]
    assert [LEVELS.index(plan.freeze) for plan in plans] == [2, 1, 0, 0]
    assert plans[2].steps < plans[3].steps == work_of(PHOTOGRAPHS).steps
    assert plans[3].versions == 8


def test_names_train_fewer_blocks_rather_than_see_an_image_less_than_three_times() -> None:
    """Of 3,068 clothes in 5 minutes of one core, 2 blocks named more in 6 passes than 4 blocks in one."""
    plans = [plan_for(CLOTHES, work_of(CLOTHES), SPEEDS, seconds) for seconds in (132, 145, 300)]
    assert [LEVELS.index(plan.freeze) for plan in plans] == [2, 1, 0]
    assert all(plan.steps * work_of(CLOTHES).batch >= 3 * CLOTHES.images for plan in plans)


def test_of_names_of_kinds_more_blocks_are_trained_only_where_all_steps_fit() -> None:
    few, speeds = Facts(115, 115, 10, 11), [(DEEP, Speed(0.01, 0.001, 0.014, 0.003)), *SPEEDS]
    plans = {minutes: plan_for(few, work_of(few), speeds, 60 * minutes) for minutes in (2, 5, 10)}
    assert [plan.freeze for plan in plans.values()] == [LEVELS[0], DEEP, DEEP]
    assert plans[2].steps >= LEAST
    assert plans[5].steps == plans[10].steps == work_of(few).steps


@pytest.mark.parametrize("facts", [PHOTOGRAPHS, Facts(60_000, 12_000, 55_000, 300), Facts(50_000, 50_000, 10, 300)])
def test_most_of_the_time_is_used_until_the_rule_has_what_it_wants(facts: Facts) -> None:
    work, wanted = work_of(facts), 0
    for minutes in range(5, 60):
        plan = plan_for(facts, work, SPEEDS, 60 * minutes)
        if plan.steps < work.steps:
            assert plan.encoding + plan.training > 0.9 * 60 * minutes
            wanted += 1
    assert wanted


def test_small_data_are_seen_often_and_large_data_a_few_times() -> None:
    seen = {facts: work_of(facts) for facts in (Facts(115, 115, 10), CLOTHES, Facts(10**6, 10**6, 99), PHOTOGRAPHS)}
    passes = [round(work.steps * work.batch / work.samples) for work in seen.values()]
    assert passes == [80, 20, 3, 10]


def test_captions_that_many_images_share_are_names_of_kinds() -> None:
    assert rule_for(CLOTHES) is KINDS
    assert rule_for(PHOTOGRAPHS) is SENTENCES
    assert rule_for(Facts(1_000, 1_000, 900)) is SENTENCES
    assert work_of(PHOTOGRAPHS)[:3] == (6_000, 5.0, SENTENCES.batch)
    assert work_of(Facts(100, 20, 100)).batch == 5  # of four images and more


def test_an_image_has_no_more_versions_than_it_is_seen() -> None:
    large = Facts(300_000, 300_000, 3_000, 0)
    assert plan_for(large, work_of(large), SPEEDS, 1e9).versions == 3
    assert plan_for(large, work_of(large), SPEEDS, 1e9, augmented=False).versions == 0


def test_a_time_that_is_too_short_is_refused_with_one_that_is_long_enough() -> None:
    plan = plan_for(PHOTOGRAPHS, work_of(PHOTOGRAPHS), SPEEDS, 30)
    assert not plan.fits
    used = 40.0
    message = too_short(1, used, plan, PHOTOGRAPHS)
    assert message.startswith("recipe.minutes: 0.7 of 1 are used by the start, and 6,000 images")
    enough = int(message.partition("give ")[2].partition(",")[0])

    def is_accepted(minutes: int) -> bool:
        left = 60 * minutes - used
        smallest = plan_for(PHOTOGRAPHS, work_of(PHOTOGRAPHS), SPEEDS, 0.9 * left)
        return smallest.encoding + smallest.training <= left

    assert is_accepted(enough)
    assert not is_accepted(enough - 1)
    with pytest.raises(InputError, match="recipe.minutes: 0 must be above 0"):
        PretrainedEncoders(0)


@pytest.fixture(scope="module")
def module_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[LitCLIP, Captions]:
    folder = tmp_path_factory.mktemp("towers")
    text = HuggingFaceTextConfig(str(save_family("bert", folder / "bert")), context_length=16)
    torch.manual_seed(0)
    module = LitCLIP(CLIPConfig(16, TimmConfig("test_efficientnet", image_size=32), text))
    table, rows = folder / "captions.csv", ["image,caption"]
    for number in range(60):
        paint(folder / f"{number}.png", number)
        longer = " ".join(WORDS[: number % 5])
        rows.append(f"{number}.png,{WORDS[number % 20]} {WORDS[number // 20]} {WORDS[number % 7]} {longer}")
    table.write_text("\n".join(rows), encoding="utf-8")
    data = Captions(str(table), str(table), num_workers=0)
    data.preprocessing, data.tokenize = module.preprocessing, module.tokenize
    data.train_source, data.val_source = data.sources(True)
    return module, data


def test_speeds_are_measured_for_trainable_blocks_and_heads(module_and_data: tuple[LitCLIP, Captions]) -> None:
    module, data = module_and_data
    speeds = [measure(module, data, "32-true", Freeze(UnlockLast(n), UnlockLast(n)), augmented=True) for n in (0, 1)]
    assert all(value > 0 for speed in speeds for value in speed)
    with pytest.raises(InputError, match="recipe: the image encoder has no frozen layers to store"):
        measure(module, data, "32-true", Freeze(None, UnlockLast(0)), augmented=True)


def test_a_busy_moment_changes_no_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, clock = iter([9.0, 2.0, 2.0, *[0.02] * 100]), [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call() -> None:
        clock[0] += next(seconds)

    assert speed._timed(call)[1] == pytest.approx(0.02)
    assert speed._timed(lambda: None)[1] == 0  # shorter than the clock can tell: it ends


def test_the_choices_are_settings_of_fit(module_and_data: tuple[LitCLIP, Captions]) -> None:
    module, data = module_and_data
    chosen = {each.option: each.value for each in PretrainedEncoders(20).choose(Run({}, lambda: data, lambda: module))}
    assert (chosen["data.global_batch_size"], chosen["model.optimizer.lr"]) == (15, SENTENCES.rate)
    assert chosen["model.freeze"]["image"] == {"unlock_last": 4}
    assert chosen["trainer.max_steps"] == 78  # 20 times 60 images, six validations
    assert (chosen["trainer.val_check_interval"], chosen["trainer.check_val_every_n_epoch"]) == (13, None)
    assert chosen["trainer.max_time"].startswith("00:00:1")
    assert "data.captions.per_image" not in chosen  # every image has one


def test_another_optimiser_or_schedule_keeps_its_own_settings(module_and_data: tuple[LitCLIP, Captions]) -> None:
    module, data = module_and_data
    given = {"model.optimizer.class_path": "torch.optim.SGD", "model.lr_scheduler.class_path": "my_schedules.Mine"}
    chosen = {each.option for each in PretrainedEncoders(20).choices(Run(given, lambda: data, lambda: module))}
    assert "trainer.max_steps" in chosen
    assert not chosen & {"model.optimizer.lr", "model.lr_scheduler.warmup_steps"}


@pytest.mark.parametrize(
    ("rows", "given", "together"),
    [
        (["0.png,a man", "0.png,a tall man", "1.png,a dog", "1.png,a wet dog", "2.png,rain", "2.png,snow"], {}, True),
        (["0.png,a man", "1.png,a dog", "2.png,rain", "2.png,rain"], {}, False),  # one row is there twice
        (["0.png,a man", "0.png,a tall man"] * 2, {"model.loss": "Contrastive"}, False),  # refused by such a loss
        (["0.png,a man", "0.png,a tall man"] * 2, {"data.images.per_thing": "together"}, False),  # it has one caption
        (["0.png,a man", "0.png,a tall man"] * 2, {"data.images.per_thing": "all"}, True),
    ],
)
def test_captions_come_together_where_images_have_several_and_nothing_given_refuses_it(
    rows: list[str], given: dict[str, Any], together: bool, tmp_path: Any
) -> None:
    for number in range(3):
        paint(tmp_path / f"{number}.png", number)
    table = tmp_path / "captions.csv"
    table.write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    data = Captions(str(table), str(table), num_workers=0)
    data.train_source, data.val_source = data.sources(True)
    assert together_for(Run(given, lambda: data, lambda: None)) is together
