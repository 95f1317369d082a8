"""Where tar shards lie: local files; and those of a store, fetched whole into a folder or read piece by piece."""

import glob
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from datamodules.shards.index import (
    INDEX_SUFFIX,
    MappedIndex,
    ShardIndex,
    Stamp,
    Summary,
    read_summary,
    scan_shard,
    write_index,
)
from lit_clip.errors import InputError

T = TypeVar("T")

OPEN_AT_ONCE = 32  # shards, of one process
ATTEMPTS = 3  # at a store that does not answer
VERSIONS = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_remote(url: str) -> bool:
    """Whether something is fsspec's to open; ``file://`` is not."""
    return "://" in url


def _store(url: str) -> tuple[Any, str]:
    """The store and the path in it; fsspec keeps one store of a kind for each process."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {' '.join(str(error).split())}") from error


def _retry(what: str, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Ask a store again after a failure: a run of days sees some, and none of them is the sample's fault.

    Raises:
        FileNotFoundError: it is not there.
        InputError: nor did it work later.
    """
    for attempt in range(ATTEMPTS):
        try:
            return function(*arguments, **options)
        except FileNotFoundError:
            raise
        except Exception as error:  # each store has its own
            if attempt == ATTEMPTS - 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"{what}: cannot be fetched ({reason}); asked {ATTEMPTS} times") from error
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Every shard that is meant, in the order given; those of a folder or of a pattern sorted.

    Args:
        urls: ``x.tar``, ``shards/{000..099}.tar``, ``shards/*.tar``, a folder of .tar files, or a list of these; any of
            them may be a URL that fsspec knows (a folder's URL ends with ``/``).

    Raises:
        InputError: no shard, or one twice.
    """
    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        for one in _expand_braces(url) if "{" in url else [url]:
            found += _expand_one(one)
    if not found:
        raise InputError(f"{urls}: no .tar file")
    seen: set[str] = set()
    for url in found:
        if url in seen:  # each of its samples would come twice an epoch
            raise InputError(f"{url}: named twice; name each shard once")
        if url.lower().endswith(COMPRESSED):
            raise InputError(f"{url}: samples cannot be read by their place in a compressed tar; unpack it to .tar")
        seen.add(url)
    return found


def _expand_braces(url: str) -> list[str]:
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise InputError(f"{url}: ranges of shards need braceexpand: pip install -e '.[shards]'") from error
    try:
        return list(braceexpand(url))
    except ValueError as error:
        raise InputError(f"{url}: its braces do not match ({error})") from error


def _expand_one(url: str) -> list[str]:
    if url.startswith("pipe:"):
        raise InputError(f"{url}: commands are not run; give the shards' own URLs (s3://, gs://, https://, ...)")
    if not is_remote(url) or url.startswith("file://"):
        path = url.removeprefix("file://")
        if os.path.isdir(path):
            return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if os.path.exists(path):
            return [path]
        found = sorted(glob.glob(path))
        return found if glob.has_magic(path) else [path]
    if not url.endswith("/") and "*" not in url:
        return [url]
    store, path = _store(url)
    try:
        pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
        return sorted(store.unstrip_protocol(name) for name in _retry(url, store.glob, pattern))
    except FileNotFoundError as error:
        raise InputError(f"{url}: no such folder") from error


def stamp_of(url: str) -> Stamp:
    """What changes when the shard does.

    Raises:
        FileNotFoundError: there is no such shard.
        InputError: the store does not answer, or knows no size.
    """
    if not is_remote(url):
        status = os.stat(url)
        if not os.path.isfile(url):
            raise InputError(f"{url}: not a file")
        return Stamp(status.st_size, str(status.st_mtime_ns))
    store, path = _store(url)
    info = _retry(url, store.info, path)
    if info.get("size") is None:
        raise InputError(f"{url}: the server does not say its size; fetch it and name the file")
    return Stamp(info["size"], str(next((info[key] for key in VERSIONS if info.get(key)), "")))


class ShardFolder:
    """A folder for what is fetched from stores, and for indexes that cannot lie beside their shards.

    Any number of processes may use it at a time.

    Args:
        folder: made when it is needed.
        limit: bytes of shards; those used longest ago make room for new ones.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def place(self, url: str, stamp: Stamp) -> Path:
        """The file for a shard; another one once the shard has changed."""
        digest = hashlib.sha256("\n".join((url, *map(str, stamp))).encode()).hexdigest()[:24]
        name = url.partition("?")[0].rpartition("/")[2].removesuffix(".tar")
        return self.folder / f"{digest}-{name}.tar"

    def open(self, url: str, stamp: Stamp) -> BinaryIO:
        """A shard as a local file, fetched if it is not there; by one process, however many ask."""
        if not is_remote(url):
            return open(url, "rb", buffering=0)
        path = self.place(url, stamp)
        while True:
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  # its reader closes it
                os.utime(path)
                return file
            except FileNotFoundError:  # or another process has just made room
                self._fetch(url, stamp, path)

    def _fetch(self, url: str, stamp: Stamp, path: Path) -> None:
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return
            self._make_room(stamp.size)
            part = path.with_suffix(".part")
            store, remote = _store(url)
            try:
                _retry(url, store.get_file, remote, str(part))
                if part.stat().st_size != stamp.size:
                    raise InputError(
                        f"{url}: {part.stat().st_size} bytes came instead of {stamp.size}; has it changed?"
                    )
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        shards = []
        for path in self.folder.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            shards.append((status.st_mtime_ns, status.st_size, path))
        total = wanted + sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)  # whoever has it open can still read it
            total -= size


def find_index(url: str, stamp: Stamp, folder: ShardFolder) -> Summary | None:
    """The index of a shard as it is now: beside it, or in the folder; of a remote shard brought into the folder."""
    own = Path(f"{folder.place(url, stamp)}{INDEX_SUFFIX}")
    beside = None if is_remote(url) else Path(f"{url}{INDEX_SUFFIX}")
    for path in (beside, own):
        summary = read_summary(path) if path is not None else None
        if summary is not None and (summary.stamp == stamp or (path == own and summary.stamp.size == stamp.size)):
            return summary
    return _remote_index(url, stamp, own) if is_remote(url) else None


def _remote_index(url: str, stamp: Stamp, own: Path) -> Summary | None:
    """What ``lit-clip shard`` wrote beside the shard; stores give times of their own, so its size must do."""
    store, path = _store(f"{url}{INDEX_SUFFIX}")
    try:
        content = store.cat_file(path)
    except Exception:  # that there is none is said in as many ways as there are stores
        return None
    own.parent.mkdir(parents=True, exist_ok=True)
    part = own.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, own)
    summary = read_summary(own)
    if summary is not None and summary.stamp.size == stamp.size:
        return summary
    own.unlink(missing_ok=True)
    return None


def make_index(url: str, stamp: Stamp, folder: ShardFolder) -> Summary:
    """Read a shard's headers and keep its index beside it, or in the folder where that cannot be written to."""
    with folder.open(url, stamp) if folder.limit or not is_remote(url) else _stream(url) as file:
        index = scan_shard(file, stamp.size)
    return keep_index(index, url, stamp, folder)


def _stream(url: str) -> BinaryIO:
    store, path = _store(url)
    return _retry(url, store.open, path, "rb")


def keep_index(index: ShardIndex, url: str, stamp: Stamp, folder: ShardFolder) -> Summary:
    """Write an index where :func:`find_index` finds it."""
    places = [Path(f"{folder.place(url, stamp)}{INDEX_SUFFIX}")]
    if not is_remote(url):
        places.insert(0, Path(f"{url}{INDEX_SUFFIX}"))
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_index(index, stamp, path)
        except OSError as error:
            if path == places[-1]:
                raise InputError(f"{path}: the index of {url} cannot be written ({error.strerror})") from error
            continue
        summary = read_summary(path)
        assert summary is not None, f"{path}: written and not readable"
        return summary
    raise AssertionError("unreachable")


class OpenShard:
    """One shard open for reading, with its index."""

    def __init__(self, url: str, summary: Summary, folder: ShardFolder) -> None:
        self.url, self.index = url, MappedIndex(summary.path)
        whole = folder.limit > 0 or not is_remote(url)
        self._file = folder.open(url, summary.stamp) if whole else None

    def read(self, offset: int, size: int) -> bytes:
        """That many bytes from there on, or as many as there are."""
        if self._file is not None:
            return os.pread(self._file.fileno(), size, offset)
        store, path = _store(self.url)
        data = _retry(self.url, store.cat_file, path, start=offset, end=offset + size)
        if len(data) > size:
            raise InputError(f"{self.url}: the server cannot send parts of a file; set cache_gb above 0")
        return data

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()


class OpenShards:
    """The shards that were read last, kept open; each process and each data worker has its own."""

    def __init__(self, urls: Sequence[str], summaries: Sequence[Summary], folder: ShardFolder) -> None:
        self.urls, self.summaries, self.folder = urls, summaries, folder
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def __getitem__(self, number: int) -> OpenShard:
        shard = self._open.get(number)
        if shard is None:
            if len(self._open) >= OPEN_AT_ONCE:
                self._open.popitem(last=False)[1].close()
            try:
                shard = OpenShard(self.urls[number], self.summaries[number], self.folder)
            except FileNotFoundError as error:
                raise InputError(f"{self.urls[number]}: was there, and is not any more") from error
            self._open[number] = shard
        self._open.move_to_end(number)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
