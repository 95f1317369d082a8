"""From a table to batches: what one holds, what its randomness depends on, which rank has which rows, and budgets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from datamodules import Augmentation, Captions
from datamodules.loading.augmentation import TrainingTransform
from datamodules.loading.sampling import GlobalBatchSampler, Position, TrainingSample, sample_seed
from datamodules.pairs.batches import TrainingPairs
from datamodules.pairs.source import Columns
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, TimmConfig
from lit_clip.models.patches import unpacked
from lit_clip.models.preprocess import normalize, pixels
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.module import LitCLIP
from tests.helpers.small_sets import make_module, make_trainer, write_table

SIZE = 17  # pixels; odd
ROWS = 21
SHORT = Preprocessing(image_size=SIZE)
CAPTIONS = ["a cat", "a photo of a cat", "a"]
IDS = {  # of OpenAI's vocabulary
    "a cat": [49406, 320, 2368, 49407],
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "a": [49406, 320, 49407],
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table of 21 noise images in several shapes; captions repeat every three rows."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for i in range(ROWS):
        noise = rng.integers(0, 256, (30 + i, 45 - i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.png")
    lines = [f"{i:02}.png,{CAPTIONS[i % 3]}" for i in range(ROWS)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    return folder / "captions.csv"


def data_module(
    table: Path, rank: int = 0, world: int = 1, preprocessing: Preprocessing = SHORT, **options: Any
) -> Captions:
    """Return the module of one rank, with all rows for both training and validation."""
    module = Captions(str(table), str(table), **{"batch_size": 4, "num_workers": 0, **options})
    module.preprocessing = preprocessing
    connector = SimpleNamespace(use_distributed_sampler=False)
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=world, _accelerator_connector=connector)
    module.trainer = trainer
    module.setup("fit")
    return module


def epoch_of(module: Captions, epoch: int = 0) -> list[CaptionBatch]:
    loader: Any = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def pixels_by_key(batches: list[CaptionBatch]) -> dict[str, Tensor]:
    return {key: image for batch in batches for key, image in zip(batch.keys, batch.images, strict=True)}


def same_pixels(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_batch_has_uint8_images_keys_and_tokens_without_needless_padding(table: Path) -> None:
    module = data_module(table)
    assert module.steps_per_epoch == ROWS // 4
    for batch in [*epoch_of(module), *module.val_dataloader()]:
        size = len(batch.keys)
        captions = [CAPTIONS[int(key.removesuffix(".png")) % 3] for key in batch.keys]
        longest = max(len(IDS[caption]) for caption in captions)
        assert isinstance(batch, CaptionBatch)
        assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (size, 3, SIZE, SIZE))
        assert batch.tokens.dtype == torch.int64
        padded = [IDS[caption] + [0] * (longest - len(IDS[caption])) for caption in captions]
        assert batch.tokens.tolist() == padded


def test_truncated_captions_end_with_the_end_of_text_token(table: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.csv"
    long.write_text("image,caption\n00.png," + "a cat " * 60 + "\n01.png,a cat\n", encoding="utf-8")
    module = Captions(val=str(long), columns=Columns(root=str(table.parent)), num_workers=0)
    module.preprocessing = SHORT
    module.setup("validate")
    (batch,) = module.val_dataloader()
    assert batch.tokens.shape == (2, 77)
    assert batch.tokens[0].tolist() == [49406, *[320, 2368] * 37, 320, 49407]


def test_pixels_do_not_depend_on_the_number_of_workers(table: Path) -> None:
    none, two = (epoch_of(data_module(table, num_workers=workers), epoch=1) for workers in (0, 2))
    assert [batch.keys for batch in none] == [batch.keys for batch in two]
    assert same_pixels(pixels_by_key(none), pixels_by_key(two))


def test_persistent_workers_augment_each_epoch_differently(table: Path) -> None:
    loader: Any = data_module(table, num_workers=1).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append(pixels_by_key(list(loader)))
    for epoch, seen in enumerate(epochs):
        assert same_pixels(seen, pixels_by_key(epoch_of(data_module(table), epoch)))


def test_pixels_do_not_depend_on_the_number_of_ranks(table: Path) -> None:
    single = pixels_by_key(epoch_of(data_module(table, batch_size=4)))
    ranks = [pixels_by_key(epoch_of(data_module(table, rank, 2, batch_size=2))) for rank in (0, 1)]
    assert not ranks[0].keys() & ranks[1].keys()
    assert same_pixels(single, ranks[0] | ranks[1])


def test_pixels_differ_between_epochs_and_seeds(table: Path) -> None:
    source = data_module(table).train_source
    assert source is not None
    square = TrainingTransform(Augmentation(crop_scale=(0.3, 1.0), color_jitter=0.2), SHORT)
    pairs, other_seed = TrainingPairs(source, square, seed=0), TrainingPairs(source, square, seed=1)
    for row in range(ROWS):
        first = pairs[TrainingSample(0, row)].image
        assert torch.equal(pairs[TrainingSample(0, row)].image, first)
        assert not torch.equal(pairs[TrainingSample(1, row)].image, first)
        assert not torch.equal(other_seed[TrainingSample(0, row)].image, first)


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_iterating_a_loader_does_not_change_the_global_generator(table: Path, loader: str) -> None:
    """Otherwise the number of validations would change a run's dropout."""
    module = data_module(table)
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    list(getattr(module, loader)())
    assert torch.equal(torch.rand(5), expected)


def test_validation_pixels_match_the_models_preprocessing_before_normalisation(
    table: Path, tiny_config: CLIPConfig
) -> None:
    preprocessing = Preprocessing(image_size=32, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model = CLIP(tiny_config)
    model.preprocessing = preprocessing
    module = data_module(table, preprocessing=preprocessing)
    for key, image in pixels_by_key(list(module.val_dataloader())).items():
        with Image.open(table.parent / key) as photo:
            assert torch.equal(image, pixels(preprocessing)(photo))
            assert torch.equal(normalize(image, preprocessing), model.preprocess(photo))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_validation_has_every_row_once_including_the_last_short_batch(table: Path, world: int) -> None:
    loaders = [list(data_module(table, rank, world, batch_size=4).val_dataloader()) for rank in range(world)]
    keys = [key for batches in loaders for batch in batches for key in batch.keys]
    assert sorted(keys) == [f"{i:02}.png" for i in range(ROWS)]
    assert [len(batch.keys) for batch in loaders[0]][-1] == -(-ROWS // world) % 4


def test_test_and_predict_loaders_have_the_validation_rows(table: Path) -> None:
    module = data_module(table)
    expected = [batch.keys for batch in module.val_dataloader()]
    assert [batch.keys for batch in module.test_dataloader()] == expected
    assert [batch.keys for batch in module.predict_dataloader()] == expected


def test_lightnings_distributed_sampler_is_refused_on_two_processes(table: Path) -> None:
    module = Captions(str(table), num_workers=0)
    connector = SimpleNamespace(use_distributed_sampler=True)
    trainer: Any = SimpleNamespace(global_rank=0, world_size=2, _accelerator_connector=connector)
    module.trainer = trainer
    with pytest.raises(InputError, match=r"pass Trainer\(use_distributed_sampler=False\)"):
        module.setup("fit")
    trainer.world_size = 1  # nothing to divide
    module.setup("fit")


class _Recorder(LightningModule):
    """Trains one number and records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing, self.tokenize = SHORT, CLIPTokenizer()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[CaptionBatch]] = {}

    def training_step(self, batch: CaptionBatch, _: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch)
        return self.weight * 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Save a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit_recorder(table: Path, ckpt_path: Path | None = None, **options: Any) -> tuple[Captions, _Recorder]:
    """Run three epochs of a real trainer that writes and prints nothing."""
    module, recorder = Captions(str(table), batch_size=4, num_workers=0), _Recorder()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", max_epochs=3, use_distributed_sampler=False, **options, **quiet)
    trainer.fit(recorder, module, ckpt_path=ckpt_path)
    return module, recorder


def test_each_epoch_of_a_real_trainer_has_its_own_order_and_augmentation(table: Path) -> None:
    module, recorder = fit_recorder(table, limit_val_batches=0)
    assert [len(batches) for batches in recorder.seen.values()] == [4, 4, 4]  # of 19 training pairs
    orders = [[key for batch in batches for key in batch.keys] for batches in recorder.seen.values()]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    for epoch, batches in recorder.seen.items():
        expected = epoch_of(module, epoch)
        assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
        assert same_pixels(pixels_by_key(batches), pixels_by_key(expected))


def test_overfit_batches_repeats_the_same_batch_every_epoch(table: Path) -> None:
    """Lightning takes the first batch of each epoch, which must then not change."""
    _, recorder = fit_recorder(table, overfit_batches=1)
    first, *others = [batch for (batch,) in recorder.seen.values()]
    assert len(others) == 2
    for batch in others:
        assert batch.keys == first.keys
        assert same_pixels(pixels_by_key([batch]), pixels_by_key([first]))


def test_overfit_batches_resumed_in_mid_epoch_goes_on_at_its_batch(table: Path, tmp_path: Path) -> None:
    _, recorder = fit_recorder(table, overfit_batches=2, callbacks=[SaveAt(3, tmp_path / "third.ckpt")])
    whole = [(batch.keys, batch.images) for batches in recorder.seen.values() for batch in batches]
    assert len(whole) == 6
    _, recorder = fit_recorder(table, overfit_batches=2, ckpt_path=tmp_path / "third.ckpt")
    resumed = [(batch.keys, batch.images) for batches in recorder.seen.values() for batch in batches]
    assert [keys for keys, _ in resumed] == [keys for keys, _ in whole[3:]]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(resumed, whole[3:], strict=True))


def measured_crops(width: int, height: int, image_size: int, draws: int) -> np.ndarray:
    """Measure crops of an image with red = 2 x and green = 2 y: left, top, width, height in pixels, ``[draws, 4]``."""
    assert 2 * max(width, height) <= 256
    photo = np.zeros((height, width, 3), np.uint8)
    photo[..., 0], photo[..., 1] = 2 * np.arange(width), 2 * np.arange(height)[:, None]
    transform = TrainingTransform(Augmentation(), Preprocessing(image_size=image_size, interpolation="bilinear"))
    image, crops = Image.fromarray(photo), []
    for _ in range(draws):
        crop = transform(image).double().numpy() / 2
        steps = np.arange(image_size)[3:-3]  # resampling flattens the ends
        sides = [np.polyfit(steps, line[3:-3], 1) for line in (crop[0].mean(0), crop[1].mean(1))]
        (across, left), (down, top) = sides
        crops.append((left + 0.5 - across / 2, top + 0.5 - down / 2, across * image_size, down * image_size))
    return np.array(crops)


def test_default_crop_is_a_square_of_at_least_nine_tenths_of_the_area() -> None:
    left, top, width, height = measured_crops(120, 120, image_size=40, draws=300).T
    assert np.abs(width - height).max() < 1  # pixels; resampling shifts the two axes differently
    side = np.sqrt(0.9) * 120
    assert width.min() > side - 1
    assert width.max() < 121
    assert width.min() < side + 1  # the whole range is used
    assert width.max() > 119
    assert left.max() > 4  # of at most 6
    assert top.max() > 4
    assert min(left.min(), top.min()) > -1


@pytest.mark.parametrize(("width", "height"), [(120, 90), (80, 120), (120, 68)])
def test_photos_of_usual_shapes_are_cropped_at_random_places(width: int, height: int) -> None:
    """4:3, 2:3 and 16:9: always the same crop would be no augmentation."""
    left, top, across, down = measured_crops(width, height, image_size=40, draws=60).T
    assert np.abs(across - down).max() < 1  # still a square
    assert (left if width > height else top).std() > 1  # pixels


def test_colour_jitter_stays_within_its_bounds() -> None:
    flat = Image.new("RGB", (20, 20), (100, 100, 100))
    jitter = TrainingTransform(Augmentation(color_jitter=0.2), SHORT)
    values = [float(jitter(flat).float().mean()) for _ in range(100)]
    assert 78 < min(values) < 90  # only brightness can change a flat grey: 80 to 120
    assert 110 < max(values) < 122


@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batch_has_the_same_pairs_on_any_number_of_ranks(table: Path, world: int) -> None:
    """Validation still uses ``batch_size``."""
    ranks = [data_module(table, rank, world, batch_size=3, global_batch_size=8) for rank in range(world)]
    epochs = [epoch_of(module) for module in ranks]
    steps = [{key for batches in epochs for key in batches[step].keys} for step in range(2)]
    assert [len(batches) for batches in epochs] == [2] * world
    assert [module.steps_per_epoch for module in ranks] == [2] * world
    assert {len(batch.keys) for batches in epochs for batch in batches} == {8 // world}
    single = epoch_of(data_module(table, batch_size=8))
    assert steps == [set(batch.keys) for batch in single]
    validation: Any = ranks[0].val_dataloader()
    assert [len(batch.keys) for batch in validation][0] == 3


@pytest.mark.parametrize(
    ("batch", "world", "words"),
    [
        (8, 3, ["8 pairs cannot be divided evenly among 3 processes", "6 or 9"]),
        (2, 3, ["2 pairs", "set it to 3"]),
        (22, 2, ["22 pairs per step are more than the 21 training pairs", "at most 20"]),
        (0, 1, ["global_batch_size: 0 must be at least 1"]),
    ],
)
def test_impossible_global_batch_size_is_refused(table: Path, batch: int, world: int, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        data_module(table, 0, world, global_batch_size=batch).train_dataloader()
    for word in words:
        assert word in str(error.value)


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


class _Budgets(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[int, list[str], int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: CaptionBatch, batch_idx: int) -> None:
        self.batches.append((batch.images.shape[1] - 1, batch.keys, int(batch.images.long().sum())))
        assert int(unpacked(batch.images).patch_valid.sum(dim=1).max()) <= batch.images.shape[1] - 1


def _fit(folder: Path, table: Path, steps: int, resume: Path | None = None) -> tuple[_Budgets, Path, LitCLIP]:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
    image = TimmConfig("naflexvit_base_patch16_siglip", image_size=32, projection="none", options=options)
    text = TextTransformerConfig(context_length=8, width=32, layers=1, heads=2)
    module = LitCLIP(CLIPConfig(embed_dim=32, image=image, text=text, logit_bias=True))
    data = Captions(str(table), str(table), batch_size=2, num_workers=0, patch_budgets=BUDGETS)
    recorder = _Budgets()
    trainer = make_trainer(folder, [recorder], max_steps=steps, limit_val_batches=1, enable_checkpointing=False)
    trainer.fit(module, data, ckpt_path=resume, weights_only=resume and True)
    path = folder / f"{steps}.ckpt"
    trainer.save_checkpoint(path)
    return recorder, path, module


@pytest.mark.slow
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
    transform = TrainingTransform(Augmentation((0.9, 1.0)), Preprocessing(max_patches=64, patch_size=8), [16])
    wide = Image.linear_gradient("L").resize((400, 100)).convert("RGB")
    for budget, grid in ((0, [4, 16]), (16, [2, 8])):
        coord = unpacked(transform.at(budget)(wide)[None]).patch_coord
        assert (coord.amax(dim=1) + 1).tolist() == [grid]
