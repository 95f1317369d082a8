"""Pairs in tar shards against the same pairs in a table: captions, incomplete shards, ranks and options."""

import csv
import itertools
import json
import pickle
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datamodules.open_source import open_source
from datamodules.pairs.source import Classes, Columns, ShardOptions
from datamodules.shards.pairs import TarPairs, shard_order
from lit_clip.errors import BadSample, InputError
from tests.helpers.epochs import epoch_of, opened
from tests.helpers.tar_shards import Files, image, numbered, shade_of, write_shards, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for fetched shards and cached indexes, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lit-clip" / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "seven")


def test_shards_hold_the_same_pairs_as_the_table_they_were_made_from(tmp_path: Path, caption_table: Path) -> None:
    with caption_table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    samples = [
        (f"{number:09d}", {"png": (caption_table.parent / row["image"]).read_bytes(), "txt": row["caption"].encode()})
        for number, row in enumerate(rows)
    ]
    for number, start in enumerate(range(0, len(samples), 20)):
        write_tar(tmp_path / f"{number:05d}.tar", samples[start : start + 20])
    shards, table = TarPairs(str(tmp_path / "{00000..00003}.tar")), open_source(str(caption_table))
    assert len(shards) == len(table) == 64
    for index in range(64):
        ours, theirs = shards.load(index, None), table.load(index, None)
        assert ours.caption == theirs.caption
        assert ours.image.tobytes() == theirs.image.tobytes()
    assert len({shards.read(index).key for index in range(64)}) == 64


def test_shards_written_by_webdataset_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"a/{number:04d}", "png": image(number), "txt": f"number {number}"})
    source = TarPairs(str(tmp_path))
    assert source.sizes == [4, 4, 2]
    assert [source.captions(index) for index in range(10)] == [[f"number {number}"] for number in range(10)]
    assert [shade_of(source.load(index, None)) for index in range(10)] == list(range(10))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_any_file_order_and_unrelated_files_are_accepted(tmp_path: Path, format: int) -> None:
    names = [f"{'deep/' * 40}{number}-\N{GREEK SMALL LETTER ALPHA}" for number in range(3)]
    images = [(name, {"png": image(number)}) for number, name in enumerate(names)]
    texts = [(name, {"txt": f"number {number}".encode(), "npy": b"?"}) for number, name in enumerate(names)][::-1]
    others = [("._hidden", {"txt": b"macOS leaves these"}), (names[1] + "/.DS_Store", {"x": b""})]
    write_tar(tmp_path / "x.tar", [*images, *others, *texts], format)
    source = TarPairs(str(tmp_path / "x.tar"))
    pairs = [source.load(index, None) for index in range(len(source))]
    assert [(shade_of(pair), pair.caption) for pair in pairs] == [(0, "number 0"), (1, "number 1"), (2, "number 2")]
    assert pairs[2].key == f"x/{names[2]}"


def test_equal_keys_in_two_shards_are_distinct(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [2])
    source = TarPairs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [source.read(i).key for i in range(4)] == ["a/000/00000", "a/000/00001", "b/000/00000", "b/000/00001"]


# Captions


def captions_of(tmp_path: Path, files: Files, **options: str) -> TarPairs:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tar"
    write_tar(path, [("000", {"png": image(), **files})])
    return TarPairs(str(path), columns=Columns(**options))


def test_caption_is_the_text_or_else_from_the_json(tmp_path: Path) -> None:
    about = json.dumps(
        {"caption": "of the json", "long": "a longer one", "few": ["one", None, "two"], "id": 7}
    ).encode()
    both = {"txt": b"of the text\n", "json": about}
    assert captions_of(tmp_path, both).captions(0) == ["of the text"]
    assert captions_of(tmp_path, {"json": about}).captions(0) == ["of the json"]
    assert captions_of(tmp_path, both, caption="long").captions(0) == ["a longer one"]
    assert captions_of(tmp_path, both, caption="few").captions(0) == ["one", "two"]
    assert captions_of(tmp_path, both, group="id").read(0).group == "7"
    with pytest.raises(InputError, match=r"sample 000: no field 'lang'; its \.json has caption, long, few, id"):
        captions_of(tmp_path, both, caption="lang")


def test_groups_are_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products = [(f"{row}", {"png": image(), "json": json.dumps({"caption": "a", "id": row // 2})}) for row in range(6)]
    write_tar(tmp_path / "x.tar", [(name, {**files, "json": files["json"].encode()}) for name, files in products])
    source, read, rows = TarPairs(str(tmp_path / "x.tar"), columns=Columns(group="id")), TarPairs._read, list[int]()
    monkeypatch.setattr(TarPairs, "_read", lambda self, row, *more: (rows.append(row), read(self, row, *more))[1])
    for _ in range(3):
        things = source.things()
        assert things is not None
        assert things.to_pylist() == ["0", "0", "1", "1", "2", "2"]
        assert source.things(rows=True) is None
    assert rows == list(range(6))


def test_one_of_several_captions_is_drawn_by_the_samples_generator(tmp_path: Path) -> None:
    several = [f"caption {number}" for number in range(5)]
    source = captions_of(tmp_path, {"txt": b"caption 0", "captions.json": json.dumps(several).encode()})
    assert source.captions(0) == several
    assert source.load(0, None).caption == "caption 0"
    for seed in range(5):
        assert source.load(0, random.Random(seed)).caption == random.Random(seed).choice(several)


def test_caption_may_be_of_any_length(tmp_path: Path) -> None:
    caption = "word " * 20_000 + "end"
    assert captions_of(tmp_path, {"txt": caption.encode()}).captions(0) == [caption]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"txt": b"caf\xe9 in Latin-1"}, "sample 000: its caption is not UTF-8"),
        ({"txt": b"         \n\n      "}, "sample 000: no caption"),
        ({"json": b'{"caption": null}'}, "sample 000: no caption"),
        ({"json": b'{"caption": 3}'}, "sample 000: the caption is not text: '3'"),
        ({"json": b'{"caption": '}, "sample 000: its .json is not JSON"),
        ({"json": b"[]"}, "sample 000: its .json holds no dict"),
        ({"captions.json": b'["", "nan"]'}, "sample 000: no caption"),
        ({"captions.json": b"[" * 100_000}, "sample 000: its .json is not JSON"),
    ],
)
def test_unusable_caption_is_a_bad_sample_that_names_its_sample(tmp_path: Path, files: Files, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        captions_of(tmp_path, files).load(0, None)


def test_unreadable_image_is_a_bad_sample_that_names_its_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("000", {"jpg": image(format="JPEG")[:300], "txt": b"cut off"})])
    with pytest.raises(BadSample, match=r"x\.tar sample 000: cannot read its image"):
        TarPairs(str(tmp_path)).load(0, None)


# Incomplete and damaged shards


def test_shards_without_usable_samples_report_found_and_needed_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i:03d}", {"image.png": image(), "prompt": b"a cat"}) for i in range(3)])
    write_tar(tmp_path / "1.tar", [(f"{i:03d}", {"flac": b"?"}) for i in range(3)])
    with pytest.raises(
        InputError, match=r"0\.tar sample 000: .*called \*\.image\.png, \*\.prompt, needed are an image"
    ):
        TarPairs(str(tmp_path))
    with pytest.raises(InputError, match=r"no usable sample in 2 shards.*\*\.flac.*needed.*missing image: 6"):
        TarPairs(str(tmp_path), on_error="skip")


def test_incomplete_samples_are_errors_or_left_out_and_listed(tmp_path: Path) -> None:
    samples = numbered(6)
    del samples[1][1]["png"], samples[3][1]["txt"]
    samples[4][1]["txt"] = b" NaN\n"
    write_tar(tmp_path / "x.tar", [*samples, samples[5]])
    with pytest.raises(InputError, match=r"x\.tar sample 00005: duplicate key"):
        TarPairs(str(tmp_path))
    source = TarPairs(str(tmp_path), on_error="skip")
    assert [source.captions(index)[0] for index in range(len(source))] == ["number 0", "number 2", "number 5"]
    assert source.left_out.counts == {"missing image": 1, "missing caption": 1, "no caption": 1, "duplicate key": 1}
    assert {where.rpartition(" ")[2] for where, _ in source.left_out.listed} == {"00001", "00003", "00004", "00005"}


def test_blank_captions_are_left_out_as_from_tables(tmp_path: Path) -> None:
    samples = numbered(3)
    samples[1][1]["txt"] = b""
    write_tar(tmp_path / "x.tar", samples)
    source = TarPairs(str(tmp_path))
    assert len(source) == 2
    assert str(source.left_out) == "1 row without a caption"


def test_non_tars_and_missing_shards_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", numbered(2))
    (tmp_path / "1.tar").write_bytes(random.Random(0).randbytes(2000))
    wanted = str(tmp_path / "{0..2}.tar")
    with pytest.raises(InputError, match=r"2\.tar: no such shard"):
        TarPairs(wanted)
    source = TarPairs(wanted, on_error="skip")
    assert len(source) == 2
    assert source.read(1).key == "0/00001"
    assert source.left_out.counts == {"missing shard": 1, "damaged shard": 1}
    with pytest.raises(InputError, match=r"9\.tar: no such shard, nor any of the 1 that are named"):
        TarPairs(str(tmp_path / "9.tar"), on_error="skip")


def test_shard_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(4))
    source = TarPairs(str(path))
    write_tar(path, numbered(4)[::-1] + numbered(1, 1000))
    changed = [("000", {"png": image(), "txt": b"longer than it was", "json": b"{}"}), *numbered(3)]
    write_tar(path, changed)
    with pytest.raises(BadSample, match="the shard changed since the run began"):
        source.load(3, None)


def test_pickled_source_is_small_and_still_reads(shards: Path) -> None:
    source = TarPairs(str(shards))
    source.load(0, None)
    content = pickle.dumps(source)
    assert len(content) < 10_000
    assert pickle.loads(content).captions(59) == ["number 59"]


def write_same_table(folder: Path) -> Path:
    """Write the pairs of :func:`write_shards` as a table."""
    for number in range(60):
        (folder / f"{number}.png").write_bytes(image(number))
    rows = "".join(f"{number}.png,number {number}\n" for number in range(60))
    (folder / "pairs.csv").write_text(f"image,caption\n{rows}")
    return folder / "pairs.csv"


# Each kind with and without workers, each number of ranks and of workers; the rest takes 15 seconds of starts.
COVERING = [("table", 1, 1), ("table", 2, 2), ("table", 0, 3), ("shards", 0, 2), ("shards", 2, 1)]


@pytest.mark.parametrize(
    ("kind", "workers", "world"),
    [
        case if case in COVERING else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(["table", "shards"], [0, 1, 2], [1, 2, 3])
    ],
)
def test_ranks_and_workers_together_have_each_pair_once(
    kind: str, workers: int, world: int, shards: Path, tmp_path: Path
) -> None:
    """In training, whose size is a multiple of the batch, and in validation, where it is not."""
    data = str(shards if kind == "shards" else write_same_table(tmp_path))
    training: Counter[str] = Counter()
    validation: Counter[str] = Counter()
    lengths = set()
    for rank in range(world):
        module = opened(data, val=data, batch_size={1: 10, 2: 5, 3: 4}[world], num_workers=workers)
        batches = epoch_of(module, 0, rank, world)
        lengths.add(len(batches))
        training.update(caption for batch in batches for _, caption in batch)
        module.batch_size = 7
        validation.update(caption for batch in module.val_dataloader() for caption in batch.captions)
    expected = Counter(f"number {number}" for number in range(60))
    assert training == validation == expected
    assert len(lengths) == 1


# Options


@pytest.mark.parametrize(
    ("options", "message"), [({"shuffle_shards": 0}, "shuffle_shards: 0"), ({"cache_gb": -1.0}, "cache_gb: -1.0")]
)
def test_invalid_shard_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ShardOptions(**options)  # pyright: ignore[reportArgumentType]  # of any type


def test_open_source_recognises_shards_by_name(shards: Path) -> None:
    for path in (str(shards / "{000..006}.tar"), str(shards), [str(path) for path in sorted(shards.glob("*.tar"))]):
        source = open_source(path, shards=ShardOptions(shuffle_shards=3))
        assert isinstance(source, TarPairs)
        assert source.options.shuffle_shards == 3
        assert len(source) == 60
    one, *_ = every = sorted(map(str, shards.glob("*.tar")))
    for path in (one, every):
        with pytest.raises(
            InputError, match="classes.templates: .*tar is not a folder of classes; leave classes.templates out"
        ):
            open_source(path, classes=Classes(["a {}"]))


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_epoch_order_has_every_row_once_and_few_shards_at_once(window: int) -> None:
    sizes = [7, 1, 0, 12, 5, 9, 3, 20]
    shard_of = np.repeat(np.arange(8), sizes)
    orders = [shard_order(sizes, window, epoch, seed) for epoch in range(2) for seed in range(2)]
    for order in orders:
        assert sorted(order) == list(range(57))
        spread = [np.ptp(np.flatnonzero(shard_of[order] == shard)) + 1 for shard in range(8) if sizes[shard]]
        assert max(spread) <= sum(sorted(sizes)[-window:])  # from a shard's first sample to its last
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], shard_order(sizes, window, 0, 0))


def test_neighbours_in_a_shard_are_separated() -> None:
    order = shard_order([100] * 20, 10, epoch=0, seed=0)
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01
    assert len(set((order[:1000] // 100).tolist())) == 10
