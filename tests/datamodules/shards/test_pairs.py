"""Pairs in tar shards against the same pairs in a table; damaged shards, indexes, order and stores."""

import csv
import http.server
import io
import json
import os
import pickle
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import datamodules
from datamodules.loading.sampling import TrainingSample
from datamodules.open_source import open_source
from datamodules.pairs.source import Pair
from datamodules.shards.files import ShardFolder, expand_braces, expand_urls, stamp_of
from datamodules.shards.index import INDEX_SUFFIX, split_name
from datamodules.shards.order import resampled_order, shard_order
from datamodules.shards.pairs import ShardOptions, TarPairs
from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import Preprocessing

SIZES = (1, 2, 3, 5, 9, 17, 23)  # 60 pairs in seven shards

Files = dict[str, bytes]  # by extension


def write_tar(path: Path, samples: Sequence[tuple[str, Files]], format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for key, files in samples:
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def image(shade: int = 0, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(content, format)
    return content.getvalue()


def numbered(count: int, first: int = 0) -> list[tuple[str, Files]]:
    """Return samples of one shade each, numbered from ``first``."""
    numbers = range(first, first + count)
    return [(f"{number:05d}", {"png": image(number % 256), "txt": f"number {number}".encode()}) for number in numbers]


def write_shards(folder: Path, sizes: Sequence[int] = SIZES) -> Path:
    folder.mkdir(exist_ok=True)
    done = 0
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number:03d}.tar", numbered(size, done))
        done += size
    return folder


def shade_of(pair: Pair) -> int:
    pixel = pair.image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for fetched shards and cached indexes, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lit-clip" / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "seven")


# Reading


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


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000.jpg", ("000", "jpg")),
        ("./a/000.JPG", ("a/000", "jpg")),
        ("a.b/000.captions.json", ("a.b/000", "captions.json")),
        ("a/.hidden.jpg", ("", "")),
        ("._000.jpg", ("", "")),
        ("README", ("", "")),
    ],
)
def test_key_ends_at_the_first_dot_of_the_file_name(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_equal_keys_in_two_shards_are_distinct(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [2])
    source = TarPairs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [source.read(i).key for i in range(4)] == ["a/000/00000", "a/000/00001", "b/000/00000", "b/000/00001"]


# Captions


def captions_of(tmp_path: Path, files: Files, **options: str) -> TarPairs:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tar"
    write_tar(path, [("000", {"png": image(), **files})])
    return TarPairs(str(path), **options)  # pyright: ignore[reportArgumentType]  # options are columns


def test_caption_is_the_text_or_else_from_the_json(tmp_path: Path) -> None:
    about = json.dumps(
        {"caption": "of the json", "long": "a longer one", "few": ["one", None, "two"], "id": 7}
    ).encode()
    both = {"txt": b"of the text\n", "json": about}
    assert captions_of(tmp_path, both).captions(0) == ["of the text"]
    assert captions_of(tmp_path, {"json": about}).captions(0) == ["of the json"]
    assert captions_of(tmp_path, both, caption_column="long").captions(0) == ["a longer one"]
    assert captions_of(tmp_path, both, caption_column="few").captions(0) == ["one", "two"]
    assert captions_of(tmp_path, both, group_column="id").read(0).group == "7"
    with pytest.raises(InputError, match=r"sample 000: no field 'lang'; its \.json has caption, long, few, id"):
        captions_of(tmp_path, both, caption_column="lang")


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
    assert source.left_out.counts == {
        "missing image": 1,
        "missing caption": 1,
        "no caption": 1,
        "duplicate key": 1,
    }
    assert {where.rpartition(" ")[2] for where, _ in source.left_out.listed} == {"00001", "00003", "00004", "00005"}


def test_blank_captions_are_left_out_as_from_tables(tmp_path: Path) -> None:
    samples = numbered(3)
    samples[1][1]["txt"] = b""
    write_tar(tmp_path / "x.tar", samples)
    source = TarPairs(str(tmp_path))
    assert len(source) == 2
    assert str(source.left_out) == "1 row without a caption"


@pytest.mark.parametrize("cut", [1, 512, 1000, 1536, 2048, 5000, 7000, 9000, -10240])
def test_truncated_tar_keeps_the_samples_before_the_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(5))
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    expected = sum(end <= len(whole) for end in ends) // 2
    with pytest.raises(InputError, match=r"x\.tar: is (truncated|not a tar)"):
        TarPairs(str(path))
    if expected == 0:
        with pytest.raises(InputError, match="no usable sample"):
            TarPairs(str(path), on_error="skip")
        return
    source = TarPairs(str(path), on_error="skip")
    assert [source.captions(index) for index in range(len(source))] == [[f"number {i}"] for i in range(expected)]
    assert source.left_out.counts["damaged shard"] == 1


@pytest.mark.parametrize("cut", [-9728, -513])
def test_tar_without_all_its_padding_is_complete(tmp_path: Path, cut: int) -> None:
    write_tar(tmp_path / "x.tar", numbered(5))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:cut])
    assert len(TarPairs(str(tmp_path))) == 5


def test_overwritten_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(5))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[4].offset
    content[start : start + 512] = random.Random(0).randbytes(512)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.tar: is truncated or damaged at byte {start}"):
        TarPairs(str(path))
    assert len(TarPairs(str(path), on_error="skip")) == 2


def test_damaged_tars_only_give_input_errors_or_samples(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "x.tar"
    write_tar(path, numbered(4), tarfile.PAX_FORMAT)
    good = path.read_bytes()
    for _ in range(60):
        content = bytearray(good)
        for _ in range(rng.choice([1, 4, 64])):
            block = rng.randrange(0, len(good) // 512) * 512
            content[block + rng.randrange(160)] = rng.randrange(256)  # names, sizes and checksums of headers
        path.write_bytes(content[: rng.randrange(1, len(good) + 1)] if rng.random() < 0.3 else content)
        os.utime(path, ns=(rng.getrandbits(60),) * 2)
        try:
            source = TarPairs(str(path), on_error="skip")
        except InputError:
            continue
        for index in range(len(source)):
            try:
                assert source.load(index, None).caption
            except BadSample:
                continue


def test_non_tars_and_missing_shards_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", numbered(2))
    (tmp_path / "1.tar").write_bytes(random.Random(0).randbytes(2000))
    wanted = str(tmp_path / "{0..2}.tar")
    with pytest.raises(InputError, match=r"2\.tar: no such shard"):
        TarPairs(wanted)
    source = TarPairs(wanted, on_error="skip")
    assert len(source) == 2
    assert source.read(1).key == "0/00001"
    assert source.left_out.counts == {
        "missing shard": 1,
        "damaged shard": 1,
    }
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


# Names of shards


def test_braces_patterns_folders_and_lists_name_shards(shards: Path) -> None:
    seven = [str(shards / f"{number:03d}.tar") for number in range(7)]
    assert expand_urls(str(shards / "{000..006}.tar")) == seven
    assert expand_urls(str(shards)) == expand_urls(str(shards / "*.tar")) == expand_urls(f"file://{shards}") == seven
    assert expand_urls([seven[3], str(shards / "{001..002}.tar")]) == [seven[3], seven[1], seven[2]]
    assert expand_urls("s3://bucket/{a,b}/{00..01}.tar")[1] == "s3://bucket/a/01.tar"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.tar", ["0.tar"]),
        ("{008..010}.tar", ["008.tar", "009.tar", "010.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{8..010}", ["008", "009", "010"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{07..07}.tar", ["07.tar"]),
        ("{a,b,}-{0..1}", ["a-0", "a-1", "b-0", "b-1", "-0", "-1"]),
        ("{../a,b}/0.tar", ["../a/0.tar", "b/0.tar"]),
        ("a{b}c{}.tar", ["a{b}c{}.tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(name: str, expected: list[str]) -> None:
    assert expand_braces(name) == expected


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("{00..03.tar", "braces do not match or are nested"),
        ("00..03}.tar", "braces do not match or are nested"),
        ("{a,{b,c}}.tar", "braces do not match or are nested"),
        ("{a..c}.tar", r"\{a\.\.c\} is not a range of whole numbers"),
        ("{-1..1}.tar", "is not a range of whole numbers"),
        ("{0..6..2}.tar", "is not a range of whole numbers"),
        (["a.tar", "a.tar"], "a.tar: named twice"),
        ("x.tar.gz", "unpack it to .tar"),
        ("pipe:aws s3 cp s3://b/0.tar -", "give the shards' own URLs"),
        ("nowhere/*.tar", "no .tar file"),
        ("bogus://bucket/0.tar", "bogus://bucket/0.tar: "),
    ],
)
def test_invalid_shard_name_is_an_error(urls: str | list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TarPairs(urls)


# Indexes


def test_indexed_shard_is_opened_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(4))
    first = TarPairs(str(path))
    assert Path(f"{path}{INDEX_SUFFIX}").exists()
    times = path.stat().st_mtime_ns
    path.write_bytes(bytes(path.stat().st_size))  # zeros, no samples
    os.utime(path, ns=(times, times))
    assert TarPairs(str(path)).sizes == first.sizes == [4]


def test_changed_shard_is_indexed_again(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(4))
    assert len(TarPairs(str(path))) == 4
    write_tar(path, numbered(6))
    assert len(TarPairs(str(path))) == 6
    Path(f"{path}{INDEX_SUFFIX}").write_bytes(b"ARROW1 no index")
    assert len(TarPairs(str(path))) == 6


def test_index_is_cached_where_the_shards_folder_is_not_writable(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, numbered(4))
    Path(f"{path}{INDEX_SUFFIX}").mkdir()  # stands for a read-only folder, which root could write to
    assert len(TarPairs(str(path))) == 4
    made = list(cache.glob(f"*{INDEX_SUFFIX}"))
    assert len(made) == 1
    before = made[0].stat().st_mtime_ns
    assert len(TarPairs(str(path))) == 4
    assert made[0].stat().st_mtime_ns == before


def test_pickled_source_is_small_and_still_reads(shards: Path) -> None:
    source = TarPairs(str(shards))
    source.load(0, None)
    content = pickle.dumps(source)
    assert len(content) < 10_000
    assert pickle.loads(content).captions(59) == ["number 59"]


# Order


def write_same_table(folder: Path) -> Path:
    """Write the pairs of :func:`write_shards` as a table."""
    for number in range(60):
        (folder / f"{number}.png").write_bytes(image(number))
    rows = "".join(f"{number}.png,number {number}\n" for number in range(60))
    (folder / "pairs.csv").write_text(f"image,caption\n{rows}")
    return folder / "pairs.csv"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["table", "shards"])
def test_ranks_and_workers_together_have_each_pair_once(
    kind: str, workers: int, world: int, shards: Path, tmp_path: Path
) -> None:
    """In training, whose size is a multiple of the batch, and in validation, where it is not."""
    data = str(shards if kind == "shards" else write_same_table(tmp_path))
    training: Counter[str] = Counter()
    validation: Counter[str] = Counter()
    lengths = set()
    for rank in range(world):
        options = {"num_workers": workers, "preprocessing": Preprocessing(image_size=4)}
        module = datamodules.Captions(data, data, batch_size={1: 10, 2: 5, 3: 4}[world], **options)
        connector = SimpleNamespace(use_distributed_sampler=False)
        trainer: Any = SimpleNamespace(global_rank=rank, world_size=world, _accelerator_connector=connector)
        module.trainer = trainer
        module.setup("fit")
        batches = list(module.train_dataloader())
        lengths.add(len(batches))
        training.update(caption for batch in batches for caption in batch.captions)
        module.batch_size = 7
        validation.update(caption for batch in module.val_dataloader() for caption in batch.captions)
    expected = Counter(f"number {number}" for number in range(60))
    assert training == validation == expected
    assert len(lengths) == 1


class CaptionDataset:
    """Dataset of captions only."""

    def __init__(self, source: TarPairs) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: TrainingSample) -> str:
        return self.source.load(sample.row, None).caption


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


def test_resampled_rows_are_drawn_evenly_and_fill_the_epoch_size(shards: Path) -> None:
    counts = np.bincount(resampled_order([10, 30, 60], 2, 200_000, epoch=0, seed=0), minlength=100)
    assert counts.sum() == 200_000
    assert counts.min() > 1700
    assert counts.max() < 2300
    source = TarPairs(str(shards), ShardOptions(resampled=True, epoch_size=13))
    assert source.epoch_size == len(source.order(0, 0)) == 13
    assert not np.array_equal(source.order(0, 0), source.order(1, 0))
    assert np.array_equal(source.order(1, 0), source.order(1, 0))
    with pytest.raises(InputError, match="drawing with replacement holds nothing out"):
        source.divide(0.1, 0)


# Stores


def put_into_memory(shards: Path, name: str) -> fsspec.AbstractFileSystem:
    store = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        store.pipe(f"/{name}/{path.name}", path.read_bytes())
    return store


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server of the seven shards, and the requests that it received."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            requests.append(f"{self.command} {self.path}")

        def translate_path(self, path: str) -> str:
            return str(shards / path.rpartition("/")[2].replace(INDEX_SUFFIX, ".none"))  # it has no indexes

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", requests
        httpd.shutdown()
        thread.join()


def same_pairs(source: TarPairs, other: TarPairs) -> bool:
    assert len(source) == len(other)
    for index in range(len(source)):
        ours, theirs = source.load(index, None), other.load(index, None)
        assert (ours.caption, ours.image.tobytes()) == (theirs.caption, theirs.image.tobytes())
    return True


def test_shards_of_a_web_server_are_fetched_once_each(shards: Path, server: tuple[str, list[str]]) -> None:
    url, requests = server
    options = ShardOptions(index_workers=0)
    assert same_pairs(TarPairs(f"{url}/{{000..006}}.tar", options), TarPairs(str(shards)))
    assert same_pairs(TarPairs(f"{url}/{{000..006}}.tar", options), TarPairs(str(shards)))
    fetched = Counter(line for line in requests if line.startswith("GET") and line.endswith(".tar"))
    assert fetched == {f"GET /{number:03d}.tar": 1 for number in range(7)}
    with pytest.raises(InputError, match=r"007\.tar: no such shard"):
        TarPairs(f"{url}/{{005..007}}.tar", options)


def test_data_workers_fetch_a_shard_that_was_removed_from_the_cache(
    shards: Path, server: tuple[str, list[str]], cache: Path
) -> None:
    url, requests = server
    source = TarPairs(f"{url}/{{003..006}}.tar", ShardOptions(index_workers=2))
    for path in cache.glob("*.tar"):
        path.unlink()
    requests.clear()
    rows = [TrainingSample(0, row) for row in range(len(source))]
    loader = DataLoader(CaptionDataset(source), sampler=rows, batch_size=9, num_workers=2)
    captions = [caption for batch in loader for caption in batch]
    assert captions == [f"number {number}" for number in range(6, 60)]
    fetched = Counter(line for line in requests if line.startswith("GET") and line.endswith(".tar"))
    assert fetched == {f"GET /{number:03d}.tar": 1 for number in range(3, 7)}


def test_store_is_read_in_whole_shards_or_piece_by_piece(shards: Path, cache: Path) -> None:
    put_into_memory(shards, "whole")
    source = TarPairs("memory://whole/", ShardOptions(index_workers=0))
    assert len(source.urls) == 7
    assert same_pairs(source, TarPairs(str(shards)))
    assert len(list(cache.glob("*.tar"))) == 7
    put_into_memory(shards, "pieces")
    source = TarPairs("memory://pieces/*.tar", ShardOptions(index_workers=0, cache_gb=0))
    assert same_pairs(source, TarPairs(str(shards)))
    assert len(list(cache.glob("*.tar"))) == 7


def test_index_beside_a_remote_shard_is_used(tmp_path: Path, cache: Path) -> None:
    folder = write_shards(tmp_path / "indexed", [4])
    TarPairs(str(folder))
    store = put_into_memory(folder, "indexed")
    store.pipe(f"/indexed/000.tar{INDEX_SUFFIX}", Path(f"{folder}/000.tar{INDEX_SUFFIX}").read_bytes())
    source = TarPairs("memory://indexed/000.tar")
    assert len(source) == 4
    assert not list(cache.glob("*.tar"))  # the shard itself was not read
    assert source.load(3, None).caption == "number 3"


def test_cache_stays_within_its_limit_and_keeps_recently_used_shards(shards: Path, cache: Path) -> None:
    put_into_memory(shards, "limited")
    urls = [f"memory:///limited/{number:03d}.tar" for number in range(7)]
    stamps = [stamp_of(url) for url in urls]
    folder = ShardFolder(cache, limit=sum(stamp.size for stamp in stamps[4:]))
    for url, stamp in zip(urls, stamps, strict=True):
        with folder.open(url, stamp) as file:
            assert len(file.read()) == stamp.size
        assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= folder.limit
    assert all(folder.place(url, stamp).exists() for url, stamp in zip(urls[4:], stamps[4:], strict=True))


def test_cache_smaller_than_the_shards_read_at_once_is_refused(shards: Path) -> None:
    put_into_memory(shards, "small")
    with pytest.raises(
        InputError, match=r"shards\.cache_gb: 1e-05 is too little for 4 shards at once.*or set cache_gb to 0"
    ):
        TarPairs("memory://small/", ShardOptions(shuffle_shards=2, cache_gb=1e-5, index_workers=0))


def test_store_is_retried_and_ends_the_run_if_it_keeps_failing(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, failures = put_into_memory(shards, "flaky"), [1]
    source = TarPairs("memory://flaky/", ShardOptions(index_workers=0, cache_gb=0))
    read = type(store).cat_file

    def cat_file(self: fsspec.AbstractFileSystem, *arguments: object, **options: object) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise ConnectionError("the line is down")
        return read(self, *arguments, **options)

    monkeypatch.setattr(type(store), "cat_file", cat_file)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert source.load(0, None).caption == "number 0"
    failures[0] = 100
    with pytest.raises(InputError, match=r"000\.tar: cannot be fetched \(the line is down\)") as caught:
        source.load(0, None)
    assert not isinstance(caught.value, BadSample)  # on_error: skip would drop good samples


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_shards": 0}, "shuffle_shards: 0"),
        ({"cache_gb": -1.0}, "cache_gb: -1.0"),
        ({"epoch_size": 5}, "epoch_size: only for shards.resampled"),
        ({"resampled": True, "epoch_size": 0}, "epoch_size: 0"),
    ],
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
