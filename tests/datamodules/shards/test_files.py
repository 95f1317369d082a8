"""Names of shards, and shards in stores: fetched once, cached within a limit, retried."""

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from datamodules.loading.sampling import TrainingSample
from datamodules.loading.store import stamp_of
from datamodules.pairs.source import ShardOptions
from datamodules.shards.files import ShardFolder, expand_braces, expand_urls
from datamodules.shards.index import INDEX_SUFFIX
from datamodules.shards.pairs import TarPairs
from lit_clip.errors import BadSample, InputError
from tests.helpers.tar_shards import write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for fetched shards and cached indexes, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lit-clip" / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "seven")


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


class CaptionDataset:
    """Dataset of captions only."""

    def __init__(self, source: TarPairs) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: TrainingSample) -> str:
        return self.source.load(sample.row, None).caption


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


def test_store_is_read_in_whole_shards(shards: Path, cache: Path) -> None:
    put_into_memory(shards, "whole")
    source = TarPairs("memory://whole/", ShardOptions(index_workers=0))
    assert len(source.urls) == 7
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
        InputError, match=r"shards\.cache_gb: 1e-05 is too little for 4 shards at once.*or lower shards.shuffle_shards"
    ):
        TarPairs("memory://small/", ShardOptions(shuffle_shards=2, cache_gb=1e-5, index_workers=0))


def test_store_is_retried_and_ends_the_run_if_it_keeps_failing(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, failures = put_into_memory(shards, "flaky"), [1]
    source = TarPairs("memory://flaky/", ShardOptions(index_workers=0))
    read = type(store).get_file

    def get_file(self: fsspec.AbstractFileSystem, *arguments: object, **options: object) -> None:
        if failures[0]:
            failures[0] -= 1
            raise ConnectionError("the line is down")
        return read(self, *arguments, **options)

    monkeypatch.setattr(type(store), "get_file", get_file)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for path in cache.glob("*.tar"):
        path.unlink()
    assert source.load(0, None).caption == "number 0"
    failures[0] = 100
    with pytest.raises(InputError, match=r"006\.tar: cannot be fetched \(the line is down\)") as caught:
        source.load(len(source) - 1, None)
    assert not isinstance(caught.value, BadSample)  # on_error: skip would drop good samples
