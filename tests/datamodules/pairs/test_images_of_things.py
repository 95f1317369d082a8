"""Several images of a thing, in a row or in rows of a group, by plain loops: formats, epochs, division, bad images."""

import io
import json
import pickle
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules import BadSamples, CaptionOptions, Captions, Columns, ImageOptions
from datamodules.open_source import open_source
from datamodules.pairs.image_captions import OneOfEach
from datamodules.pairs.source import PairSource
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import BadSample, InputError
from lit_clip.losses import Contrastive, Sum
from lit_clip.models.config import Preprocessing
from lit_clip.retrieval.retrieval_set import RetrievalSet, token_hashes
from lit_clip.training.losses import PlaceContrastive
from tests.datamodules.pairs.test_saved import IMAGE, save
from tests.helpers.epochs import assert_resumes, epoch_of, opened, shared_by, tabulated, written
from tests.helpers.frozen_runs import Run, fit

COUNTS = [1, 3, 2, 4, 1, 2, 3, 3, 2, 4, 1, 2]  # images of the things
IMAGES = [[f"{thing}_{view}.png" for view in range(count)] for thing, count in enumerate(COUNTS)]
TITLES = [f"title of {thing}" for thing in range(len(COUNTS))]
EVERY = {(image, title) for images, title in zip(IMAGES, TITLES, strict=True) for image in images}
ALL, ONE, TOGETHER = ImageOptions("all"), ImageOptions("one"), ImageOptions("together")


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 10 + 8 * number).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images of twelve things."""
    for number, name in enumerate(name for images in IMAGES for name in images):
        (tmp_path / name).write_bytes(png(number))
    return tmp_path


def lists(path: Path) -> Path:
    """Write a row for each thing with a list of its images."""
    columns = {"title": TITLES, "image": IMAGES}
    if path.suffix == ".jsonl":
        return tabulated(path, columns)
    path.write_text(json.dumps(pa.table(columns).to_pylist(), indent=1))
    return path


def numbered(path: Path) -> Path:
    """Write a row for each thing with a column for each image, which may be blank."""
    rows = [[title, *images, *[""] * (4 - len(images))] for images, title in zip(IMAGES, TITLES, strict=True)]
    return written(path, rows, ["title", *(f"image_{number}" for number in range(1, 5))])


def grouped(path: Path) -> Path:
    """Write a row for each image, whose group is the thing; a thing with one image has none."""
    rows = [
        [image, title, title if len(images) > 1 else ""]
        for images, title in zip(IMAGES, TITLES, strict=True)
        for image in images
    ]
    return written(path, rows, ["image", "title", "product"])


def parquet(path: Path) -> Path:
    """Write a row for each thing with a list of its images, in two row groups, beside rows that are left out."""
    titles, images = [TITLES[0], "", *TITLES[1:], " "], [IMAGES[0], ["0_0.png"], *IMAGES[1:], []]
    images[5] = [*images[5], "", None]  # pyright: ignore[reportCallIssue, reportArgumentType]  # blank cells of a list
    pq.write_table(pa.table({"title": titles, "image": images}), path, row_group_size=5)
    return path


def parquet_columns(path: Path) -> Path:
    """Write a row for each thing with a column for each image, which may be null."""
    cells = [[*images, *[None] * (4 - len(images))] for images in IMAGES]
    columns = {f"image_{number + 1}": pa.array([row[number] for row in cells], pa.string()) for number in range(4)}
    pq.write_table(pa.table({"title": TITLES, **columns}), path, row_group_size=7)
    return path


def saved(path: Path) -> Path:
    """Write what Hugging Face's ``datasets`` saves."""
    return save(path, {"title": TITLES, "image": IMAGES})


FORMATS: dict[str, Callable[[Path], Path]] = {
    "things.jsonl": lists,
    "things.json": lists,
    "things.csv": numbered,
    "lists.parquet": parquet,
    "columns.parquet": parquet_columns,
    "saved": saved,
}


def drawn_in(data: Captions, epoch: int) -> list[tuple[str, str]]:
    return [pair for batch in epoch_of(data, epoch) for pair in batch]


def pairs_of(source: PairSource) -> list[tuple[str, str, str]]:
    texts = [source.text(row, None) for row in range(len(source))]
    return [(text.key, text.caption, text.group) for text in texts]


@pytest.mark.parametrize("name", FORMATS)
def test_each_image_of_a_row_is_a_pair_with_its_texts_and_only_they_are_a_group(name: str, folder: Path) -> None:
    source = pickle.loads(
        pickle.dumps(open_source(str(FORMATS[name](folder / name)), columns=Columns(root=str(folder))))
    )
    found = pairs_of(source)
    assert [pair[:2] for pair in found] == [
        (image, title) for images, title in zip(IMAGES, TITLES, strict=True) for image in images
    ]
    thing_of: dict[str, set[str]] = defaultdict(set)
    for _, title, group in found:
        thing_of[title].add(group)
    names = [groups.pop() for groups in thing_of.values() if len(groups) == 1]
    assert len(set(filter(None, names))) == len(COUNTS)
    for row, (key, title, group) in enumerate(found):
        expected = np.asarray(Image.open(folder / key))
        assert np.array_equal(np.asarray(source.load(row, None).image), expected)
        stored = source.read(row)
        assert (stored.image, stored.captions, stored.key, stored.group) == (
            (folder / key).read_bytes(),
            [title],
            key,
            group,
        )


VIEWS = ["front", "back", "left", "inside"]


def named(path: Path) -> Path:
    """Write a row for each thing with columns of images that have names of their own, the last one first."""
    rows = [[*reversed([*images, *[""] * (4 - len(images))])] for images in IMAGES]
    columns = {name: [row[place] for row in rows] for place, name in enumerate(reversed(VIEWS))}
    columns["title"] = TITLES
    return save(path, columns) if path.suffix == "" else tabulated(path, columns)


@pytest.mark.parametrize("name", ["things.csv", "things.jsonl", "things.parquet", "saved"])
def test_columns_of_images_that_the_user_names_are_images_of_one_thing_in_that_order(name: str, folder: Path) -> None:
    columns = Columns(VIEWS, root=str(folder))
    path = named(folder / name)
    found = pairs_of(open_source(str(path), columns=columns))
    assert [pair[:2] for pair in found] == [
        (image, title) for images, title in zip(IMAGES, TITLES, strict=True) for image in images
    ]
    assert len({pair[1:] for pair in found}) == len(COUNTS)
    data = opened(path, val=str(path), columns=columns)
    assert sorted(title for _, title in drawn_in(data, 0)) == sorted(TITLES)
    once = open_source(str(path), columns=Columns(["front", "front"], root=str(folder)))
    assert [key for key, _, _ in pairs_of(once)] == [images[0] for images in IMAGES]


def test_a_named_column_that_is_missing_or_the_caption_is_refused_and_inspect_repeats_the_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    named(folder / "things.csv")
    with pytest.raises(InputError, match=r"things\.csv: no column 'bak'; its columns are .*columns\.image"):
        open_source("things.csv", columns=Columns(["front", "bak"]))
    with pytest.raises(InputError, match="'title' cannot be both"):
        open_source("things.csv", columns=Columns(["front", "title"], "title"))
    run_command(["inspect", "things.csv", "--columns.image", "[front, back]", "--num_workers", "0"])
    assert "--data.columns.image '[front,back]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["struct.parquet", "bytes.parquet", "columns.parquet", "saved"])
def test_encoded_images_in_lists_and_columns_have_keys_and_groups_of_their_own(name: str, folder: Path) -> None:
    files = [[(folder / image).read_bytes() for image in images] for images in IMAGES]
    structs = pa.array([[{"bytes": each, "path": None} for each in row] for row in files], pa.list_(IMAGE))
    column = pa.array(files, pa.list_(pa.binary())) if name == "bytes.parquet" else structs
    columns: dict[str, Any] = {"title": TITLES, "image": column}
    if name == "columns.parquet":
        padded = [[*row, None, None, None] for row in files]
        columns = {"title": TITLES, **{f"image_{n}": pa.array([r[n] for r in padded], pa.binary()) for n in range(4)}}
    path = folder / name
    if name == "saved":
        save(path, columns, files=1)
    else:
        pq.write_table(pa.table(columns), path, row_group_size=5)
    open_source(str(path))
    for source in (open_source(str(path)), pickle.loads(pickle.dumps(open_source(str(path))))):  # with a cache
        found = pairs_of(source)
        assert len(found) == len({key for key, _, _ in found}) == sum(COUNTS)
        assert [source.read(row).image for row in range(len(source))] == [each for row in files for each in row]
        assert len({group for _, _, group in found}) == len({pair[1:] for pair in found}) == len(COUNTS)
        assert sorted(source.order(3, 1).tolist()) == list(range(len(source)))
        assert [source.key(row) for row in range(len(source))] == [key for key, _, _ in found]
    data = opened(path, val=str(path))
    assert sorted(title for _, title in drawn_in(data, 0)) == sorted(TITLES)
    train, val = ({pair[1] for pair in pairs_of(each)} for each in open_source(str(path)).divide(0.2, 0))
    assert train.isdisjoint(val)


@pytest.mark.parametrize(
    ("table", "options"),
    [(lists, {}), (grouped, {"columns": Columns(group="product"), "images": ONE})],
    ids=["lists", "groups"],
)
def test_an_epoch_has_one_image_of_each_thing_and_none_again_before_all_were_used(
    table: Callable[[Path], Path], options: dict[str, Any], folder: Path
) -> None:
    path = table(folder / ("things.jsonl" if table is lists else "things.csv"))
    data = opened(path, val=str(path), **options)
    used: dict[str, list[str]] = defaultdict(list)
    for epoch in range(24):
        drawn = drawn_in(data, epoch)
        assert sorted(title for _, title in drawn) == sorted(TITLES)
        if epoch in (0, 5):
            ranks = [opened(path, val=str(path), batch_size=2, **options) for _ in range(2)]
            assert sorted(sum(shared_by(ranks, epoch), [])) == sorted(drawn)
        for key, title in drawn:
            used[title].append(key)
    for images, title in zip(IMAGES, TITLES, strict=True):
        passes = [used[title][first : first + len(images)] for first in range(0, 24, len(images))]
        assert all(sorted(each) == images for each in passes)
        assert len(set(map(tuple, passes))) > 1 or len(images) == 1


def test_all_images_are_read_if_wanted_and_rows_of_a_group_are_unless_one_is(folder: Path) -> None:
    rows = grouped(folder / "rows.csv")
    columns = Columns(group="product")
    for data in (
        opened(lists(folder / "things.jsonl"), val=str(rows), images=ALL, batch_size=1),
        opened(rows, val=str(rows), columns=columns, batch_size=1),
        opened(rows, val=str(rows), columns=columns, batch_size=1, images=ALL),
    ):
        assert len(drawn := drawn_in(data, 1)) == sum(COUNTS)
        assert set(drawn) == EVERY


@pytest.mark.parametrize("table", [lists, grouped], ids=["lists", "groups"])
def test_a_step_has_a_thing_once_with_all_of_its_images(table: Callable[[Path], Path], folder: Path) -> None:
    path = table(folder / ("things.jsonl" if table is lists else "things.csv"))
    columns = Columns(group="product") if table is grouped else None
    data = opened(path, val=str(path), columns=columns, images=TOGETHER, batch_size=4)
    data.preprocessing = Preprocessing(image_size=32)  # as the files have, so pixels stay
    loader: Any = data.train_dataloader()
    found, keys = dict[str, list[bytes]](), set[str]()
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            keys.update(batch.keys)
            for row, caption in enumerate(batch.captions):
                own = torch.arange(len(batch.images))[row] if batch.image_of is None else batch.image_of[row]
                images = batch.images[own[own >= 0].reshape(-1)]
                found[caption] = sorted(image.numpy().tobytes() for image in images)
    pixels = {image: np.asarray(Image.open(folder / image)).transpose(2, 0, 1).tobytes() for image, _ in EVERY}
    assert found == {
        title: sorted(pixels[image] for image in images) for images, title in zip(IMAGES, TITLES, strict=True)
    }
    assert len(keys) > len(TITLES)  # which image comes first, with the caption of its row, is drawn
    assert sum(len(batch.keys) for batch in data.val_dataloader()) == len(EVERY)


def test_an_image_with_a_row_for_each_caption_counts_once_and_all_captions_are_drawn(folder: Path) -> None:
    rows = [["3_0.png", "one", "p"], ["3_0.png", "two", "p"], ["3_0.png", "three", "p"], ["3_1.png", "four", "p"]]
    path = written(folder / "rows.csv", rows, ["image", "title", "product"])
    source = opened(path, val=str(path), columns=Columns(group="product"), images=TOGETHER).train_source
    assert source is not None
    images = sorted(Image.open(folder / name).convert("RGB").tobytes() for name in ("3_0.png", "3_1.png"))
    first = dict[str, str]()
    for seed in range(40):
        pair = source.load(0, random.Random(seed))
        assert sorted(image.convert("RGB").tobytes() for image in (pair.image, *pair.more_images)) == images
        first[pair.caption] = pair.key
    assert first == {caption: name for name, caption, _ in rows}


def test_options_that_change_nothing_or_do_not_fit_are_refused_in_one_line(folder: Path) -> None:
    path = str(lists(folder / "things.jsonl"))
    plain = str(written(folder / "plain.csv", sorted(EVERY), ["image", "title"]))
    joined = {"captions": CaptionOptions(per_image="together")}
    for train, options, message in (
        (plain, {"images": ONE}, "one would change nothing"),
        (plain, {"images": TOGETHER}, "together would change nothing"),
        (path, {"images": TOGETHER, **joined}, r".* captions\.per_image out"),
    ):
        with pytest.raises(InputError, match=rf"^data\.images\.per_thing: {message}"):
            opened(train, val=path, **options)
    with pytest.raises(InputError, match=r"per_thing: 'mean' must be"):
        ImageOptions("mean")  # pyright: ignore[reportArgumentType]
    assert not isinstance(opened(plain, val=plain).train_source, OneOfEach)
    places: Any = {"loss": Sum([Contrastive(), PlaceContrastive()], [1.0, 1.0])}
    for part, message in (
        ({"cache": str(folder / "cache")}, "FrozenFeatures"),
        ({"freeze": "nothing", "model": places}, "PlaceContrastive reads one image"),
    ):
        run = Run(str(folder), path, data={"batch_size": 4, "images": TOGETHER})._replace(**part)
        with pytest.raises(InputError, match=message):
            fit(run)


DIVIDED = {"things.jsonl": lists, "things.parquet": parquet, "things.csv": grouped}
IMAGES_READ = {"things.jsonl": [None, ALL], "things.parquet": [None, ONE], "things.csv": [ALL, ONE]}


@pytest.mark.parametrize(("name", "images"), [(name, each) for name, read in IMAGES_READ.items() for each in read])
def test_no_thing_is_both_in_training_and_in_validation(name: str, images: ImageOptions | None, folder: Path) -> None:
    path = DIVIDED[name](folder / name)
    columns = Columns(group="product") if name == "things.csv" else None
    sides = []
    for seed in range(8):
        data = opened(path, columns=columns, seed=seed, images=images)
        assert data.train_source is not None
        assert data.val_source is not None
        train, val = ({pair[:2] for pair in pairs_of(each)} for each in (data.train_source, data.val_source))
        assert train | val == EVERY
        assert {title for _, title in train}.isdisjoint(title for _, title in val)
        sides.append(frozenset(val))
    assert len(set(sides)) > 3


def test_things_that_share_an_image_are_on_one_side(folder: Path) -> None:
    shared = [[f"{n % 12}_0.png", f"{n}", f"{n // 2}"] for n in (*range(20), 0, 13)]
    path = written(folder / "shared.csv", shared, ["image", "title", "product"])
    for seed in range(8):
        train, val = open_source(str(path), columns=Columns(group="product")).divide(0.1, seed, groups=True)
        for place in (0, 2):
            assert {pair[place] for pair in pairs_of(train)}.isdisjoint(pair[place] for pair in pairs_of(val))


def test_parts_of_a_mixture_and_tables_of_other_folders_have_things_of_their_own(folder: Path) -> None:
    tables = []
    for name in "ab":
        (folder / name).mkdir()
        for image in folder.glob("*.png"):
            (folder / name / image.name).write_bytes(image.read_bytes())
        tables.append(str(lists(folder / name / "things.jsonl")))
    both = opened(tables, val=tables[0])
    parts = [{"data": table} for table in tables]
    mixed = opened(parts, val=tables[0])
    for data in (both, mixed):
        drawn = drawn_in(data, 0)
        assert len(drawn) == 24
        assert len({(key[:2], title) for key, title in drawn}) == 24
        assert data.train_source is not None
        groups = {(key[:2], group) for key, _, group in pairs_of(data.train_source)}
        assert len(groups) == len({group for _, group in groups}) == 2 * len(COUNTS)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"captions": CaptionOptions(per_image="together")},
        {"images": TOGETHER},
    ],
    ids=["plain", "captions", "images"],
)
def test_a_run_resumed_within_an_epoch_continues_bit_for_bit(options: dict[str, Any], folder: Path) -> None:
    path = folder / "things.jsonl"
    rows = [
        {"title": [title, f"another {title}"], "image": images} for images, title in zip(IMAGES, TITLES, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    model = {"micro_batch_size": 3, "loss": Contrastive("positives")}
    run = Run(str(folder / "run"), str(path), data={"batch_size": 4, **options}, model=model)
    other = {**run.data, "images": ALL, "batch_size": 4}
    assert len(assert_resumes(run, 4, other, "per_thing").samples) == 2 * 3


def test_an_image_that_is_missing_is_a_bad_sample_and_the_others_of_its_thing_are_used(folder: Path) -> None:
    path = lists(folder / "things.jsonl")
    (folder / IMAGES[3][2]).unlink()
    with pytest.raises(BadSample, match=r"things\.jsonl row 4: no such image file: .*3_2\.png"):
        opened(path, val=str(path))
    data = opened(path, val=str(path), bad_samples=BadSamples("skip"), images=ALL, batch_size=len(EVERY))
    loader: Any = data.train_dataloader()
    (batch,) = list(loader)
    assert set(zip(batch.keys, batch.captions, strict=True)) == EVERY - {(IMAGES[3][2], TITLES[3])}
    assert [reason for _, reason in batch.skipped] == ["missing image"]


def test_rows_whose_images_are_no_paths_or_too_many_are_left_out_with_their_reason(folder: Path) -> None:
    cells = [["0_0.png", 7], [], ["", "nan"], ["0_0.png"] * 1001, {"a": 1}, ["0_0.png", " "], "1_0.png"]
    path = folder / "cells.jsonl"
    path.write_text("\n".join(json.dumps({"image": cell, "title": "a title"}) for cell in cells))
    source = open_source(str(path), on_error="skip")
    assert [key for key, _, _ in pairs_of(source)] == ["0_0.png", "1_0.png"]
    assert source.left_out.counts == {"missing image": 4, "too many images": 1}
    with pytest.raises(BadSample, match=r"cells\.jsonl row 1: no image in column 'image'"):
        open_source(str(path))


def test_columns_of_images_with_other_types_are_refused(folder: Path) -> None:
    pq.write_table(pa.table({"title": ["a"], "image_1": ["0_0.png"], "image_2": pa.nulls(1)}), folder / "types.parquet")
    with pytest.raises(InputError, match=r"types\.parquet: column 'image_2' holds null"):
        open_source(str(folder / "types.parquet"))
    columns = {"image_1": ["0_0.png"], "image_2": [b"image"]}
    pq.write_table(pa.table({"title": ["a"], **columns}), folder / "types.parquet")
    with pytest.raises(InputError, match=r"columns .* hold binary and string"):
        open_source(str(folder / "types.parquet"))


def test_validation_counts_each_image_of_a_thing_as_right_for_its_texts(folder: Path) -> None:
    """A model that knows the thing of each image, and nothing else of it, has a perfect merged recall."""
    data = opened(lists(folder / "things.jsonl"), val=str(folder / "things.jsonl"))
    features = torch.eye(len(COUNTS))
    found = RetrievalSet()
    for batch in data.val_dataloader():
        image = torch.stack([features[int(key.split("_")[0])] for key in batch.keys])
        text = torch.stack([features[TITLES.index(caption)] for caption in batch.captions])
        found.add(image, text, batch.keys, token_hashes(batch.tokens, data.tokenize.context_length, 0))
    metrics = found.evaluate(features[:0], torch.tensor(10.0), None).metrics
    found.add(features[[0, 0, 1]], features[[0, 0, 1]], ["a", "b", "c"], np.arange(3))  # other titles are wrong
    assert found.evaluate(features[:0], torch.tensor(10.0), None).metrics["image_to_text_recall@1"] < 1
    assert metrics["merged_text_to_image_recall@1"] == metrics["merged_image_to_text_recall@1"] == 1
    assert metrics["mean_recall"] == 1
    assert metrics["text_to_image_recall@1"] < 1


@pytest.mark.parametrize("table", [lists, parquet])
def test_commands_on_pairs_take_each_image_with_its_texts(
    table: Callable[[Path], Path], folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = str(table(folder / ("things.jsonl" if table is lists else "things.parquet")))
    encoding = ["--model", str(tiny_checkpoint), "--num_workers", "0", "--accelerator", "cpu"]
    run_command(["embed", path, "--output", "features.parquet", *encoding])
    assert pq.read_table("features.parquet")["key"].to_pylist() == sorted(image for image, _ in EVERY)
    run_command(["score", path, "--output", "scores.parquet", *encoding])
    assert len(pq.read_table("scores.parquet")) == len(EVERY)
    run_command(["score", path, "--output", "kept.parquet", "--fraction", "0.5", *encoding])
    data = opened(path, val=path, keep="kept.parquet", images=ALL)
    assert data.train_source is not None
    assert 0 < len(kept := {pair[:2] for pair in pairs_of(data.train_source)} & EVERY) == len(data.train_source) < 28
    one = opened(path, val=path, keep="kept.parquet", batch_size=1)
    assert {title for _, title in drawn_in(one, 0)} == {title for _, title in kept}
    run_command(["inspect", path, "--num_workers", "0"])
    run_command(["shard", path, "shards", "--num_workers", "0"])
    shards = open_source("shards", columns=Columns(group="group"))
    assert {(*pair[1:],) for pair in pairs_of(shards)} == {pair[1:] for pair in pairs_of(open_source(path))}
    assert len(shards) == len(EVERY)


def test_shards_have_things_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run_command(["shard", str(lists(folder / "things.jsonl")), "shards", "--num_workers", "0", "--shard_size", "9"])
    options: dict[str, Any] = {"columns": Columns(group="group"), "images": ONE}
    data = opened("shards", val="shards", **options)
    assert all(sorted(title for _, title in drawn_in(data, epoch)) == sorted(TITLES) for epoch in range(3))
    sides = opened("shards", **{**options, "images": TOGETHER})
    train, val = sides.train_source, sides.val_source
    assert train is not None
    assert val is not None
    assert len(train) + len({pair[1] for pair in pairs_of(val)}) == len(TITLES)
    assert {pair[1] for pair in pairs_of(train)}.isdisjoint(pair[1] for pair in pairs_of(val))


@pytest.mark.parametrize("table", [lists, grouped], ids=["lists", "groups"])
def test_inspect_counts_a_title_of_several_images_of_a_thing_once(
    table: Callable[[Path], Path], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--num_workers", "0", *(["--columns.group", "product"] if table is grouped else [])]
    path = table(folder / ("things.jsonl" if table is lists else "things.csv"))

    def repeated() -> str:
        run_command(["inspect", str(path), *words])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "same as another caption" in line)
        return line.split("│")[2].strip()

    assert repeated() == "0"
    if table is lists:  # another thing with the same title counts, once
        path.write_text(path.read_text().replace(TITLES[2], TITLES[1]))
        assert repeated() == "1 (3.6%) in 1 group"


def test_a_thing_that_a_row_lists_is_named_after_its_first_image(
    folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = ["--fields", "image,caption", "--model", str(tiny_checkpoint), "--num_workers", "0", "--accelerator", "cpu"]
    run_command(["embed", str(lists(folder / "things.jsonl")), "--output", "things.parquet", *words])
    assert pq.read_table("things.parquet")["key"].to_pylist() == sorted(images[0] for images in IMAGES)
