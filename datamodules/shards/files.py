"""Locations of tar shards: local files, and files in a store, which are fetched whole into a folder."""

import glob
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lit_clip.errors import InputError, require
from lit_clip.tools.atomic import make_folder, replacing
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.hub_client import store_of
from ..loading.store import Stamp, fetch, is_remote, retry
from .index import INDEX_SUFFIX, MappedIndex, Summary, read_summary, scan_shard, write_index

OPEN_AT_ONCE = 32  # shards in each process
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Return all named shards in the given order; shards of a folder or a pattern are sorted.

    Args:
        urls: ``x.tar``, ``shards/{000..099}.tar``, ``shards/*.tar``, a folder of .tar files, or a list of these; each
            may be an address in a store (a folder's URL ends with ``/``).
    """
    given = [urls] if isinstance(urls, str) else urls
    shards = [shard for url in given for name in expand_braces(url) for shard in _expand_name(name)]
    require(bool(shards), f"{urls}: no .tar file")
    seen: set[str] = set()
    for url in shards:
        require(url not in seen, f"{url}: named twice; name each shard once")  # or its samples would repeat in an epoch
        if url.lower().endswith(COMPRESSED):
            raise InputError(f"{url}: a compressed tar cannot be read at random; unpack it to .tar")
        seen.add(url)
    return shards


def expand_braces(name: str) -> list[str]:
    """Expand ranges (``{000..099}``) and lists (``{a,b}``) in braces, as a shell does."""
    parts = re.split(r"\{([^{}]*)\}", name)  # every second part was in braces
    if any(brace in part for part in parts for brace in "{}"):
        raise InputError(f"{name}: its braces do not match or are nested; use {{000..099}} or {{a,b}}")
    choices = [_choices(part, name) if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, name: str) -> list[str]:
    """Return the texts that a pair of braces expands to; braces without a range or list are part of the name."""
    if "," in inside:
        return inside.split(",")
    if ".." not in inside:
        return [f"{{{inside}}}"]
    bounds = inside.split("..")
    if len(bounds) != 2 or not all(re.fullmatch("[0-9]+", bound) for bound in bounds):
        raise InputError(f"{name}: {{{inside}}} is not a range of whole numbers, such as {{000..099}}")
    first, last = map(int, bounds)
    padded = any(bound.startswith("0") and bound != "0" for bound in bounds)
    width = max(map(len, bounds)) if padded else 0
    step = 1 if first <= last else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def _expand_name(url: str) -> list[str]:
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
    store, path = store_of(url)
    try:
        pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
        return sorted(store.unstrip_protocol(name) for name in retry(url, store.glob, pattern))
    except FileNotFoundError as error:
        raise InputError(f"{url}: no such folder") from error


class ShardFolder:
    """Cache for shards fetched from stores, and for indexes that cannot be written beside their shards.

    Any number of processes may use it at once.

    Args:
        limit: bytes of shards to keep; the least recently used make room for new ones.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def place(self, url: str, stamp: Stamp) -> Path:
        """Return the cache file of a shard; a changed shard gets another file."""
        digest = hex_digest([url, *stamp])[:24]
        name = url.partition("?")[0].rpartition("/")[2].removesuffix(".tar")
        name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:100]  # a listing may give it
        return self.folder / f"{digest}-{name}.tar"

    def open(self, url: str, stamp: Stamp) -> BinaryIO:
        """Open a shard as a local file, fetched if missing; one process fetches it for all that ask."""
        if not is_remote(url):
            return open(url, "rb", buffering=0)
        path = self.place(url, stamp)
        while True:
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  # its reader closes it
                os.utime(path)
                return file
            except FileNotFoundError:  # or another process has just made room
                fetch(url, stamp, path, lambda: self._make_room(stamp.size))

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
            path.unlink(missing_ok=True)  # processes that have it open can still read it
            total -= size


def find_index(url: str, stamp: Stamp, folder: ShardFolder) -> Summary | None:
    """Return the index of a shard's present version, from beside it or from the folder; fetch a remote one."""
    cached = Path(f"{folder.place(url, stamp)}{INDEX_SUFFIX}")
    beside = None if is_remote(url) else Path(f"{url}{INDEX_SUFFIX}")
    for path in (beside, cached):
        summary = read_summary(path) if path is not None else None
        if summary is not None and (summary.stamp == stamp or (path == cached and summary.stamp.size == stamp.size)):
            return summary
    return _fetch_index(url, stamp, cached) if is_remote(url) else None


def _fetch_index(url: str, stamp: Stamp, cached: Path) -> Summary | None:
    """Fetch the index beside a remote shard; compare only sizes, because stores set their own times."""
    store, path = store_of(f"{url}{INDEX_SUFFIX}")
    try:
        content = store.cat_file(path)
    except Exception:  # every store reports a missing file in its own way
        return None
    cached.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cached) as draft:
        draft.write_bytes(content)
    summary = read_summary(cached)
    if summary is not None and summary.stamp.size == stamp.size:
        return summary
    cached.unlink(missing_ok=True)
    return None


def make_index(url: str, stamp: Stamp, folder: ShardFolder) -> Summary:
    """Read a shard's headers, and write its index beside it, or into the folder if that fails."""
    with folder.open(url, stamp) as file:
        scan = scan_shard(file, stamp.size)
    if not is_remote(url):
        with suppress(InputError):  # a read-only folder
            return write_index(scan, stamp, Path(f"{url}{INDEX_SUFFIX}"))
    cached = Path(f"{folder.place(url, stamp)}{INDEX_SUFFIX}")
    make_folder(cached.parent)
    return write_index(scan, stamp, cached)


def open_index(url: str, summary: Summary, folder: ShardFolder) -> MappedIndex:
    """Open a shard's index; make a damaged one again."""
    try:
        return MappedIndex(summary)
    except InputError as error:
        made = make_index(url, summary.stamp, folder)
        if made.samples != summary.samples:
            raise InputError(f"{url}: its index listed other samples and was written again; start again") from error
        return MappedIndex(made)


@dataclass(frozen=True)
class OpenShard:
    """One shard open for reading, with its index."""

    index: MappedIndex
    file: BinaryIO


class OpenShards:
    """The most recently read shards, kept open; each process and each data worker has its own."""

    def __init__(self, urls: Sequence[str], summaries: Sequence[Summary], folder: ShardFolder) -> None:
        self.urls, self.summaries, self.folder = urls, summaries, folder
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def __getitem__(self, number: int) -> OpenShard:
        shard = self._open.get(number)
        if shard is None:
            url, summary = self.urls[number], self.summaries[number]
            if len(self._open) >= OPEN_AT_ONCE:
                self._open.popitem(last=False)[1].file.close()
            try:
                index = open_index(url, summary, self.folder)
                shard = OpenShard(index, self.folder.open(url, summary.stamp))
            except FileNotFoundError as error:
                raise InputError(f"{url}: was removed since the run began; start again") from error
            self._open[number] = shard
        self._open.move_to_end(number)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
