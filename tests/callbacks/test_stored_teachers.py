"""Distillation from stored features of teachers equals distillation from teachers that encode each batch."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback

from callbacks import FrozenFeatures
from datamodules import OpenMoji
from datamodules.loading.augmentation import Augmentation
from datamodules.loading.bad_samples import BadSamples
from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.commands.wise_ft import save
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Sum
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, VisionTransformerConfig
from lit_clip.module import LitCLIP
from lit_clip.training.teacher import Distillation, Teacher, stored_name
from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.frozen_runs import Recorder, Run, config_of, fit
from tests.helpers.towers import shaken
from tests.test_module import trainer

ROWS, IMAGES = 14, 10


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Return two teachers of other image sizes, context lengths, normalisation and channels than the students."""
    found = []
    for name, size, of in (("small", 16, "features"), ("large", 48, "probabilities")):
        config = CLIPConfig(
            24,
            VisionTransformerConfig(image_size=size, patch_size=16, width=64, layers=1, heads=1),
            TextTransformerConfig(context_length=size // 4, width=16, layers=1, heads=1),
            preprocessing=Preprocessing(image_size=size, mean=(0.5, 0.4, 0.5), std=(0.25, 0.5, 1.0)),
        )
        torch.manual_seed(size)
        path = tmp_path_factory.mktemp("teachers") / f"{name}.ckpt"
        save(shaken(CLIP(config)), path, {})
        found.append((str(path), of))
    return found


@pytest.fixture
def run(tmp_path: Path, caption_table: Path, teachers: list[tuple[str, str]]) -> Run:
    """A run on rows of real drawings, some of which share an image, with two teachers."""
    with caption_table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:ROWS]
    for number in range(IMAGES):
        (tmp_path / f"{number}.png").write_bytes((caption_table.parent / rows[number]["image"]).read_bytes())
    table = tmp_path / "captions.jsonl"
    lines = [{"image": f"{i % IMAGES}.png", "caption": [row["caption"], f"a {i}"]} for i, row in enumerate(rows)]
    table.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return Run(str(tmp_path), str(table), freeze="nothing", teachers=teachers)


class Steps(Callback):
    """Keep the batches of the training steps."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)


def stored(run: Run, *callbacks: Callback) -> tuple[Recorder, LitCLIP]:
    return fit(run._replace(cache=f"{run.folder}/cache"), *callbacks)


def check_equal(run: Run) -> None:
    online, module = fit(run)
    cached, same = stored(run)
    assert cached.samples == online.samples
    assert cached.losses == pytest.approx(online.losses, rel=1e-5)
    assert cached.validations == pytest.approx(online.validations, rel=1e-5)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("freeze", "model"), [("nothing", {}), ("text", {"micro_batch_size": 3}), ("image", {"micro_batch_size": 5})]
)
def test_losses_equal_those_of_online_teachers(freeze: str, model: dict[str, Any], run: Run) -> None:
    check_equal(run._replace(freeze=freeze, model=model))


def test_two_ranks_share_the_files_and_have_the_losses_of_one_online(run: Run, tmp_path: Path) -> None:
    run = run._replace(freeze="image", model={"micro_batch_size": 3})
    two = {"cache": f"{run.folder}/cache", "data": {"batch_size": 4}, "trainer": {"devices": 2, "strategy": "ddp"}}
    words = json.dumps([{**run._asdict(), **two}])
    script = str(ROOT / "tests/helpers/frozen_runs.py")
    run_lightning_ranks(2, tmp_path, script, "some", str(tmp_path / "found.json"), words)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["losses"] == pytest.approx(fit(run)[0].losses, rel=1e-5)
    assert not found["decoded"]


def test_a_teacher_has_seen_the_version_of_an_image_that_is_trained_on(run: Run) -> None:
    """Decoded, or encoded by frozen layers, which are here the teacher's own."""
    model = CLIP(config_of("vit"))
    base, own = f"{run.folder}/base.ckpt", f"{run.folder}/own.ckpt"
    save(model, Path(base), {})
    save(shaken(model), Path(own), {})  # as the run does
    run = run._replace(augmentations=3, epochs=3, data={"augmentation": Augmentation((0.3, 1.0))})
    for freeze in ("nothing", "image"):
        steps = Steps()
        stored(run._replace(freeze=freeze, model={"pretrained": base}, teachers=[(own, "features")]), steps)
        seen = set()
        for batch in steps.batches:
            theirs = unit(batch.extra[stored_name(own, "image")])
            images = Teacher(load_model(own)).features(batch, "image") if freeze == "nothing" else unit(batch.images)
            torch.testing.assert_close(theirs, images, rtol=0, atol=1e-5)
            texts = unit(batch.extra[stored_name(own, "text")])
            torch.testing.assert_close(texts, Teacher(load_model(own)).features(batch, "text"), rtol=0, atol=1e-5)
            seen |= {(key, *map(float, row[:4])) for key, row in zip(batch.keys, theirs, strict=True)}
        versions = [sum(key == each for key, *_ in seen) for each in {key for key, *_ in seen}]
        assert 1 < max(versions) <= 3


def test_steps_need_no_teacher_and_a_second_run_encodes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = stored(run)

    def refuse(*_: Any) -> Any:
        raise AssertionError("a teacher encoded")

    monkeypatch.setattr(Teacher, "features", refuse)
    monkeypatch.setattr(Teacher, "resized", refuse)
    again, _ = stored(run)
    assert again.losses == first.losses


def test_an_image_that_changes_in_each_epoch_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match=r"data.augmentation to \[\], or FrozenFeatures.augmentations to a number"):
        stored(run._replace(data={"augmentation": None}))


def test_an_unreadable_image_is_skipped_as_with_online_teachers(run: Run) -> None:
    Path(run.folder, "3.png").write_bytes(b"no image")
    check_equal(run._replace(data={"bad_samples": BadSamples("skip", 1.0)}))


def test_captions_made_up_at_random_are_encoded_in_each_step(
    run: Run, drawings_cache: Path, teachers: list[tuple[str, str]]
) -> None:
    losses = []
    for storing in ([], [FrozenFeatures(f"{run.folder}/cache")]):
        torch.manual_seed(0)
        recorder = Recorder(run)
        module = LitCLIP(config_of("vit"), loss=Sum([Contrastive(), Distillation(teachers[1][0])]))
        data = OpenMoji(cache_dir=str(drawings_cache), batch_size=64, num_workers=0, augmentation=[])
        trainer(Path(run.folder), max_steps=2, limit_val_batches=0, callbacks=[*storing, recorder]).fit(module, data)
        losses.append(recorder.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def embedded(model: str, run: Run) -> list[str]:
    """Return the files of a model's features of the run's images and captions."""
    paths = [f"{run.folder}/{name}.parquet" for name in ("of_images", "of_captions")]
    for path, more in zip(paths, ([], ["--fields", "caption"]), strict=True):
        options = ["--model", model, "--output", path, "--num_workers", "0", "--accelerator", "cpu"]
        run_command(["embed", run.table, *more, *options])
    return paths


@pytest.mark.parametrize(
    ("of", "cache"),
    [
        *[("features", True), ("probabilities", False)],
        *[pytest.param(*case, marks=pytest.mark.slow) for case in (("features", False), ("probabilities", True))],
    ],
)
def test_tables_of_features_teach_as_the_model_that_made_them(run: Run, of: str, cache: bool) -> None:
    """Of the student's image size, so that both see the same pixels; also beside stored frozen layers."""
    save(shaken(CLIP(config_of("vit"))), Path(f"{run.folder}/teacher.ckpt"), {})
    run = run._replace(freeze="image", model={"micro_batch_size": 3}, teachers=[(f"{run.folder}/teacher.ckpt", of)])
    online, _ = fit(run)
    tables: Any = [(embedded(f"{run.folder}/teacher.ckpt", run), of)]
    found, _ = (stored if cache else fit)(run._replace(teachers=tables))
    assert found.samples == online.samples
    assert found.losses == pytest.approx(online.losses, rel=1e-5)
    assert online.losses != fit(run._replace(teachers=()))[0].losses


def test_keys_that_a_table_lacks_are_counted_before_the_first_step(run: Run, teachers: list[tuple[str, str]]) -> None:
    images, captions = embedded(teachers[0][0], run)
    for path, kept, message in (
        (images, IMAGES - 3, f"lacks 3 of {IMAGES} keys, such as '7.png'"),
        (captions, 2 * ROWS - 1, f"of_captions.parquet: lacks 1 of {2 * ROWS} captions"),
    ):
        whole = pq.read_table(path)
        pq.write_table(whole.slice(0, kept), path)
        with pytest.raises(InputError, match=message):
            fit(run._replace(teachers=[([images, captions], "features")]))  # pyright: ignore[reportArgumentType]
        pq.write_table(whole, path)
