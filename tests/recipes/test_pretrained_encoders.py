"""Pretrained encoders on one's own pairs: what is tried on the heads, what is measured, and what fits into a time."""

from typing import Any

import pytest
import torch

from datamodules import Captions
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.module import LitCLIP
from lit_clip.recipes import Facts, PretrainedEncoders, Run
from lit_clip.recipes.head_search import (
    Sample,
    Speed,
    Trial,
    _head_features,
    _recall,
    gentlest,
    measure,
    sample_of,
    try_heads,
)
from lit_clip.recipes.pretrained_encoders import LEVELS, plan_for, too_short
from tests.helpers.coloured_sets import paint
from tests.helpers.towers import WORDS, save_family

SPEEDS = [(freeze, Speed(0.01, 0.001, step)) for freeze, step in zip(LEVELS, (0.003, 0.002, 0.0001), strict=True)]
PHOTOGRAPHS = Facts(pairs=30_000, images=6_000, captions=28_000, validation=3_000)


def seconds_of(facts: Facts, plan: Any) -> float:
    """Add up a plan's time by hand."""
    speed = next(speed for freeze, speed in SPEEDS if freeze == plan.freeze)
    images = facts.images * max(1, plan.versions) + facts.validation * facts.images / facts.pairs
    return images * speed.image + facts.captions * speed.text + plan.epochs * (facts.pairs * speed.step + 2.0)


@pytest.mark.parametrize("minutes", [3, 5, 8, 10, 20, 60])
@pytest.mark.parametrize("facts", [PHOTOGRAPHS, Facts(115, 115, 90, 11), Facts(3_000, 3_000, 10, 300)])
def test_a_plan_fits_into_its_time(minutes: int, facts: Facts) -> None:
    plan = plan_for(facts, SPEEDS, 60 * minutes)
    assert seconds_of(facts, plan) <= 60 * minutes
    assert plan.encoding + plan.training == pytest.approx(seconds_of(facts, plan))


def test_more_time_is_used_first_for_blocks_and_then_for_epochs_and_versions() -> None:
    plans = [plan_for(PHOTOGRAPHS, SPEEDS, 60 * minutes) for minutes in (2, 3, 10, 60)]
    assert [LEVELS.index(plan.freeze) for plan in plans] == [2, 1, 0, 0]
    assert [plan.versions for plan in plans] == sorted(plan.versions for plan in plans)
    assert plans[-1].versions == 8


@pytest.mark.parametrize("seconds", [8, 13, 20, 30])
def test_a_time_too_short_for_a_third_of_the_epochs_is_used_for_as_many_as_fit(seconds: int) -> None:
    facts, level = Facts(360, 360, 90, 36), SPEEDS[-1:]
    plan = plan_for(facts, level, seconds)
    took = [seconds_of(facts, plan._replace(epochs=epochs)) for epochs in range(1, 14)]
    assert plan.versions == 1
    assert plan.epochs == sum(each <= seconds for each in took) < 13


def test_small_data_are_seen_often_and_large_data_not_more_than_three_times() -> None:
    ample = 1e6
    assert plan_for(Facts(115, 115, 115, 10), SPEEDS, ample).epochs == 40
    assert plan_for(PHOTOGRAPHS, SPEEDS, ample).epochs == 3
    assert plan_for(Facts(3_000, 3_000, 3_000, 10), SPEEDS, ample).epochs == 20


def test_an_image_has_no_more_versions_than_it_is_seen() -> None:
    large = Facts(300_000, 300_000, 300_000, 0)
    assert plan_for(large, SPEEDS, 1e9).versions == 3
    assert plan_for(large, SPEEDS, 1e9, augmented=False).versions == 0


def test_a_time_that_is_too_short_is_refused_with_one_that_is_long_enough() -> None:
    plan = plan_for(PHOTOGRAPHS, SPEEDS, 30)
    assert not plan.fits
    used = 40.0
    message = too_short(1, used, plan, PHOTOGRAPHS)
    assert message.startswith("recipe.minutes: 0.7 of 1 are used by the start and the search, and 6,000 images")
    enough = int(message.partition("give ")[2].partition(",")[0])

    def is_accepted(minutes: int) -> bool:
        """Its search takes 15 % of a minute more for each minute more."""
        left = 60 * minutes - used - 0.15 * 60 * (minutes - 1)
        smallest = plan_for(PHOTOGRAPHS, SPEEDS, 0.85 * left)
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


def test_a_sample_has_each_image_once_with_the_frozen_features_of_the_model(
    module_and_data: tuple[LitCLIP, Captions],
) -> None:
    module, data = module_and_data
    sample = sample_of(module, data, "32-true", 60.0, seed=0)
    assert sample is not None
    assert len(sample.image) == len(sample.text) == 60
    images = torch.stack([each.image for each in (data.validation_pairs(data.train_source)[row] for row in range(60))])
    with torch.no_grad():
        expected = module.model.eval().encode_image(module.model.normalize(images), normalize=True)
        found, _ = _head_features(module.model, sample)
    gaps = torch.cdist(found, expected)
    assert gaps.min(dim=1).values.max() < 1e-3  # in another order
    assert len(set(gaps.argmin(dim=1).tolist())) == 60


def test_trials_are_the_same_under_a_seed_and_leave_the_model_as_it_was(
    module_and_data: tuple[LitCLIP, Captions],
) -> None:
    module, data = module_and_data
    sample = sample_of(module, data, "32-true", 60.0, seed=0)
    assert sample is not None
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)  # features of one meaning, which linear heads can bring together
    meaning = torch.randn(240, 6, generator=generator)
    image, text = (meaning @ torch.randn(6, each.shape[1], generator=generator) for each in sample[:2])
    sample = Sample(image, text, torch.zeros(240, 1, dtype=torch.long), torch.arange(240))
    settings = [(64, 1e-2), (16, 1e-6)]
    first, again = (try_heads(module.model, sample, settings, 60, 600.0, seed=1) for _ in range(2))
    assert [trial[:3] for trial in first] == [trial[:3] for trial in again]
    assert [(trial.batch, trial.rate) for trial in first] == settings
    assert first[0].recall > 0.5 > 0.1 > first[1].recall  # a rate of nearly nothing teaches nothing
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_recall_of_trials_is_the_mean_of_both_directions_over_distinct_captions(
    module_and_data: tuple[LitCLIP, Captions],
) -> None:
    module, data = module_and_data
    sample = sample_of(module, data, "32-true", 60.0, seed=0)
    assert sample is not None
    repeated = Sample(sample.image[:20], *(column[:20] for column in sample[1:]))
    repeated = repeated._replace(
        text=torch.cat([repeated.text[:15], repeated.text[:5]]),
        tokens=torch.cat([repeated.tokens[:15], repeated.tokens[:5]]),
        captions=torch.tensor([*range(15), *range(5)]),
    )
    with torch.no_grad():
        image, text = _head_features(module.model, repeated)
    scores = image.double() @ text[:15].double().T
    right = [row % 15 if row >= 15 else row for row in range(20)]
    of_images = sum(int(scores[row].argmax()) == right[row] for row in range(20)) / 20
    of_texts = sum(right[int(scores[:, text].argmax())] == text for text in right) / 20
    assert _recall(module.model, repeated) == pytest.approx((of_images + of_texts) / 2)


def test_speeds_are_measured_for_trainable_blocks_and_heads(module_and_data: tuple[LitCLIP, Captions]) -> None:
    module, data = module_and_data
    speeds = [measure(module, data, "32-true", Freeze(UnlockLast(n), UnlockLast(n)), augmented=True) for n in (0, 1)]
    assert all(value > 0 for speed in speeds for value in speed)
    with pytest.raises(InputError, match="recipe: the image encoder has no frozen layers to store"):
        measure(module, data, "32-true", Freeze(None, UnlockLast(0)), augmented=True)


def test_the_choices_are_settings_of_fit(module_and_data: tuple[LitCLIP, Captions]) -> None:
    module, data = module_and_data
    chosen = {each.option: each for each in PretrainedEncoders(20).choose(Run({}, lambda: data, lambda: module))}
    assert chosen["data.global_batch_size"].value in (16, 32)
    assert chosen["model.optimizer.lr"].value in (3e-4, 1e-3, 3e-3)
    assert chosen["model.freeze"].value["image"] == {"unlock_last": 4}
    assert chosen["trainer.max_epochs"].value == 40
    assert chosen["trainer.max_time"].value.startswith("00:00:1")


def test_a_batch_that_leaves_few_steps_is_not_chosen(
    module_and_data: tuple[LitCLIP, Captions], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = module_and_data
    trials = [Trial(30, 1e-3, 0.9, 20, 1.0), Trial(16, 1e-2, 0.5, 20, 1.0)]  # 40 epochs of 60 pairs: 80 and 120 steps
    monkeypatch.setattr(PretrainedEncoders, "_search", lambda *_: trials)
    chosen = {each.option: each.value for each in PretrainedEncoders(20).choose(Run({}, lambda: data, lambda: module))}
    assert (chosen["data.global_batch_size"], chosen["model.optimizer.lr"]) == (16, 1e-2)


def test_settings_that_chance_does_not_tell_apart_give_the_largest_batch_and_smallest_rate() -> None:
    trials = [Trial(64, 3e-3, 0.918, 400, 1.0), Trial(256, 3e-4, 0.913, 400, 1.0), Trial(256, 1e-3, 0.914, 400, 1.0)]
    assert gentlest(trials) == trials[1]
    assert gentlest([*trials, Trial(32, 1e-3, 0.95, 400, 1.0)]).batch == 32


def test_time_that_is_left_is_used_for_epochs() -> None:
    epochs = [plan_for(Facts(3_000, 3_000, 3_000, 300), SPEEDS, seconds).epochs for seconds in range(120, 420, 20)]
    assert epochs == sorted(epochs)
    assert len({*epochs}) > 8
