"""Retrieval on sets of a suite equals the validation of the same pairs and ``lit-clip evaluate``'s task."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from callbacks import Retrieval
from lit_clip.errors import InputError
from lit_clip.evaluation.image_retrieval import image_retrieval
from tests.helpers.small_sets import (
    Shades,
    captions_entry,
    data_for,
    entry,
    make_module,
    make_trainer,
    numbers,
    write_suite,
    write_table,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pairs, of which two images share a caption, and a suite of them and of a set without captions."""
    table = write_table(tmp_path, 20)
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[8] = lines[8].split(",")[0] + "," + lines[15].split(",")[1]
    table.write_text("\n".join(lines), encoding="utf-8")
    write_suite(tmp_path, shades=entry(), pairs=captions_entry(), gone=captions_entry("gone.csv"))
    return tmp_path


def test_metrics_and_baselines_equal_the_validation_of_the_same_pairs(folder: Path) -> None:
    module = make_module()
    callback = Retrieval(str(folder / "suite.yaml"), str(folder), batch_size=7)
    trainer = make_trainer(folder, [callback])
    with pytest.warns(UserWarning, match="Retrieval: gone is skipped"):
        trainer.validate(module, data_for(module, folder / "captions.csv"), verbose=False)
    expected = {name[4:]: value for name, value in numbers(trainer, "val/").items() if "_to_" in name}
    assert "merged_text_to_image_recall@5" in expected
    assert len({*expected.values()}) > 4
    found = numbers(trainer, "retrieval/")
    assert found == pytest.approx({f"retrieval/pairs/{name}": value for name, value in expected.items()}, abs=1e-6)
    baselines = {name[4:]: value for name, value in module.baselines.items() if name.startswith("val/")}
    del baselines["loss"], baselines["mean_recall"]  # of the validation alone
    assert {name[16:]: value for name, value in module.baselines.items() if "retrieval/" in name} == baselines
    assert baselines["merged_text_to_image_recall@1"] != baselines["text_to_image_recall@1"]


def test_caption_choice_equals_a_plain_loop(folder: Path) -> None:
    (folder / "crepe/val2017").mkdir(parents=True)
    questions = []
    for row in range(20):
        shutil.copy(folder / f"{row}.png", folder / f"crepe/val2017/{row}.png")
        questions.append(
            {"filename": f"{row}.png", "caption": f"red {row}", "negative_caption": f"blue {row * row % 7}"}
        )
    (folder / "crepe/add_obj.json").write_text(json.dumps(dict(enumerate(questions))))
    spec = {"class_path": "datamodules.evaluation.SugarCrepe", "init_args": {"root": "crepe", "subset": "add_obj"}}
    write_suite(folder, pairs=captions_entry(), crepe={"data": spec, "metric": "text_score"})
    module = make_module()
    trainer = make_trainer(folder, [Retrieval(str(folder / "suite.yaml"), str(folder), ["crepe"], batch_size=7)])
    trainer.validate(module, data_for(module, folder / "captions.csv"), verbose=False)
    right, model = 0, module.model.eval()
    with torch.no_grad():
        for row, question in enumerate(questions):
            image = model.encode_image(model.preprocess(Image.open(folder / f"{row}.png"))[None], normalize=True)
            texts = model.tokenizer([question["caption"], question["negative_caption"]])
            own, other = (image @ model.encode_text(texts, normalize=True).T)[0].tolist()
            right += own > other
    assert numbers(trainer, "caption_choice/") == {"caption_choice/crepe/text_score": pytest.approx(right / 20)}
    assert 0 < right < 20
    assert module.baselines["caption_choice/crepe/text_score"] == 0.5
    assert not numbers(trainer, "retrieval/")


def test_images_are_searched_by_images_during_training(folder: Path) -> None:
    suite = write_suite(folder, shades=entry(splits={"test": {}}, tasks=["image_retrieval"]))
    module, trainer = make_module(), make_trainer(folder, [Retrieval(suite, str(folder))])
    trainer.validate(module, data_for(module, folder / "captions.csv"), verbose=False)
    shades = Shades("")
    with torch.no_grad():
        images = torch.stack([module.model.preprocess(shades[row][0]) for row in range(40)])
        expected = image_retrieval(module.model.encode_image(images), torch.tensor(shades.labels()))
    found = numbers(trainer, "image_retrieval/shades/")
    assert found["image_retrieval/shades/map@10"] == pytest.approx(expected.entry()["value"], abs=1e-6)
    assert module.baselines["image_retrieval/shades/map@10"] == pytest.approx(expected.baseline)


def test_a_metric_that_questions_do_not_have_is_refused_before_training(folder: Path) -> None:
    (folder / "crepe/val2017").mkdir(parents=True)
    shutil.copy(folder / "0.png", folder / "crepe/val2017/0.png")
    question = {"filename": "0.png", "caption": "red", "negative_caption": "blue"}
    (folder / "crepe/add_obj.json").write_text(json.dumps({"0": question}))
    spec = {"class_path": "datamodules.evaluation.SugarCrepe", "init_args": {"root": "crepe", "subset": "add_obj"}}
    write_suite(folder, crepe={"data": spec, "metric": "image_score"})
    trainer, module = make_trainer(folder, [Retrieval(str(folder / "suite.yaml"), str(folder))]), make_module()
    with pytest.raises(InputError, match="crepe: metric: image_score is not defined for these questions"):
        trainer.fit(module, data_for(module, folder / "captions.csv"))
    assert trainer.global_step == 0


def test_a_suite_without_captions_is_refused(folder: Path) -> None:
    write_suite(folder, shades=entry())
    with pytest.raises(InputError, match=r"Retrieval.suite: no set has the task retrieval or caption_choice"):
        Retrieval(str(folder / "suite.yaml"))
    write_suite(folder, shades=entry(tasks=["retrieval"]))
    with pytest.raises(InputError, match="shades: Shades has no captions, which retrieval needs"):
        make_trainer(folder, [Retrieval(str(folder / "suite.yaml"), str(folder))]).validate(
            make_module(), data_for(make_module(), folder / "captions.csv"), verbose=False
        )
