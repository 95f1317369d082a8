"""Mixed budgets of patches (NaFlex): one for each batch, the same on every rank and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from datamodules import Captions
from datamodules.loading.sampling import GlobalBatchSampler, Position, TrainingSample, sample_seed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, TimmConfig
from lit_clip.models.patches import unpacked
from lit_clip.module import LitCLIP
from tests.helpers.small_sets import make_module, make_trainer, write_table

BUDGETS = [4, 9, 16]


def budgets(**sampling: Any) -> list[int]:
    sampler = GlobalBatchSampler(64, 2, seed=3, **{"rank": 0, "world": 1, "budgets": BUDGETS, **sampling})
    batches = [{sample.budget for sample in batch} for batch in sampler]
    assert all(len(batch) == 1 for batch in batches)
    return [batch.pop() for batch in batches]


def test_every_rank_and_a_resumed_run_draw_the_same_budgets() -> None:
    whole = budgets()
    assert set(whole) == set(BUDGETS)
    assert budgets(rank=1, world=2) == budgets(rank=0, world=2) == whole[:16]
    assert budgets(start=Position(0, 5)) == whole[5:]
    assert budgets(start=Position(1, 0)) != whole


def test_a_budget_changes_no_random_number_of_a_sample() -> None:
    for draw in (0, 2):
        assert sample_seed(1, TrainingSample(4, 7, draw, 256)) == sample_seed(1, TrainingSample(4, 7, draw))


class _Recorder(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[int, list[str], int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: CaptionBatch, batch_idx: int) -> None:
        self.batches.append((batch.images.shape[1] - 1, batch.keys, int(batch.images.long().sum())))
        assert int(unpacked(batch.images).patch_valid.sum(dim=1).max()) <= batch.images.shape[1] - 1


def _fit(folder: Path, table: Path, steps: int, resume: Path | None = None) -> tuple[_Recorder, Path, LitCLIP]:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
    image = TimmConfig("naflexvit_base_patch16_siglip", image_size=32, projection="none", options=options)
    text = TextTransformerConfig(context_length=8, width=32, layers=1, heads=2)
    module = LitCLIP(CLIPConfig(embed_dim=32, image=image, text=text, logit_bias=True))
    data = Captions(str(table), str(table), batch_size=2, num_workers=0, patch_budgets=BUDGETS)
    recorder = _Recorder()
    trainer = make_trainer(folder, [recorder], max_steps=steps, limit_val_batches=1, enable_checkpointing=False)
    trainer.fit(module, data, ckpt_path=resume, weights_only=resume and True)
    path = folder / f"{steps}.ckpt"
    trainer.save_checkpoint(path)
    return recorder, path, module


def test_a_run_with_mixed_budgets_resumes_exactly(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows=16)
    whole, _, expected = _fit(tmp_path, table, 12)
    assert {patches for patches, _, _ in whole.batches} == set(BUDGETS)
    first, path, _ = _fit(tmp_path, table, 5)
    rest, _, found = _fit(tmp_path, table, 12, path)
    assert first.batches + rest.batches == whole.batches
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_other_budgets_are_refused_inside_an_epoch_and_none_are_not_compared(tmp_path: Path) -> None:
    data = Captions(str(write_table(tmp_path)), batch_size=2, num_workers=0, patch_budgets=BUDGETS)
    data.setup("fit")
    saved = {"epoch": 0, "batch": 1, "settings": data._settings(0)}
    data.load_state_dict(saved)
    assert data._start() == Position(0, 1)
    data.patch_budgets = [4, 9]
    with pytest.raises(InputError, match=r"data.patch_budgets \[4, 9, 16\] there and \[4, 9\] here; make them agree"):
        data._start()
    data.patch_budgets = []
    with pytest.raises(InputError, match=r"data.patch_budgets \[4, 9, 16\] there and None here"):
        data._start()
    del saved["settings"]["data.patch_budgets"]  # as saved without budgets, or before there were any
    assert data._start() == Position(0, 1)


def test_budgets_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    table = str(write_table(tmp_path))
    for wrong in ([], [0], [2**16]):
        with pytest.raises(InputError, match="must be numbers of patches"):
            Captions(table, table, patch_budgets=wrong)
    data = Captions(table, table, batch_size=2, num_workers=0, patch_budgets=BUDGETS)
    with pytest.raises(InputError, match="the model reads images of one size"):
        make_trainer(tmp_path, [], max_steps=1).fit(make_module(), data)


def test_training_crops_keep_the_images_shape() -> None:
    """A crop to the model's square would undo what NaFlex is for."""
    from PIL import Image

    from datamodules.loading.augmentation import Augmentation, TrainingTransform

    transform = TrainingTransform(Augmentation((0.9, 1.0)), Preprocessing(max_patches=64, patch_size=8), [16])
    wide = Image.linear_gradient("L").resize((400, 100)).convert("RGB")
    for budget, grid in ((0, [4, 16]), (16, [2, 8])):
        coord = unpacked(transform.at(budget)(wide)[None]).patch_coord
        assert (coord.amax(dim=1) + 1).tolist() == [grid]
