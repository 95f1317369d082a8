"""A source of one's own keeps every promise: exact resume, ranks, bad samples, validation images, mixtures."""

import io
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import callbacks
from datamodules import Captions, CustomPairs
from datamodules.commands.inspect import inspect
from datamodules.commands.shard import shard
from datamodules.loading.bad_samples import BadSamples
from datamodules.open_source import open_source
from datamodules.pairs.findings import DataOptions
from lit_clip.distributed import RankCounts
from lit_clip.errors import BadSample, InputError
from lit_clip.losses import Loss, WholeBatch
from lit_clip.module import LitCLIP
from tests.fuzz.samples import encoded
from tests.helpers.epochs import assert_resumes, batches_of, opened
from tests.helpers.frozen_runs import Run
from tests.helpers.small_sets import make_trainer


class Shapes(CustomPairs):
    """Squares of the row's brightness, drawn at a random place; two captions each."""

    def __init__(self, rows: int = 20, images: int | None = None) -> None:
        self.rows, self.images = rows, images or rows

    def __len__(self) -> int:
        return self.rows

    def image(self, row: int) -> Image.Image:
        canvas = Image.new("L", (40, 30))
        canvas.paste(100 + row, (random.randrange(20), 5, 36, 25))
        return canvas

    def captions(self, row: int) -> list[str]:
        return [f"shape {row}", f"the square with number {row}"]

    def key(self, row: int) -> str:
        return f"square-{row % self.images}"

    def negatives(self, row: int) -> list[str]:
        return [f"no shape {row}", f"circle {row}"]


class Stored(CustomPairs):
    """Rows whose images are whatever the test gives."""

    def __init__(self, images: list[Any], captions: list[Any] | None = None) -> None:
        self.images, self.texts = images, captions

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int) -> Any:
        return self.images[row]() if callable(self.images[row]) else self.images[row]

    def captions(self, row: int) -> Any:
        return ["a photo"] if self.texts is None else self.texts[row]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def test_an_image_may_be_a_path_bytes_or_an_open_image(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    source = Stored([path, str(path), path.read_bytes(), noise(), Image.open(path)])
    source.check()
    for row in range(len(source)):
        assert np.array_equal(np.asarray(source.load(row, None).image), np.asarray(noise()))
        stored = Image.open(io.BytesIO(source.read(row).image))
        assert np.array_equal(np.asarray(stored), np.asarray(noise()))


def test_validation_takes_the_first_caption_and_training_draws_one() -> None:
    source = Shapes()
    assert source.load(3, None)[1:6] == ("shape 3", "square-3", "", "", {})
    assert {source.load(3, random.Random(seed)).caption for seed in range(20)} == set(source.captions(3))
    assert {source.load(3, random.Random(seed)).negative for seed in range(20)} == set(source.negatives(3))


def missing() -> Any:
    return Image.open("nowhere.png")


@pytest.mark.parametrize(
    ("image", "captions", "reason"),
    [
        ("nowhere.png", ["a"], "missing image"),
        (missing, ["a"], "missing image"),
        (b"not an image", ["a"], "not an image"),
        (lambda: Image.open(io.BytesIO(encoded(noise(), "PNG")[:200])), ["a"], "broken image"),
        (noise, [], "no caption"),
        (noise, [" "], "no caption"),
        (noise, [7], "caption is not text"),
    ],
)
def test_what_cannot_be_read_is_a_bad_sample(image: Any, captions: list[Any], reason: str) -> None:
    source = Stored([image], [captions])
    for read in (lambda: source.load(0, None), source.check):
        with pytest.raises(BadSample, match="^Stored row 0: ") as error:
            read()
        assert error.value.reason == reason


def test_a_text_that_is_missing_is_not_called_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stored, "captions", lambda self, row: [Path("nowhere.txt").read_text()])
    with pytest.raises(BadSample, match=r"^Stored row 0: no such file: nowhere\.txt$"):
        Stored([noise()]).load(0, None)


def test_a_source_that_does_not_keep_the_contract_is_refused_before_training() -> None:
    for source, message in [
        (Stored([]), "Stored: has no rows"),
        (Stored([np.zeros((3, 3, 3))]), r"Stored row 0: image\(\) returned a ndarray, not a PIL image, path or bytes"),
        (Stored([noise()], ["a photo"]), r"Stored row 0: captions\(\) returned a str, not a list"),
        (Stored([noise()]), "one image cannot be divided; set data.val"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            Captions(source).setup("fit")
        assert not isinstance(error.value, BadSample)


def test_without_validation_data_no_image_is_in_both_parts() -> None:
    data = opened(Shapes(rows=60, images=20))
    assert data.train_source is not None
    assert data.val_source is not None
    train, val = ({s.load(i, None).key for i in range(len(s))} for s in (data.train_source, data.val_source))
    assert not train & val
    assert len(val) == 2
    assert len(data.train_source) + len(data.val_source) == 60


def test_skipped_rows_are_listed_by_the_sources_name() -> None:
    data = opened(Stored([noise()] * 3 + ["nowhere.png"]), bad_samples=BadSamples("skip"), val=Shapes())
    (batch,) = data.train_dataloader()
    assert len(batch.keys) == 3
    assert batch.skipped == [("Stored row 3", "missing image")]


@pytest.mark.parametrize("as_object", [True, False])
def test_a_mixture_has_its_share_of_own_rows(as_object: bool, tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,caption\n" + "a.png,a\n" * 10)
    own: Any = {"class_path": f"{__name__}.Shapes", "init_args": {"rows": 10}}
    own, table = Shapes(10) if as_object else own, str(tmp_path / "t.csv")
    parts: Any = [{"data": table, "weight": 1}, {"data": own, "weight": 3}]
    data = opened(parts, val=Shapes())
    keys = [key for batch in data.train_dataloader() for key in batch.keys]
    assert sum(key.startswith("1:square-") for key in keys) == 15
    assert len(keys) == 20


def epoch(world: int, workers: int) -> dict[str, torch.Tensor]:
    batch_size, augmentation = 4 // world, [v2.RandAugment()]
    data = opened(Shapes(), val=Shapes(), batch_size=batch_size, num_workers=workers, augmentation=augmentation)
    batches = [batch for rank in range(world) for batch in batches_of(data, 0, rank, world)]
    return {key: image for batch in batches for key, image in zip(batch.keys, batch.images, strict=True)}


def test_what_a_source_draws_at_random_depends_neither_on_workers_nor_on_ranks() -> None:
    expected = epoch(1, workers=0)
    assert len(expected) == 20
    for found in (epoch(1, workers=2), epoch(2, workers=0), epoch(2, workers=1)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_a_run_resumed_within_an_epoch_continues_with_the_same_pixels_to_the_same_weights(tmp_path: Path) -> None:
    data: dict[str, Any] = {"augmentation": [v2.RandomResizedCrop(32), v2.RandAugment()], "batch_size": 4}
    run = Run(str(tmp_path / "run"), Shapes(), data={**data, "num_workers": 1})  # pyright: ignore[reportArgumentType]
    whole = assert_resumes(run, 2, {**data, "seed": 2}, r"data\.seed")
    assert len(whole.samples) == 2 * 5


def test_commands_take_a_class_path_in_braces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = f"{{class_path: {__name__}.Shapes, init_args: {{rows: 9}}}}"
    inspect(DataOptions([own]), num_workers=0)
    assert "9" in capsys.readouterr().out
    assert (tmp_path / "inspect.html").exists()
    nothing = own.replace("9", "0")
    empty = DataOptions([nothing])
    for command in (lambda: inspect(empty, num_workers=0), lambda: shard(nothing, "nothing", num_workers=1)):
        with pytest.raises(InputError, match="has no pairs"):
            command()
    shard(own, "shards", num_workers=1)
    shards = open_source("shards")
    assert [shards.captions(row)[0] for row in range(9)] == [f"shape {row}" for row in range(9)]
    with pytest.raises(InputError, match="lines: Shapes has no such option"):
        open_source(f"{{class_path: {__name__}.Shapes, init_args: {{lines: 9}}}}")


class Weighted(CustomPairs):
    """Twelve pairs, the third of which cannot be read, and the fifth and sixth of which share an image."""

    def __len__(self) -> int:
        return 12

    def image(self, index: int) -> Image.Image:
        if index == 2:
            raise OSError("gone")
        return Image.new("RGB", (32, 32), (20 * index, 0, 0))

    def captions(self, index: int) -> list[str]:
        return [f"number {index}"]

    def key(self, index: int) -> str:
        return "4" if index == 5 else str(index)

    def extra(self, index: int) -> dict[str, Any]:
        return {"weight": index / 8, "place": torch.tensor([index, -index])}


class Recording(Loss):
    """Records what each pair comes with."""

    uses_negatives = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, float, list[int]]] = []

    def whole_batch(self, pairs: WholeBatch) -> torch.Tensor:
        weight, place = pairs.extra("weight"), pairs.extra("place")
        self.seen += zip(pairs.captions, weight.tolist(), place.tolist(), strict=True)
        return (weight * (1 - (pairs.image * pairs.text).sum(dim=1))).mean()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_loss_gets_what_a_source_gives_for_each_row(workers: int, tmp_path: Path) -> None:
    bad = BadSamples("skip", 0.5)
    data = Captions(Weighted(), Weighted(), batch_size=6, num_workers=workers, bad_samples=bad)
    loss = Recording()
    module = LitCLIP("ViT-tiny-16-64", loss=loss, micro_batch_size=2)
    trainer = make_trainer(tmp_path, callbacks.defaults(), max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, data)
    assert len({caption for caption, *_ in loss.seen}) == 11
    for caption, weight, place in loss.seen:
        index = int(caption.split()[1])
        assert (weight, place) == (index / 8, [index, -index])


def test_a_loss_whose_source_gives_nothing_for_its_rows_is_one_line(tmp_path: Path) -> None:
    data = Captions(Shapes(), Shapes(), batch_size=4, num_workers=0)
    module = LitCLIP("ViT-tiny-16-64", loss=Recording())
    with pytest.raises(InputError, match=r"model\.loss: the data have no weight; see CustomPairs\.extra"):
        make_trainer(tmp_path, [], max_steps=1, enable_checkpointing=False).fit(module, data)


class Uneven(Weighted):
    """Its rows give other things."""

    def __init__(self, extras: list[Any]) -> None:
        self.extras = extras

    def __len__(self) -> int:
        return len(self.extras)

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (32, 32), (20 * index, 0, 0))

    def extra(self, index: int) -> Any:
        return self.extras[index]


@pytest.mark.parametrize(
    ("extras", "parts"),
    [
        ([{"w": 1.0}, {}], ["w [] torch.float32", "nothing"]),
        ([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}], ["w [2]", "w [3]"]),
        ([{"w": "a"}] * 2, ["Uneven row", "extra() must have numbers or tensors"]),
        ([{"w": 10**400}] * 2, ["Uneven row", "extra() must have numbers or tensors"]),
        ([None] * 2, ["Uneven row", "extra() returned a NoneType, not a mapping"]),
    ],
)
def test_rows_that_give_other_things_are_one_line(extras: list[Any], parts: list[str], tmp_path: Path) -> None:
    data = Captions(Uneven(extras), Shapes(), batch_size=2, num_workers=0)
    with pytest.raises(InputError) as error:
        make_trainer(tmp_path, [], max_steps=1, enable_checkpointing=False).fit(LitCLIP("ViT-tiny-16-64"), data)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_numbers_may_be_whole_in_some_rows(tmp_path: Path) -> None:
    source = Uneven([{"w": 1}, {"w": 0.5}, {"w": True}, {"w": np.float64(2)}])
    data = Captions(source, Shapes(), batch_size=4, num_workers=0)
    make_trainer(tmp_path, [], max_steps=1, enable_checkpointing=False).fit(LitCLIP("ViT-tiny-16-64"), data)
    (batch,) = data.train_dataloader()
    assert batch.extra["w"].dtype == torch.float32
    assert sorted(batch.extra["w"].tolist()) == [0.5, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("key", [lambda index: index, lambda index: Path(f"{index}"), lambda index: f"\udcff{index}"])
def test_validation_images_are_chosen_among_keys_of_any_kind(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Shapes()
    monkeypatch.setattr(source, "key", key)
    monkeypatch.setattr(source, "image_names", lambda: [key(index) for index in range(len(source))])
    train, val = source.divide(0.25, 0)
    assert (len(train), len(val)) == (15, 5)


def test_what_is_sent_between_ranks_is_no_larger_than_what_a_source_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def gathered(values: list[Any]) -> list[Any]:
        sent.append(len(pickle.dumps(values)))
        return values

    monkeypatch.setattr("lit_clip.distributed.gather_objects", gathered)
    batch = SimpleNamespace(extra={"w": torch.zeros(2048, 8)[:1024]})  # rows of a larger tensor
    whole = WholeBatch(
        SimpleNamespace(batch=batch, image=torch.zeros(1024, 4), scale=1, bias=None, ranks=RankCounts(0, (1024, 0)))
    )  # type: ignore[arg-type]
    whole.image = torch.zeros(1024, 4)  # of both ranks, the second of which has none
    assert whole.extra("w").shape == (1024, 8)
    assert sent[0] < 1024 * 8 * 4 + 2000
