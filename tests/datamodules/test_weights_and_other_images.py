"""Weights of pairs, titles, and other images of the same thing: from columns of a table to the batch and the loss."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datamodules import Captions
from datamodules.commands.shard import shard
from datamodules.loading.augmentation import Augmentation
from datamodules.loading.bad_samples import BadSamples
from datamodules.open_source import open_source
from datamodules.pairs.image_captions import chosen_pairs
from datamodules.pairs.source import Columns, ImageOptions, PairSource
from lit_clip.batch import CaptionBatch
from lit_clip.errors import BadSample, InputError
from lit_clip.losses import Contrastive, Sum, WeightedContrastive
from lit_clip.losses.contrastive import contrastive_loss
from lit_clip.models.config import Preprocessing
from lit_clip.models.finetuning import Freeze
from lit_clip.training.losses import OtherImageContrastive, WithTitle
from tests.helpers.epochs import tabulated
from tests.helpers.small_sets import make_module, make_trainer
from tests.helpers.tar_shards import write_tar

WEIGHTS = [0.5, 2, 0, 1e-3]
OTHERS = ["back0.png", "", None, "3.png"]  # of another colour, none, none, the image itself
BOTH, TWO = Columns(image=["image", "back"]), ImageOptions("two")
FORMATS = [".csv", ".jsonl", ".parquet"]


def table(folder: Path, suffix: str, weights: list[Any] = WEIGHTS) -> Path:
    """Write four rows, whose images are noise."""
    for name in ("0.png", "1.png", "2.png", "3.png", "back0.png"):
        blue = name.startswith("back")
        noise = Image.effect_noise((48, 40), 90)
        Image.merge("RGB", (noise.point(lambda x: 0), noise.point(lambda x: 0), noise) if blue else (noise,) * 3).save(
            folder / name
        )
    images = [f"{row}.png" for row in range(4)]
    columns = {"image": images, "caption": list("abcd"), "score": weights, "back": OTHERS}
    if suffix == ".parquet" and not all(isinstance(weight, int | float) for weight in weights):
        columns["score"] = list(map(str, weights))
    return tabulated(folder / f"captions{suffix}", columns)


def shards(folder: Path, weights: list[Any]) -> Path:
    image = (folder / "0.png").read_bytes()
    fields = [json.dumps({"caption": "a", "score": weight}).encode() for weight in weights]
    write_tar(folder / "a.tar", [(str(row), {"png": image, "json": each}) for row, each in enumerate(fields)])
    return folder / "a.tar"


def batches(path: Path, columns: Columns, **options: Any) -> tuple[CaptionBatch, CaptionBatch]:
    """Return the training batch of the first epoch in the table's order, and the first validation batch."""
    data = Captions(str(path), str(path), columns=columns, **{"batch_size": 4, "num_workers": 0, **options})
    data.preprocessing = Preprocessing(image_size=32)
    data.setup("fit")
    (batch,), (validation, *_) = data.train_dataloader(), data.val_dataloader()
    order = sorted(range(len(batch.keys)), key=lambda row: (batch.captions[row], batch.keys[row]))
    extra = {name: value[order] for name, value in batch.extra.items()}
    captions = [batch.captions[row] for row in order]
    return batch._replace(images=batch.images[order], captions=captions, extra=extra), validation


@pytest.mark.parametrize("suffix", [*FORMATS, ".tar"])
def test_each_pair_has_the_weight_of_its_row(suffix: str, tmp_path: Path) -> None:
    path = table(tmp_path, suffix if suffix in FORMATS else ".csv")
    batch, _ = batches(path if suffix in FORMATS else shards(tmp_path, WEIGHTS), Columns(weight="score"))
    assert batch.extra["weight"].dtype == torch.float32
    assert batch.extra["weight"].tolist() == pytest.approx(WEIGHTS)


def first_problem(source: PairSource) -> str:
    for row in range(len(source)):
        try:
            source.load(row, None)
        except BadSample as error:
            with pytest.raises(BadSample):
                source.text(row, random.Random())
            return str(error)
    return ""


@pytest.mark.parametrize("suffix", [*FORMATS, ".tar"])
@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), 1e39, "much", None])
def test_a_weight_that_is_none_is_a_bad_row_named_by_row_and_column(weight: Any, suffix: str, tmp_path: Path) -> None:
    weights = [1, 1, weight, 1]
    path, columns = table(tmp_path, suffix if suffix in FORMATS else ".csv", weights), Columns(weight="score")
    path = path if suffix in FORMATS else shards(tmp_path, weights)
    try:
        found = first_problem(open_source(path, columns=columns))
    except InputError as error:
        found = str(error)
    row = {".csv": "row 4", ".jsonl": "row 3", ".parquet": "row 2", ".tar": "sample 2"}[suffix]
    assert found.startswith(f"{path} {row}: column 'score' holds ")
    assert found.endswith("but a weight is a number of at least 0; fix or remove the row")
    skip = BadSamples(on_error="skip", max_skipped=1)
    left = 3 if suffix in (".csv", ".jsonl") else 4  # these are read as a whole when they are opened
    batch, _ = batches(path, columns, bad_samples=skip, batch_size=left)
    assert batch.extra["weight"].tolist() == [1, 1, 1]
    data = Captions(str(path), str(path), columns=columns, num_workers=0, bad_samples=skip)
    data.setup("validate")
    assert sum(len(batch.keys) for batch in data.val_dataloader()) == 4  # a pair needs no weight to validate


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_other_image_is_augmented_and_where_there_is_none_the_image_is_a_second_time(
    suffix: str, tmp_path: Path
) -> None:
    path, augmentation = table(tmp_path, suffix), Augmentation(crop_scale=(0.3, 0.5))
    plain, _ = batches(path, BOTH, images=ImageOptions("one"), augmentation=augmentation)
    batch, validation = batches(path, BOTH, images=TWO, augmentation=augmentation)
    again, _ = batches(path, BOTH, images=TWO, augmentation=augmentation)
    torch.testing.assert_close(batch.images, plain.images, rtol=0, atol=0)
    assert (plain.extra, validation.extra) == ({}, {})
    others = batch.extra["other_image"]
    assert (others.dtype, others.shape) == (torch.uint8, batch.images.shape)
    torch.testing.assert_close(others, again.extra["other_image"], rtol=0, atol=0)
    blue = [bool(each[:2].max() == 0) for each in (batch.images[0], others[0])]
    assert sorted(blue) == [False, True]
    for image, other in zip(batch.images[1:], others[1:], strict=True):
        assert (other[0] == other[2]).all()  # grey, as the image
        assert (image != other).float().mean() > 0.5  # another crop
    unchanged, _ = batches(path, Columns(), images=TWO, augmentation=[])  # no things: each row is one
    torch.testing.assert_close(unchanged.extra["other_image"], unchanged.images, rtol=0, atol=0)


def test_the_other_image_is_drawn_from_all_others_of_the_group(tmp_path: Path) -> None:
    rows = [f"{image}.png,{image},{group}" for image, group in zip("01233", "aaabb", strict=True)]
    table(tmp_path, ".csv").write_text("\n".join(["image,caption,thing", *rows]))
    source = open_source(tmp_path / "captions.csv", columns=Columns(group="thing"))
    found, contents = set(), {source.load(row, None).image.tobytes(): row for row in range(4)}
    two = chosen_pairs(source, "all", "two")
    for row in range(5):
        for seed in range(20):
            pair = two.load(row, random.Random(seed))
            assert pair.caption == rows[row][0]
            found.add((contents[pair.image.tobytes()], contents[pair.extra["other_image"].tobytes()]))
    assert found == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 3)}
    orders = [two.order(epoch, 0).tolist() for epoch in range(3)]
    assert sorted(row for order in orders for row in order if row < 3) == [0, 1, 2]  # one of the thing in each epoch
    assert all(len(order) == 2 for order in orders)


def test_encoded_images_may_have_other_ones(tmp_path: Path) -> None:
    contents = [(tmp_path / name).read_bytes() for name in ("0.png", "back0.png") if table(tmp_path, ".csv")]
    columns = {"image": [contents[0]] * 2, "caption": ["a", "b"], "back": [contents[1], None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    two = chosen_pairs(open_source(tmp_path / "a.parquet", columns=BOTH), "all", "two")
    pair, _, second = (two.load(row, random.Random(0)) for row in range(3))
    assert pair.extra["other_image"].tobytes() == Image.open(tmp_path / "back0.png").tobytes()
    assert second.extra["other_image"].tobytes() == second.image.tobytes()


def test_an_other_image_that_is_not_there_is_a_bad_sample_of_its_row(tmp_path: Path) -> None:
    path = table(tmp_path, ".csv")
    (tmp_path / "back0.png").unlink()
    with pytest.raises(InputError, match=r"captions\.csv row 2: .*back0\.png"):
        batches(path, BOTH, images=TWO)


def test_columns_that_only_training_reads_are_not_asked_of_validation_data(tmp_path: Path) -> None:
    path = table(tmp_path, ".csv")
    plain = path.with_name("plain.csv")
    plain.write_text("image,caption\nback0.png,one\n3.png,two\n")
    columns = Columns(weight="score", negative="caption")
    data = Captions(str(path), str(plain), columns=columns, batch_size=2, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert not batch.extra
    assert not batch.negatives
    assert next(iter(data.train_dataloader())).extra["weight"].shape == (2,)
    with pytest.raises(InputError, match=r"plain\.csv: no column 'score'"):
        Captions(str(plain), str(plain), columns=columns, num_workers=0).setup("fit")


def test_a_column_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, ".csv")
    for options, ours in (
        ({"columns": Columns(weight="score")}, "WeightedContrastive"),
        ({"columns": BOTH, "images": TWO}, "OtherImage"),
        ({"columns": Columns(title="caption")}, "WithTitle"),
    ):
        data = Captions(str(path), str(path), **options, num_workers=0)
        with pytest.raises(InputError, match=rf"Contrastive does not read it; leave it out, or use lit_clip\..*{ours}"):
            make_trainer(tmp_path, [], max_steps=1).fit(make_module(), data)
    with pytest.raises(InputError, match=r"--columns\.\w+: shards hold captions and groups alone; train on the"):
        shard(str(path), str(tmp_path / "out"), columns=Columns(weight="score"))
    with pytest.raises(InputError, match="--columns.title: shards hold"):
        shard(str(path), str(tmp_path / "out"), columns=Columns(title="caption"))


def test_a_step_of_both_losses_in_micro_batches_has_the_values_of_plain_functions(tmp_path: Path) -> None:
    columns, path = Columns(["image", "back"], weight="score"), table(tmp_path, ".csv")
    module = make_module(loss=Sum([WeightedContrastive(), OtherImageContrastive()], [1.0, 0.5]), micro_batch_size=2)
    batch, _ = batches(path, columns, images=TWO)
    with torch.no_grad():
        image, other = (
            module.model.encode_image(module.model.normalize(each), normalize=True)
            for each in (batch.images, batch.extra["other_image"])
        )
        text = module.model.encode_text(module.model.tokenize(list(batch.captions)), normalize=True)
        scale, own = module.model.logit_scale.exp(), torch.arange(4)
        entropies = [F.cross_entropy(scale * a @ b.T, own, reduction="none") for a, b in ((image, text), (text, image))]
        weights = batch.extra["weight"]
        expected = float((weights * (entropies[0] + entropies[1])).sum() / 2 / weights.sum())
        expected_other = float(contrastive_loss(image, other, image, other, scale))
    data = Captions(str(path), str(path), columns=columns, batch_size=4, num_workers=0, images=TWO)
    trainer = make_trainer(tmp_path, [], max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["train/weighted_contrastive_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["train/other_image_contrastive_loss"] == pytest.approx(expected_other, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(expected + 0.5 * expected_other, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (OtherImageContrastive(), "the data have no other images; set data.images.per_thing to two"),
        (WeightedContrastive(), "the data have no weights; set data.columns.weight"),
        (WithTitle(Contrastive()), "the data have no titles; set data.columns.title"),
    ],
)
def test_a_loss_without_its_column_is_refused(loss: Any, message: str, tmp_path: Path) -> None:
    path = str(table(tmp_path, ".csv"))
    data = Captions(path, path, batch_size=4, num_workers=0)
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, [], max_steps=1, limit_val_batches=0).fit(make_module(loss=loss), data)


def test_a_frozen_image_encoder_refuses_other_images() -> None:
    module = make_module(loss=Sum([Contrastive(), OtherImageContrastive()]), freeze=Freeze(image="all"))
    with pytest.raises(InputError, match="OtherImageContrastive trains the image encoder, which is frozen; leave one"):
        module.loss.prepare(module.model)


def titled(folder: Path, suffix: str, titles: list[Any]) -> Path:
    """Write the four rows with other captions and a column ``name``; shards have the same image four times."""
    table(folder, ".csv")
    columns = {"image": [f"{row}.png" for row in range(4)], "caption": list("abcd"), "name": titles}
    if suffix != ".tar":
        return tabulated(folder / f"captions{suffix}", columns)
    image = (folder / "0.png").read_bytes()
    fields = [
        json.dumps({"caption": caption, "name": title}).encode() for caption, title in zip("abcd", titles, strict=True)
    ]
    write_tar(folder / "a.tar", [(str(row), {"png": image, "json": each}) for row, each in enumerate(fields)])
    return folder / "a.tar"


@pytest.mark.parametrize("suffix", [*FORMATS, ".tar"])
def test_each_pair_has_the_tokens_of_its_title_and_a_row_without_one_is_bad(suffix: str, tmp_path: Path) -> None:
    titles, columns = ["kite", "a long tent", "red", "b"], Columns(title="name")
    batch, validation = batches(titled(tmp_path, suffix, titles), columns)
    tokens = Captions("", "").tokenize(titles)
    assert torch.equal(batch.extra["title"], tokens[:, : batch.extra["title"].shape[1]])
    assert batch.extra["title"].shape[1] == 5  # start, three words, end: no longer than the longest
    assert not validation.extra
    path = titled(tmp_path, suffix, ["kite", "tent", None, "b"])
    skip = BadSamples(on_error="skip", max_skipped=1)
    try:
        found = first_problem(open_source(path, columns=columns))
    except InputError as error:
        found = str(error)
    assert "column 'name' holds" in found
    assert "not a title" in found
    batch, _ = batches(path, columns, bad_samples=skip, batch_size=3 if suffix in (".csv", ".jsonl") else 4)
    assert len(batch.extra["title"]) == 3


def test_a_step_with_titles_in_micro_batches_has_the_value_of_a_plain_function(tmp_path: Path) -> None:
    path, columns = titled(tmp_path, ".csv", ["kite", "a long tent", "red", "b"]), Columns(title="name")
    module = make_module(loss=WithTitle(Contrastive(), 0.25), micro_batch_size=3)
    batch, _ = batches(path, columns)
    with torch.no_grad():
        image = module.model.encode_image(module.model.normalize(batch.images), normalize=True)
        text, title = (
            module.model.encode_text(tokens, normalize=True)
            for tokens in (module.model.tokenize(list(batch.captions)), batch.extra["title"])
        )
        thing = F.normalize(0.75 * image + 0.25 * title)
        expected = float(contrastive_loss(thing, text, thing, text, module.model.logit_scale.exp()))
    data = Captions(str(path), str(path), columns=columns, batch_size=4, num_workers=0)
    trainer = make_trainer(tmp_path, [], max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(trainer.callback_metrics["train/text_weight"]) == pytest.approx(0.25)


@pytest.mark.parametrize("told_by", ["titles", "images"])
def test_frozen_encoders_learn_the_weight_of_what_answers_the_queries(told_by: str, tmp_path: Path) -> None:
    names = ["kite", "tent", "red", "ball"]
    titles = names if told_by == "titles" else ["thing"] * 4
    path = titled(tmp_path, ".csv", titles)
    tabulated(path, {"image": [f"{row}.png" for row in range(4)], "caption": names, "name": titles})
    module = make_module(
        loss=WithTitle(Contrastive()),
        freeze=Freeze(image="all", text="all"),
        optimizer=lambda groups: torch.optim.Adam(groups, lr=0.02),
    )
    data = Captions(str(path), str(path), columns=Columns(title="name"), batch_size=4, num_workers=0, augmentation=[])
    data.preprocessing = module.preprocessing
    if told_by == "images":  # each image's features are its query's
        data.setup("fit")
        (batch,) = data.train_dataloader()
        known = dict(zip(map(bytes, batch.images.flatten(1).numpy()), batch.tokens, strict=True))
        module.model.encode_image = lambda images, normalize=False: module.model.encode_text(
            torch.stack([known[bytes(image)] for image in images.flatten(1).numpy()]), normalize=normalize
        )
        module.model.normalize = lambda images: images
    trainer = make_trainer(tmp_path, [], max_steps=30, max_epochs=30, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, data)
    learned = float(trainer.callback_metrics["train/text_weight"])
    assert (learned > 0.7) if told_by == "titles" else (learned < 0.3)
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert trained == {"model.logit_scale", "loss.logit"}
