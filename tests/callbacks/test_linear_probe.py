"""The linear probe during training equals scikit-learn on the features before the projection."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from callbacks import LinearProbe
from datamodules import NoCaptions
from lit_clip import LitCLIP
from lit_clip.errors import InputError
from tests.helpers.small_sets import (
    Shades,
    data_for,
    entry,
    make_module,
    make_trainer,
    numbers,
    write_suite,
    write_table,
)

TOP1 = "linear_probe/shades/top1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path)
    splits: dict[str, Any] = {"train": {"split": "train", "size": 60}, "val": {"split": "more", "size": 20}, "test": {}}
    write_suite(tmp_path, shades=entry(splits=splits), only_test=entry(splits={"test": {}}))
    return tmp_path


def probe(folder: Path, **options: Any) -> LinearProbe:
    return LinearProbe(str(folder / "suite.yaml"), str(folder), **options)


def before_projection(module: LitCLIP, images: Shades) -> np.ndarray:
    with torch.no_grad():
        pixels = torch.stack([module.model.eval().preprocess(images[row][0]) for row in range(len(images))])
        return module.model.image_features(pixels)[0].numpy()


def test_accuracy_equals_scikit_learns_on_the_features_before_the_projection(folder: Path) -> None:
    module = make_module()
    trainer = make_trainer(folder, [probe(folder, l2=10.0, batch_size=7)])
    trainer.validate(module, NoCaptions(), verbose=False)
    train, val, test = Shades("", "train", 60), Shades("", "more", 20), Shades("")
    features = np.concatenate([before_projection(module, train), before_projection(module, val)])
    assert features.shape == (80, 64)  # the width of the image tower; the embedding has 16
    sklearns = LogisticRegression(C=1 / 10.0, max_iter=1000, tol=1e-8).fit(features, train.labels() + val.labels())
    found = numbers(trainer, "linear_probe/")
    assert set(found) == {f"linear_probe/shades/{name}" for name in ("top1", "top5", "mean_per_class")}
    expected = sklearns.score(before_projection(module, test), test.labels())
    assert found[TOP1] == pytest.approx(expected, abs=1e-6)
    assert expected > 2 * module.baselines[TOP1]


def test_fit_evaluates_every_n_epochs_and_equals_validate(folder: Path) -> None:
    module, ran = make_module(), []

    class Counting(LinearProbe):
        def evaluate(self, trainer: Any, module: LitCLIP) -> Any:
            ran.append(trainer.global_step)
            return super().evaluate(trainer, module)

    callback = Counting(str(folder / "suite.yaml"), str(folder), every_n_epochs=2)
    trainer = make_trainer(folder, [callback], max_epochs=3, enable_checkpointing=False)
    trainer.fit(module, data_for(module, folder / "captions.csv"))
    assert ran == [2, 6]
    again = make_trainer(folder, [probe(folder)])
    again.validate(module, NoCaptions(), verbose=False)
    assert numbers(again, "linear_probe/") == numbers(trainer, "linear_probe/")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["only_test"]}, "LinearProbe.only: only_test does not have the task linear_probe"),
        ({"l2": 0.0}, "LinearProbe.l2: 0.0 must be above 0"),
        ({"l2": float("nan")}, "LinearProbe.l2: nan must be above 0"),
        ({"batch_size": 0}, "LinearProbe.batch_size: 0 must be at least 1"),
    ],
)
def test_invalid_options_are_an_error(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probe(folder, **options)


def test_a_suite_without_training_splits_is_an_error(folder: Path) -> None:
    suite = write_suite(folder, only_test=entry(splits={"test": {}}))
    with pytest.raises(InputError, match="LinearProbe.suite: no set has the task linear_probe"):
        LinearProbe(suite)


@pytest.mark.parametrize(
    ("splits", "metric", "message"),
    [
        ({"train": {"split": "train", "size": 1}, "test": {}}, "top1", "shades: .*each class has one image"),
        ({"train": {"split": "train", "size": 0}, "test": {}}, "top1", "shades: the set is empty"),
        ({"train": {"split": "train"}, "test": {}}, "roc_auc", "shades: metric: roc_auc needs 2 classes"),
        ({"train": {"split": "train"}, "test": {"names": 6}}, "top1", "shades: test and train have 6 and 7 classes"),
    ],
)
def test_labels_that_cannot_be_learnt_from_are_an_error_before_the_first_step(
    folder: Path, splits: dict[str, Any], metric: str, message: str
) -> None:
    write_suite(folder, shades=entry(splits=splits, metric=metric))
    module = make_module()
    trainer = make_trainer(folder, [probe(folder)], max_epochs=1, enable_checkpointing=False)
    with pytest.raises(InputError, match=message):
        trainer.fit(module, data_for(module, folder / "captions.csv"))
    assert trainer.global_step == 0
