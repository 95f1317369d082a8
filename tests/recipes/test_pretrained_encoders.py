"""Pretrained encoders on one's own pairs: what is measured, and what fits into a time."""

from typing import Any

import pytest
import torch

from datamodules import Captions
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.module import LitCLIP
from lit_clip.recipes import Facts, PretrainedEncoders, Run
from lit_clip.recipes.pretrained_encoders import (
    KINDS,
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
from lit_clip.recipes.speed import Speed, measure
from tests.helpers.coloured_sets import paint
from tests.helpers.towers import WORDS, save_family

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
    assert passes == [40, 20, 3, 10]


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


def test_the_choices_are_settings_of_fit(module_and_data: tuple[LitCLIP, Captions]) -> None:
    module, data = module_and_data
    chosen = {each.option: each.value for each in PretrainedEncoders(20).choose(Run({}, lambda: data, lambda: module))}
    assert (chosen["data.global_batch_size"], chosen["model.optimizer.lr"]) == (15, SENTENCES.rate)
    assert chosen["model.freeze"]["image"] == {"unlock_last": 4}
    assert chosen["trainer.max_steps"] == 78  # 20 times 60 images, six validations
    assert (chosen["trainer.val_check_interval"], chosen["trainer.check_val_every_n_epoch"]) == (13, None)
    assert chosen["trainer.max_time"].startswith("00:00:1")
    assert "data.captions.per_image" not in chosen  # every image has one


@pytest.mark.parametrize(
    ("rows", "given", "together"),
    [
        (["0.png,a man", "0.png,a tall man", "1.png,a dog", "1.png,a wet dog", "2.png,rain", "2.png,snow"], {}, True),
        (["0.png,a man", "1.png,a dog", "2.png,rain", "2.png,rain"], {}, False),  # one row is there twice
        (["0.png,a man", "0.png,a tall man"] * 2, {"model.loss": "Contrastive"}, False),  # refused by such a loss
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
