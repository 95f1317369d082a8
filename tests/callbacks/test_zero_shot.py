"""Zero-shot evaluation during training: its metrics, when they are computed, and the values in between."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from callbacks import EMA, ZeroShot, suite_evaluation
from datamodules import NoCaptions
from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.evaluation import set_encoding
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.targets import Targets
from lit_clip.models.finetuning import Freeze
from lit_clip.tools import workers
from tests.helpers.ranks_callbacks import evaluate
from tests.helpers.small_sets import (
    ManyShades,
    Shades,
    captions_entry,
    cosines,
    data_for,
    entry,
    make_module,
    make_trainer,
    numbers,
    write_suite,
    write_table,
)

TOP1 = "zero_shot/shades/top1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path)
    many = entry("ManyShades", metric="map11", splits={"test": {"size": 33}})
    write_suite(tmp_path, shades=entry(), many=many, captions=captions_entry())
    return tmp_path


def zero_shot(folder: Path, **options: Any) -> ZeroShot:
    return ZeroShot(
        suite=str(folder / "suite.yaml"), data_root=str(folder), **{"examples": 0, "only": ["shades"], **options}
    )


def test_each_set_of_a_suite_is_evaluated_by_its_own_metric(folder: Path) -> None:
    module = make_module()
    trainer = make_trainer(folder, [zero_shot(folder, only=None, batch_size=7)])
    trainer.validate(module, NoCaptions(), verbose=False)
    found = numbers(trainer, "zero_shot/")
    images, many = Shades(""), ManyShades("", size=33)
    logits, labels = cosines(module, images).numpy(), np.array(images.labels())
    likely = (module.model.logit_scale.exp() * cosines(module, many)).double().softmax(dim=1)  # of the classes
    assert not np.array_equal(likely.argsort(dim=0).numpy(), cosines(module, many).argsort(dim=0).numpy())
    assert found == pytest.approx(
        {
            TOP1: top_k_accuracy_score(labels, logits, k=1),
            "zero_shot/shades/top5": top_k_accuracy_score(labels, logits, k=5),
            "zero_shot/shades/mean_per_class": balanced_accuracy_score(labels, logits.argmax(axis=1)),
            "zero_shot/many/map11": evaluate_scores("map11", likely.detach(), Targets.of(many))["map11"],
        },
        abs=1e-6,
    )
    assert module.baselines[TOP1] == np.bincount(labels).max() / len(labels)
    assert "zero_shot/many/map11" in module.baselines


def test_fit_validate_and_evaluation_between_steps_give_the_same_metrics(folder: Path) -> None:
    module, steps = make_module(), zero_shot(folder, every_n_steps=2)
    logger = CSVLogger(folder, "csv", "")
    trainer = make_trainer(folder, [EMA(0.5), steps], max_epochs=1, precision="bf16-mixed", logger=logger)
    trainer.fit(module, data_for(module, folder / "captions.csv", 2))  # 4 steps
    fitted = numbers(trainer, "zero_shot/")
    assert len(fitted) == 3
    again = make_trainer(folder, [zero_shot(folder)], precision="bf16-mixed")
    again.validate(
        module, data_for(module, folder / "captions.csv"), verbose=False
    )  # the module now has the averaged weights
    assert numbers(again, "zero_shot/") == fitted
    rows = (folder / "csv" / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    logged = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    values = {int(row["step"]): float(row[TOP1]) for row in logged if row[TOP1]}
    assert {1, 2, 4} <= values.keys()  # at the first opportunity and every second step
    assert values[4] == pytest.approx(fitted[TOP1])


class Counting(ZeroShot):
    """Records the steps at which it ran."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.ran: list[int] = []

    def evaluate(self, trainer: Any, module: LitCLIP) -> Any:
        self.ran.append(trainer.global_step)
        return super().evaluate(trainer, module)


def counting(folder: Path, **options: Any) -> Counting:
    return Counting(suite=str(folder / "suite.yaml"), data_root=str(folder), examples=0, only=["shades"], **options)


class Seen(ModelCheckpoint):
    """A checkpoint callback that monitors the metric and records each value that it sees."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, "{step}", monitor=TOP1, mode="max", save_top_k=-1, **options)
        self.values: dict[int, float] = {}

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: Any) -> None:
        self.values[trainer.global_step] = float(monitor_candidates[TOP1])
        super()._save_topk_checkpoint(trainer, monitor_candidates)


def test_a_checkpoint_has_the_metric_if_the_callback_did_not_run_and_after_resuming(folder: Path) -> None:
    module, callback, seen = make_module(), counting(folder, every_n_epochs=2), Seen(folder / "saved")
    make_trainer(folder, [callback, seen], max_epochs=4).fit(module, data_for(module, folder / "captions.csv"))
    assert callback.ran == [2, 6]  # validations are after 2, 4, 6, 8 steps
    assert list(seen.values) == [2, 4, 6, 8]
    assert seen.values[2] == seen.values[4]
    assert seen.values[6] == seen.values[8]
    resumed, after = counting(folder, every_n_epochs=2), Seen(folder / "resumed")
    trainer = make_trainer(folder, [resumed, after], max_epochs=6)
    saved = str(folder / "saved" / "step=8.ckpt")
    trainer.fit(make_module(), data_for(module, folder / "captions.csv"), ckpt_path=saved, weights_only=True)
    assert resumed.ran == [10]
    assert list(after.values) == [10, 12]
    earlier = counting(folder, every_n_epochs=2)
    trainer = make_trainer(folder, [earlier, Seen(folder / "earlier")], max_epochs=4)
    saved = str(folder / "saved" / "step=6.ckpt")
    trainer.fit(make_module(), data_for(module, folder / "captions.csv"), ckpt_path=saved, weights_only=True)
    assert earlier.ran == []
    assert numbers(trainer, TOP1)[TOP1] == seen.values[6]


@pytest.mark.slow
def test_a_checkpoint_every_few_steps_has_the_metric(folder: Path) -> None:
    module, callback = make_module(), counting(folder, every_n_steps=3)
    seen = Seen(folder / "saved", every_n_train_steps=2)
    trainer = make_trainer(folder, [callback, seen], max_epochs=4)
    trainer.fit(module, data_for(module, folder / "captions.csv"))
    assert callback.ran == [1, 3, 6]
    assert [step for step in seen.values if step % 2 == 0] == [2, 4, 6, 8]
    saved = str(folder / "saved" / "step=6.ckpt")
    resumed, after = counting(folder, every_n_steps=30), Seen(folder / "resumed", every_n_train_steps=1)
    trainer = make_trainer(folder, [resumed, after], max_epochs=5)
    trainer.fit(make_module(), data_for(module, folder / "captions.csv"), ckpt_path=saved, weights_only=True)
    assert resumed.ran == []
    assert set(after.values.values()) == {seen.values[6]}


def test_the_callback_does_not_change_training(folder: Path) -> None:
    states = []
    for callbacks in ([], [zero_shot(folder, every_n_steps=1, num_workers=1)]):
        module = make_module()
        make_trainer(folder, callbacks, max_epochs=2, enable_checkpointing=False).fit(
            module, data_for(module, folder / "captions.csv")
        )
        assert all(part.training for part in module.modules())
        states.append((module.state_dict(), torch.get_rng_state()))
    assert torch.equal(states[0][1], states[1][1])
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name


@pytest.mark.parametrize(("frozen", "times"), [(True, 1), (False, 3)])
def test_prompts_are_encoded_again_only_if_the_text_tower_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool, times: int
) -> None:
    built: list[int] = []
    build = suite_evaluation.text_classifier
    monkeypatch.setattr(suite_evaluation, "text_classifier", lambda *words: built.append(1) or build(*words))
    module = make_module(freeze=Freeze(text="all") if frozen else None)
    callback = zero_shot(folder)
    make_trainer(folder, [callback], max_epochs=3, enable_checkpointing=False).fit(
        module, data_for(module, folder / "captions.csv")
    )
    assert len(built) == times
    make_trainer(folder, [callback]).validate(module, NoCaptions(), verbose=False)
    assert len(built) == times  # nothing has changed


def test_folds_are_averaged_and_the_same_images_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folds = [{"shift": 0}, {"shift": 1}, {"shift": 0}]
    suite = write_suite(folder, shades=entry(folds=folds))
    module, encoded = make_module(text_width=64), []
    encode = module.model.encode_image
    monkeypatch.setattr(module.model, "encode_image", lambda x, *rest: encoded.append(len(x)) or encode(x, *rest))
    trainer = make_trainer(folder, [ZeroShot(suite=suite, data_root=str(folder), examples=0)])
    trainer.validate(module, NoCaptions(), verbose=False)
    assert sum(encoded) == 2 * 40
    monkeypatch.undo()
    expected = [
        (cosines(module, images).argmax(dim=1) == torch.tensor(images.labels())).float().mean()
        for images in (Shades("", shift=shift) for shift in (0, 1, 0))
    ]
    assert len({float(value) for value in expected}) == 2
    assert numbers(trainer, TOP1)[TOP1] == pytest.approx(float(sum(expected) / 3), abs=1e-6)


@pytest.mark.parametrize(
    ("cores", "ranks", "batches", "given", "expected"),
    [(16, 1, 100, None, 8), (16, 4, 100, None, 3), (2, 2, 100, None, 0), (16, 1, 11, None, 2), (16, 1, 3, None, 0)]
    + [(2, 4, 3, 5, 5)],
)
def test_data_workers_are_by_default_a_share_of_the_cores_and_none_for_small_sets(
    cores: int, ranks: int, batches: int, given: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setattr(set_encoding, "loader", lambda _, workers, **__: asked.append(workers) or ())
    reader = set_encoding.SetEncoder(7, given, "error", "ZeroShot")
    reader.processes = ranks
    reader.encode(make_module().model, Shades("", size=7 * batches), lambda pixels: pixels, "shades")
    assert asked == [expected]


def test_missing_sets_are_warned_about_once_and_the_others_evaluated(folder: Path) -> None:
    elsewhere = entry(init_args={"root": "nowhere"}, how_to_get="ask their owner")
    callback = ZeroShot(suite=write_suite(folder, shades=entry(), lost=elsewhere), data_root=str(folder), examples=0)
    trainer = make_trainer(folder, [callback])
    with pytest.warns(UserWarning, match="ZeroShot: lost is skipped: .*nowhere: not there; ask their owner") as warned:
        trainer.validate(make_module(), NoCaptions(), verbose=False)
    assert len([warning for warning in warned if "lost" in str(warning.message)]) == 1
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        make_trainer(folder, [callback]).validate(make_module(), NoCaptions(), verbose=False)
    assert not [warning for warning in again if "lost" in str(warning.message)]
    assert {name.split("/")[1] for name in numbers(trainer, "zero_shot/")} == {"shades"}


def test_an_unreadable_image_stops_the_run_or_is_skipped(folder: Path) -> None:
    suite, module = write_suite(folder, shades=entry(init_args={"broken": 5})), make_module()
    options = {"suite": suite, "data_root": str(folder), "examples": 2}
    with pytest.raises(InputError, match=r"shades: 5.png: not an image; fix or remove it, or set ZeroShot.on_error"):
        make_trainer(folder, [ZeroShot(**options)]).validate(module, NoCaptions(), verbose=False)
    trainer = make_trainer(folder, [ZeroShot(on_error="skip", **options)])
    with pytest.warns(UserWarning, match=r"shades test: 1 of 40 images are skipped; the first: 5.png: not an image"):
        trainer.validate(module, NoCaptions(), verbose=False)
    right = cosines(module, Shades("")).argmax(dim=1) == torch.tensor(Shades("").labels())
    rows = [row for row in range(40) if row != 5]
    assert numbers(trainer, TOP1)[TOP1] == pytest.approx(float(right[rows].float().mean()), abs=1e-6)


@pytest.mark.slow
def test_two_ranks_log_the_metrics_of_one(folder: Path, ranks: Callable[..., Any]) -> None:
    suite = str(folder / "suite.yaml")
    found, expected = ranks("run", 2, folder, suite, script="ranks_callbacks.py"), evaluate(folder, suite)
    assert found["steps"] == found["epochs"]
    assert expected["steps"] == expected["epochs"]
    assert found["epochs"].keys() == expected["epochs"].keys()
    names = {"zero_shot/many/map11", "linear_probe/shades/top1", TOP1, "retrieval/captions/text_to_image_recall@1"}
    assert names <= found["epochs"].keys()
    assert found["epochs"] == pytest.approx(expected["epochs"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["shade"]}, "ZeroShot.only: no 'shade' in the suite; there are captions, many, shades"),
        ({"suite": None}, "ZeroShot.only: needs suite"),
        ({"suite": "no.yaml"}, "no.yaml: there is no such file"),
        ({"every_n_epochs": 0}, "ZeroShot.every_n_epochs: 0 must be at least 1"),
        ({"every_n_steps": 0}, "ZeroShot.every_n_steps: 0 must be at least 1"),
        ({"every_n_steps": 5, "every_n_epochs": 2}, "give either every_n_epochs or every_n_steps"),
        ({"batch_size": 0}, "ZeroShot.batch_size: 0 must be at least 1"),
        ({"num_workers": -1}, "ZeroShot.num_workers: -1 must be at least 0"),
        ({"examples": -1}, "ZeroShot.examples: -1 must be at least 0"),
        ({"sets": {"mine": {"images": []}}}, "ZeroShot.sets: 'mine' is a dict; give a lit_clip.callbacks.ZeroShotSet"),
    ],
)
def test_invalid_options_are_an_error(folder: Path, options: dict[str, Any], message: str) -> None:
    settings = {"suite": str(folder / "suite.yaml"), "only": ["shades"], **options}
    with pytest.raises(InputError, match=message):
        ZeroShot(**settings)


def test_weight_averaging_after_the_callback_is_an_error(folder: Path) -> None:
    trainer = make_trainer(folder, [zero_shot(folder, every_n_steps=1), EMA(0.5)], max_epochs=1)
    module = make_module()
    with pytest.raises(InputError, match="put EMA before it in the list of callbacks"):
        trainer.fit(module, data_for(module, folder / "captions.csv"))


def test_an_undefined_metric_or_a_broken_image_is_an_error_before_the_first_step(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "pets" / name).mkdir(parents=True)
        (folder / "pets" / name / "1.png").write_bytes((folder / "0.png").read_bytes() if name == "cat" else b"")
    pets = {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "pets"}}
    wrong_names = entry(class_names=["red", "green"])
    for entries, message in (
        ({"shades": wrong_names}, "shades: class_names: 2 class names, but the set has 7 classes"),
        ({"shades": entry(metric="pm")}, "shades: metric: pm needs annotations that this set does not have"),
        ({"pets": {"data": pets}}, "pets: .*dog.*1.png.*or set on_error to skip"),
    ):
        suite, module = write_suite(folder, **entries), make_module()
        trainer = make_trainer(folder, [ZeroShot(suite=suite, data_root=str(folder))], enable_checkpointing=False)
        with pytest.raises(InputError, match=message):
            trainer.fit(module, data_for(module, folder / "captions.csv"))
        assert trainer.global_step == 0
