"""Training on stored features of frozen layers equals training on images and captions."""

import csv
import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from callbacks import (
    EMA,
    ActivationCheckpointing,
    Compile,
    EmbeddingProjector,
    FrozenFeatures,
    PatchDropout,
    SimilarityMatrix,
    Throughput,
)
from datamodules import OpenMoji
from datamodules.loading.augmentation import Augmentation
from datamodules.loading.bad_samples import BadSamples
from datamodules.pairs.columns import ColumnPairs
from datamodules.pairs.source import CaptionOptions, Columns
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Loss, Sum
from lit_clip.module import LitCLIP
from lit_clip.tools.stored_rows import ABSENT, DONE, StoredRows
from lit_clip.training.losses import OtherImageContrastive, PlaceContrastive
from lit_clip.training.preservation import Preservation
from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.forks import CONTEXT
from tests.helpers.frozen_runs import FREEZES, Recorder, Run, config_of, fit, killed_at_second_batch
from tests.helpers.towers import WORDS
from tests.test_module import trainer

IMAGES, ROWS = 14, 21
FREEZING = ["all", "unlock_last 0", "unlock_last 1"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, caption_table: Path) -> Path:
    """Return 21 rows of 14 real drawings, each with one to three captions."""
    folder = tmp_path_factory.mktemp("frozen")
    with caption_table.open(encoding="utf-8") as file:
        images = [caption_table.parent / row["image"] for row in csv.DictReader(file)][:IMAGES]
    for number, image in enumerate(images):
        (folder / f"{number:02d}.png").write_bytes(image.read_bytes())
    texts = [" ".join(WORDS[(row + i * i) % len(WORDS)] for i in range(1 + row % 7)) for row in range(ROWS * 3)]
    rows = [
        {"image": f"{row % IMAGES:02d}.png", "caption": texts[3 * row : 3 * row + 1 + row % 3]} for row in range(ROWS)
    ]
    path = folder / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def run(table: Path, tmp_path: Path) -> Run:
    return Run(str(tmp_path), str(table))


Fitted = tuple[Recorder, Any]


def stored(run: Run, *callbacks: Callback) -> Fitted:
    """Train the same run on stored features."""
    return fit(run._replace(cache=f"{run.folder}/cache"), *callbacks)


@pytest.fixture(scope="module")
def plain_run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Fitted]:
    """Train some towers, partly frozen, on images and captions; once, because tests only read the results."""
    folder = str(tmp_path_factory.mktemp("plain"))
    return cache(lambda towers, freeze: fit(Run(folder, str(table), towers, freeze)))


@pytest.fixture(scope="module")
def stored_run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """The folder of the default run's stored features, and what the run recorded."""
    run = Run(str(tmp_path_factory.mktemp("stored")), str(table))
    return Path(run.folder, "cache"), stored(run)[0]


@pytest.fixture
def whole(run: Run, stored_run: tuple[Path, Recorder]) -> Recorder:
    """What the default run recorded; the test's own run finds a copy of its stored features."""
    shutil.copytree(stored_run[0], Path(run.folder, "cache"))
    return stored_run[1]


def check_equal(run: Run, *callbacks: Callable[[], Callback], tolerance: float = 1e-5) -> None:
    check_like(fit(run, *(make() for make in callbacks)), run, *callbacks, tolerance=tolerance)


def check_like(plainly: Fitted, run: Run, *callbacks: Callable[[], Callback], tolerance: float = 1e-5) -> None:
    plain, plain_module = plainly
    cached, cached_module = stored(run, *(make() for make in callbacks))
    assert cached.samples == plain.samples
    assert cached.losses == pytest.approx(plain.losses, rel=tolerance, abs=tolerance)
    assert cached.validations == pytest.approx(plain.validations, rel=tolerance, abs=tolerance)
    assert len(plain.losses) == 4
    weights = cached_module.model.state_dict()
    for name, value in plain_module.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


TOWERS = [*[("vit", freeze) for freeze in (*FREEZING, "image", "text")], *[("bert", freeze) for freeze in FREEZING]]


def of_towers(run: Run, towers: str, folders: dict[str, Path]) -> Run:
    return run._replace(towers=str(folders["bert"]) if towers == "bert" else towers)


OTHERS = [("resnet", "unlock_last 0"), ("resnet", "unlock_last 1"), ("coca", "unlock_last 1")]


# Of the others, one stores the same layers of each kind of tower.
QUICK = [
    ("vit", "all"),
    ("vit", "text"),
    ("bert", "unlock_last 1"),
    ("resnet", "unlock_last 1"),
    ("coca", "unlock_last 1"),
]


@pytest.mark.parametrize(
    ("towers", "freeze"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in (*TOWERS, *OTHERS)],
)
def test_losses_equal_those_of_the_plain_run(
    towers: str, freeze: str, run: Run, folders: dict[str, Path], plain_run: Callable[[str, str], Fitted]
) -> None:
    run = of_towers(run, towers, folders)._replace(freeze=freeze)
    check_like(plain_run(run.towers, freeze), run)


@pytest.mark.parametrize("towers", [pytest.param("vit", marks=pytest.mark.slow), "bert"])
def test_two_ranks_share_the_files_and_have_the_losses_of_one(
    towers: str, run: Run, folders: dict[str, Path], tmp_path: Path, plain_run: Callable[[str, str], Fitted]
) -> None:
    runs = [of_towers(run, towers, folders)._replace(freeze=freeze) for freeze in FREEZING]
    two = {"cache": f"{run.folder}/cache", "data": {"batch_size": 4}, "trainer": {"devices": 2, "strategy": "ddp"}}
    script = str(ROOT / "tests/helpers/frozen_runs.py")
    words = [json.dumps([{**each._asdict(), **two} for each in runs])]
    run_lightning_ranks(2, tmp_path, script, "some", str(tmp_path / "found.json"), *words)
    for each, found in zip(runs, json.loads((tmp_path / "found.json").read_text()), strict=True):
        assert not found["decoded"]
        if towers == "bert" and each.freeze == "unlock_last 1":
            continue  # BatchNorm behind the boundary normalises within a rank
        plain, _ = plain_run(each.towers, each.freeze)
        assert found["losses"] == pytest.approx(plain.losses, rel=1e-5)
        assert found["validations"] == pytest.approx(plain.validations, rel=1e-5)
    for folder in (tmp_path / "cache").iterdir():
        assert (StoredRows(folder).state() == DONE).all()


@pytest.mark.parametrize(
    ("model", "callbacks"),
    [
        ({"micro_batch_size": 3}, ()),
        ({"rates": {"head": 2.0, "layer_decay": 0.7}}, (partial(EMA, 0.5),)),
        ({"loss": Contrastive("positives")}, (ActivationCheckpointing,)),
    ],
    ids=["micro-batches", "EMA and layer decay", "positives and activation checkpointing"],
)
def test_losses_stay_equal_with(model: dict[str, Any], callbacks: tuple[Callable[[], Callback], ...], run: Run) -> None:
    check_equal(run._replace(freeze="unlock_last 1", model=model), *callbacks)


def test_losses_stay_equal_with_kept_images_that_are_encoded_in_each_step(run: Run, table: Path) -> None:
    loss = Sum([Contrastive(), Preservation(str(table), 4)])
    check_equal(run._replace(freeze="unlock_last 1", model={"loss": loss}))


def test_losses_stay_equal_without_a_batch_size(run: Run) -> None:
    check_equal(run._replace(freeze="unlock_last 1", data={"batch_size": None, "global_batch_size": 8}))


def test_losses_stay_equal_to_a_percent_in_bfloat16(run: Run) -> None:
    check_equal(run._replace(freeze="unlock_last 1", trainer={"precision": "bf16-mixed"}), tolerance=1e-2)


def test_a_lora_trains_in_the_blocks_behind_the_stored_activations(run: Run, table: Path) -> None:
    _, base = fit(run._replace(epochs=1))
    base.trainer.save_checkpoint(Path(run.folder, "base.ckpt"), weights_only=True)
    lora = {"lora": {"r": 2, "alpha": 4.0}, "pretrained": f"{run.folder}/base.ckpt"}
    check_equal(run._replace(freeze="unlock_last 1", model=lora))


def test_a_run_resumed_in_mid_epoch_has_the_losses_of_an_uninterrupted_one(run: Run, whole: Recorder) -> None:
    first, _ = stored(run._replace(stop_at=1, trainer={"max_steps": 1}))
    before = folders_of(run)
    rest, _ = stored(run._replace(resume=True))
    assert folders_of(run) == before  # of frozen weights alone: those that are trained have changed
    assert first.losses + rest.losses == whole.losses
    assert first.samples + rest.samples == whole.samples


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every image that is loaded."""
    loaded: list[str] = []
    load = ColumnPairs.load

    def counting(self: ColumnPairs, index: int, rng: Any) -> Any:
        pair = load(self, index, rng)
        loaded.append(pair.key)
        return pair

    monkeypatch.setattr(ColumnPairs, "load", counting)
    return loaded


def test_each_image_is_decoded_once_and_a_second_run_decodes_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = counted(monkeypatch)
    first, _ = stored(run)
    assert not first.decoded
    assert len(loaded) == 2 * IMAGES  # for training, and for validation
    loaded.clear()
    again, _ = stored(run)
    assert loaded == []
    assert again.losses == first.losses


def folders_of(run: Run) -> set[str]:
    return {folder.name for folder in Path(run.folder, "cache").iterdir()}


@pytest.fixture
def copied(run: Run, table: Path) -> Run:
    """The run on copies of its images."""
    for file in table.parent.iterdir():
        Path(run.folder, file.name).write_bytes(file.read_bytes())
    return run._replace(table=f"{run.folder}/{table.name}")


def change_an_image(run: Run) -> None:
    image = Path(run.folder, "03.png")
    image.write_bytes(Path(run.folder, "04.png").read_bytes())
    os.utime(image, ns=(1, 1))


def change_a_caption(run: Run) -> None:
    table = Path(run.table)
    table.write_text(table.read_text().replace('["', '["sports ', 1))


@pytest.mark.parametrize(("change", "tower"), [(change_an_image, "image"), (change_a_caption, "text")])
def test_what_has_changed_is_encoded_anew_and_the_rest_is_not(
    change: Callable[[Run], None], tower: str, copied: Run
) -> None:
    stored(copied._replace(epochs=1))
    before = folders_of(copied)
    change(copied)
    cached, _ = stored(copied)
    plain, _ = fit(copied)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [name.partition("-")[0] for name in folders_of(copied) - before] == [tower]


def zeroed(data: bytearray, row: int) -> None:
    data[:row] = bytes(row)


def swapped(data: bytearray, row: int) -> None:
    data[:row], data[row : 2 * row] = data[row : 2 * row], data[:row]


def not_numbers(data: bytearray, row: int) -> None:
    data[-row:] = b"\xff" * row


@pytest.mark.parametrize("damage", [zeroed, swapped, not_numbers])
def test_damaged_rows_of_both_towers_are_encoded_again_and_not_trained_on(
    damage: Callable[[bytearray, int], None], run: Run, whole: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for tower in ("image", "text"):
        (folder,) = Path(run.folder, "cache").glob(f"{tower}-*")
        values, rows = bytearray((folder / "values").read_bytes()), StoredRows(folder).rows
        damage(values, len(values) // rows)
        (folder / "values").write_bytes(values)
        damaged = 2 if damage is swapped else 1
        lines.append(f"{folder}: {damaged} of {rows} stored rows are damaged and encoded again\n")
    again, _ = stored(run)
    assert again.losses == pytest.approx(whole.losses, rel=1e-5)  # in other batches
    err = capsys.readouterr().err
    assert [line for line in lines if line not in err] == []


class ChangeWeight(Callback):
    """Change one frozen weight of a tower before training starts."""

    changes_model = True

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        with torch.no_grad():
            pl_module.model.get_parameter(self.name).flatten()[0] += 0.5


@pytest.mark.parametrize(
    ("name", "tower"), [("visual.conv1.weight", "image"), ("transformer.resblocks.0.ln_1.bias", "text")]
)
@pytest.mark.usefixtures("whole")
def test_a_changed_weight_encodes_its_tower_anew(name: str, tower: str, run: Run) -> None:
    before = folders_of(run)
    cached, _ = stored(run, ChangeWeight(name))
    plain, _ = fit(run, ChangeWeight(name))
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [each.partition("-")[0] for each in folders_of(run) - before] == [tower]


def test_another_image_size_or_precision_is_another_file(run: Run) -> None:
    stored(run._replace(epochs=1))
    for change in ({"model": {"image_size": 48}}, {"trainer": {"precision": "bf16-mixed"}}):
        before = folders_of(run)
        stored(run._replace(epochs=1, **change))
        assert any(name.startswith("image-") for name in folders_of(run) - before)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_killed_while_encoding_goes_on_where_it_was(
    sent: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch, plain_run: Callable[[str, str], Fitted]
) -> None:
    expected, _ = plain_run(run.towers, run.freeze)
    process = CONTEXT.Process(target=killed_at_second_batch, args=(run._replace(cache=f"{run.folder}/cache"), sent))
    process.start()
    process.join(60)
    assert process.exitcode == -sent
    (half,) = Path(run.folder, "cache").iterdir()
    assert sorted(set(StoredRows(half).state())) == [ABSENT, DONE]
    loaded = counted(monkeypatch)
    cached, _ = stored(run)
    assert len(loaded) == 2 * IMAGES - 8  # without the first batch
    assert cached.losses == pytest.approx(expected.losses, rel=1e-5)


def test_fixed_augmentations_are_drawn_by_epoch_and_decoded_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run._replace(augmentations=3, epochs=3, data={"augmentation": Augmentation((0.3, 1.0))})
    loaded = counted(monkeypatch)
    first, _ = stored(run)
    assert len(loaded) == 3 * IMAGES + IMAGES
    again, _ = stored(run)
    assert again.losses == first.losses
    one, _ = stored(run._replace(augmentations=1))
    assert one.losses != first.losses
    assert one.samples == first.samples


def test_a_version_is_an_augmented_image_that_training_would_use(run: Run, tmp_path: Path) -> None:
    """One version of each image, which the plain run would draw in its first epoch if the rows had one image each."""
    rows = [json.loads(line) for line in Path(run.table).read_text().splitlines()][:IMAGES]
    table = Path(run.table).with_name("distinct.jsonl")
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = run._replace(table=str(table), epochs=1, data={"augmentation": Augmentation((0.3, 1.0))})
    cached, _ = stored(run._replace(augmentations=1))
    plain, _ = fit(run)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)


def test_an_unreadable_image_is_skipped_as_in_the_plain_run(copied: Run) -> None:
    Path(copied.folder, "03.png").write_bytes(b"no image")
    check_equal(copied._replace(data={"bad_samples": BadSamples("skip", 1.0)}))
    with pytest.raises(InputError, match=r"captions.jsonl row 4.*03.png"):
        stored(copied)


def test_a_run_logs_no_picture_and_no_mfu(run: Run) -> None:
    projector = EmbeddingProjector()
    _, module = stored(
        run._replace(trainer={"logger": True, "log_every_n_steps": 1}), SimilarityMatrix(), projector, Throughput()
    )
    assert "train/samples_per_second" in module.trainer.callback_metrics
    assert "train/mfu" not in module.trainer.callback_metrics


def test_a_later_validation_decodes_images_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, module = stored(run)
    loaded = counted(monkeypatch)
    data: Any = module.trainer.datamodule
    found = module.trainer.validate(module, data, verbose=False)
    assert len(loaded) == ROWS
    assert found[0]["val/loss"] == pytest.approx(cached.validations[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "callback", "message"),
    [
        ({"data": {"augmentation": None}}, None, "data.augmentation to []"),
        ({"augmentations": 2}, None, "2 versions would be the same"),
        ({"freeze": "nothing"}, None, "no encoder has frozen layers"),
        (
            {"freeze": "text", "data": {"captions": CaptionOptions("sentences")}},
            None,
            "set data.captions.long to truncate",
        ),
        ({"data": {"columns": Columns(negative="image")}}, None, "hard negatives"),
        ({"freeze": "unlock_last 1"}, Compile, "callbacks.Compile"),
        ({"freeze": "unlock_last 1"}, PatchDropout, "random in training"),
        ({"towers": "t5", "freeze": "unlock_last 1"}, None, "the frozen layers of the text encoder"),
    ],
)
def test_what_cannot_be_stored_exactly_is_refused(
    change: dict[str, Any], callback: type[Callback] | None, message: str, run: Run, folders: dict[str, Path]
) -> None:
    if change.get("towers") == "t5":
        change = {**change, "towers": str(folders["t5"])}
    with pytest.raises(InputError, match=re.escape(message)):
        stored(run._replace(**change), *([callback()] if callback else []))


@pytest.mark.parametrize("term", [OtherImageContrastive, PlaceContrastive])
def test_a_loss_of_images_is_refused_before_anything_is_encoded(term: Callable[..., Loss], run: Run) -> None:
    with pytest.raises(InputError, match=f"FrozenFeatures: {term.__name__} needs images; remove one of them"):
        stored(run._replace(model={"loss": Sum([Contrastive(), term()])}))
    assert not Path(run.folder, "cache").exists()


def test_hard_negatives_are_drawn_as_in_the_plain_run_where_only_images_are_stored(run: Run, table: Path) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    wrong = table.with_name("negatives.jsonl")
    lines = [json.dumps({**row, "wrong": [f"{text} rain" for text in row["caption"]]}) for row in rows]
    wrong.write_text("\n".join(lines), encoding="utf-8")
    check_equal(run._replace(table=str(wrong), freeze="image", data={"columns": Columns(negative="wrong")}))


def fit_drawings(run: Run, drawings_cache: Path, *callbacks: Callback) -> list[float]:
    """Train on drawings, whose captions are names with tags drawn at random, and return the losses."""
    torch.manual_seed(0)
    recorder, module = Recorder(run), LitCLIP(config_of("vit"), freeze=FREEZES["unlock_last 0"])
    data = OpenMoji(cache_dir=str(drawings_cache), batch_size=64, num_workers=0, augmentation=[])
    trainer(Path(run.folder), max_steps=3, callbacks=[*callbacks, recorder]).fit(module, data)
    return recorder.losses


def test_captions_drawn_at_random_are_encoded_in_each_step(run: Run, drawings_cache: Path) -> None:
    folder = Path(run.folder, "cache")
    expected = fit_drawings(run, drawings_cache)
    assert fit_drawings(run, drawings_cache, FrozenFeatures(str(folder))) == pytest.approx(expected, rel=1e-5)
    assert [path.name.partition("-")[0] for path in folder.iterdir()] == ["image"]


def test_captions_that_the_data_do_not_list_are_refused(
    run: Run, drawings_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenMoji, "lists_captions", True)
    with pytest.raises(InputError, match="a caption is not among those that the data list"):
        fit_drawings(run, drawings_cache, FrozenFeatures(f"{run.folder}/cache"))


def test_rows_of_any_type_are_read_as_written(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        values = torch.randn(3, 4, 5).to(dtype)
        rows = StoredRows.create(tmp_path / str(dtype), 7, (4, 5), dtype)
        rows.write(np.array([5, 0, 3]), values)
        assert rows.read(np.array([0, 3, 5])) is None  # not on the disk yet
        rows.close()
        rows = pickle.loads(pickle.dumps(rows))
        found = rows.read(np.array([0, 3, 5]))
        assert found is not None
        assert torch.equal(found, values[[1, 2, 0]])
        assert rows.read(np.array([0, 1])) is None
        assert rows.read(6) is None


def test_a_folder_that_cannot_be_written_is_one_line(run: Run) -> None:
    Path(run.folder, "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cache: cannot be created \(File exists\)"):
        stored(run)
