"""Logs of a run: metrics, and TensorBoard's images and embeddings."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import EmbeddingProjector, SimilarityMatrix, Throughput, TrainingMonitor, ZeroShot, ZeroShotSet
from callbacks.log_image import Prediction, prediction_grid
from callbacks.tensorboard import _thumbnails, similarity_matrix
from datamodules import Captions, OpenMojiClasses
from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.training.schedules import WarmupCosine

TEMPLATES = ["{}", "a drawing of {}."]


@pytest.fixture
def groups(drawings_cache: Path) -> ZeroShotSet:
    images = OpenMojiClasses("held_out", classes="group", cache_dir=str(drawings_cache))
    return ZeroShotSet(images, list(TEMPLATES))


def make_trainer(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, **options}
    logger = TensorBoardLogger(folder, name="run", default_hp_metric=False)
    return Trainer(accelerator="cpu", logger=logger, callbacks=callbacks, use_distributed_sampler=False, **settings)


def data_for(table: Path) -> Captions:
    return Captions(str(table), str(table), batch_size=16, num_workers=0)


def test_a_run_writes_every_curve_and_image_and_its_best_checkpoint(
    groups: ZeroShotSet, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    best = ModelCheckpoint(monitor="zero_shot/groups/top1", mode="max")
    callbacks = [
        ZeroShot({"groups": groups}, examples=6),
        TrainingMonitor(),
        Throughput(),
        SimilarityMatrix(5),
        EmbeddingProjector(20),
        best,
    ]
    trainer = make_trainer(tmp_path, callbacks, max_epochs=2, log_every_n_steps=1)
    trainer.fit(module, data_for(caption_table))

    folder = Path(str(trainer.log_dir))
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    recalls = {f"val/{d}_recall@{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    zero_shot = {f"zero_shot/groups/{m}" for m in ("top1", "top5", "mean_per_class")}
    training = {"loss", "logit_scale", "learning_rate", "samples_per_second", "samples_seen"}
    training |= {"image_gradient_norm", "text_gradient_norm"}
    scalars = set(events.Tags()["scalars"])
    assert {"val/loss", *recalls, *zero_shot, *(f"train/{name}" for name in training)} <= scalars
    assert "hp_metric" not in scalars
    assert [e.step for e in events.Scalars("train/loss")] == list(range(8))
    assert [e.value for e in events.Scalars("train/samples_seen")] == [16.0 * step for step in range(1, 9)]
    for tag in ("zero_shot/groups", "val/similarity"):
        assert [e.step for e in events.Images(tag)] == [4, 8]  # once per epoch
    assert (folder / "zero_shot_groups.png").stat().st_size > 1000
    assert (folder / "projector_config.pbtxt").exists()
    (metadata,) = folder.rglob("metadata.tsv")
    assert len(metadata.read_text().splitlines()) == 1 + 2 * 20
    assert Path(best.best_model_path).is_file()
    assert best.best_model_score == pytest.approx(max(e.value for e in events.Scalars("zero_shot/groups/top1")))


def test_validate_gives_the_numbers_of_fit(
    groups: ZeroShotSet, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    trainer = make_trainer(tmp_path, [ZeroShot({"groups": groups})], max_epochs=1, precision="bf16-mixed")
    trainer.fit(module, data_for(caption_table))
    fitted = {name: float(v) for name, v in trainer.callback_metrics.items() if not name.startswith("train/")}
    again = make_trainer(tmp_path, [ZeroShot({"groups": groups})], precision="bf16-mixed")
    again.validate(module, data_for(caption_table), verbose=False)
    assert {name: float(value) for name, value in again.callback_metrics.items()} == fitted
    assert "zero_shot/groups/top1" in fitted


def test_a_set_that_cannot_be_scored_is_refused_at_construction(drawings_cache: Path) -> None:
    images = OpenMojiClasses("held_out", classes="group", cache_dir=str(drawings_cache))
    with pytest.raises(InputError, match="no {} for the class name"):
        ZeroShotSet(images, ["a drawing"])
    images.class_names = images.class_names[:3]
    with pytest.raises(InputError, match="3 names, but an image has label 7"):
        ZeroShotSet(images)
    images.files = []
    with pytest.raises(InputError, match="empty"):
        ZeroShotSet(images)


def test_the_papers_templates_are_known_by_name(drawings_cache: Path) -> None:
    images = OpenMojiClasses("held_out", classes="group", cache_dir=str(drawings_cache))
    assert len(ZeroShotSet(images, "imagenet").templates) == 80


def test_figures_have_room_for_any_number_of_items_and_long_names() -> None:
    image = Image.new("RGB", (32, 32), "red")
    for count in (1, 3, 9):
        predictions = [Prediction(image, "x" * 200, [("y" * 200, 0.5), ("x" * 200, 0.25)])] * count
        sheet = np.asarray(prediction_grid(predictions))
        assert (sheet == (255, 0, 0)).all(axis=-1).sum() == count * 96 * 96
    matrix = similarity_matrix([image] * 3, ["a", "b" * 300, ""], np.zeros((3, 3)))
    assert matrix.size[0] > matrix.size[1] > 3 * 50


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_similarities_that_are_no_numbers_are_drawn(number: float) -> None:
    images, scores = [Image.new("RGB", (32, 32), "red")] * 2, np.array([[0.5, number], [0.1, 0.2]])
    plain = np.asarray(similarity_matrix(images, ["a", "b"], np.array([[0.5, 0.1], [0.1, 0.2]])))
    drawn = np.asarray(similarity_matrix(images, ["a", "b"], scores))
    assert np.array_equal(drawn[-50:], plain[-50:])  # the shades of the second caption
    similarity_matrix(images, ["a", "b"], np.full((2, 2), number))


def test_images_in_their_own_aspect_ratio_get_thumbnails_of_one_size() -> None:
    transform = pixels(Preprocessing(max_patches=16, patch_size=8))
    sizes = ((40, 20), (20, 40), (30, 30))
    sequences = torch.stack([transform(Image.new("RGB", size, "red")) for size in sizes])
    thumbnails = _thumbnails(sequences)
    assert thumbnails is not None
    assert thumbnails.shape == (6, 3, 64, 64)
    assert torch.equal(thumbnails[:3].amin(dim=(0, 2, 3)), torch.tensor([1.0, 0.0, 0.0]))
