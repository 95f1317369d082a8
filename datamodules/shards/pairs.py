"""Pairs in tar shards of img2dataset and webdataset: ``key.jpg``, ``key.txt`` and optionally ``key.json``."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from lit_clip.distributed import rank_and_world
from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.console import progress
from lit_clip.tools.images import OnError
from lit_clip.tools.own_files import default_cache_dir
from lit_clip.tools.reading import read_at
from lit_clip.tools.workers import Mapped, loader
from ..loading.store import Stamp, is_remote, stamp_of
from ..pairs.columns import ColumnPairs, checked_extra, group_name
from ..pairs.source import LISTED, NO_CAPTION, Columns, Row, ShardOptions, SkippedRows, thing_names
from .files import OpenShard, OpenShards, ShardFolder, expand_urls, find_index, make_index, open_index
from .index import BLOCK, OF_SHARD, WANTED, Summary

T = TypeVar("T")
Spans = dict[str, tuple[int, int]]  # offset and size of each file of a sample

GIGABYTE = 10**9
MAX_IMAGE_BYTES = 256 << 20  # of a file in a shard: more than Pillow's limit of pixels needs in any usual format


def _indexed(folder: ShardFolder, shard: tuple[str, Stamp]) -> Summary:
    return find_index(*shard, folder) or make_index(*shard, folder)  # another rank may have made it in the meantime


def _distinct_names(urls: Sequence[str]) -> list[str]:
    """Return the shards' paths below their common folder, without ``.tar``; sample keys begin with them."""
    names = [(url if is_remote(url) else os.path.abspath(url)).removesuffix(".tar") for url in urls]
    folders = {name.rpartition("/")[0] for name in names}
    common = os.path.commonpath(folders) if len(folders) > 1 and not any(map(is_remote, folders)) else ""
    if len(folders) == 1 or common:
        start = len(common or folders.pop())
        return [name[start:].lstrip("/") for name in names]
    return names


def shard_order(sizes: Sequence[int], shuffle_shards: int, epoch: int, seed: int) -> np.ndarray:
    """Return each row once, in an order that keeps the rows of a shard near each other.

    The shards are shuffled and cut into windows of at most ``shuffle_shards``, as equal as possible; the rows of a
    window are shuffled together. ``sizes`` are the rows of each shard, numbered in this order.

    Returns:
        int32 where it fits, else int64, ``[sum(sizes)]``.
    """
    rng = np.random.default_rng((seed, epoch))
    starts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
    order = np.empty(starts[-1], np.int32 if starts[-1] < 2**31 else np.int64)
    done = 0
    for window in np.array_split(rng.permutation(len(sizes)), -(-len(sizes) // shuffle_shards)):
        rows = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window.tolist()])
        rng.shuffle(rows)
        order[done : done + len(rows)] = rows
        done += len(rows)
    return order


class TarPairs(ColumnPairs):
    """Pairs in tar shards, with random access to each pair.

    Files that share a name are one sample: an image, a caption (``.txt``, else from ``.json``; one is drawn from a list
    in ``.captions.json``) and anything else. The positions of a shard's samples are read from its headers once and kept
    beside it as ``x.tar.index.arrow``, or in the cache folder where that is not writable; a changed shard is indexed
    again. Opening shards that have an index reads nothing else.

    Shards in a store are fetched whole when their first sample is read, and kept in the cache folder up to a limit. A
    store that does not answer is tried three times and then ends the run: its samples are not bad samples.

    Args:
        urls: see :func:`datamodules.shards.files.expand_urls`.
        columns: fields of the ``.json`` that hold the caption (or a list of them), the weight and the title, and name
            the group.
        on_error: for a missing, truncated or unreadable shard, and a sample without image or caption: ``error`` raises,
            ``skip`` leaves it out. Blank captions are left out either way, as from tables. ``left_out`` counts all.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        options: ShardOptions | None = None,
        columns: Columns = Columns(),  # noqa: B008  # immutable
        on_error: OnError = "error",
    ) -> None:
        super().__init__(str(urls), None)
        self.options = options or ShardOptions()
        self.columns = columns
        self.on_error: OnError = on_error
        self._missing: list[str] = []
        folder = Path(self.options.cache_folder or default_cache_dir() / "shards").expanduser()
        self._folder = ShardFolder(folder, int(self.options.cache_gb * GIGABYTE))
        wanted = expand_urls(urls)
        stamps = self._stamps(wanted)
        self.urls = [url for url in wanted if url in stamps]
        summaries = self._summaries(stamps)
        self._check(str(urls), summaries)
        self.sizes = [summary.samples for summary in summaries]
        self._ends = np.cumsum(self.sizes)
        self._shards = OpenShards(self.urls, summaries, self._folder)
        names = dict(zip(wanted, _distinct_names(wanted), strict=True))
        self._names = [names[url] for url in self.urls]
        self._check_columns()

    def _stamps(self, urls: Sequence[str]) -> dict[str, Stamp]:
        stamps = {}
        for url in urls:
            try:
                stamps[url] = stamp_of(url)
            except FileNotFoundError as error:
                if self.on_error == "error":
                    raise InputError(f"{url}: no such shard; fix the name or set on_error to skip") from error
                self._missing.append(url)
        require(bool(stamps), f"{urls[0]}: no such shard, nor any of the {len(urls)} that are named")
        return stamps

    def _summaries(self, stamps: dict[str, Stamp]) -> list[Summary]:
        found = {url: find_index(url, stamp, self._folder) for url, stamp in stamps.items()}
        missing = [(url, stamps[url]) for url, summary in found.items() if summary is None]
        rank, world = rank_and_world()
        first = len(missing) * rank // world  # ranks start at different shards and find the others' indexes
        missing = missing[first:] + missing[:first]
        with progress("indexing shards", len(missing), enabled=rank == 0 and len(missing) > 1) as advance:
            indexing: Mapped[Summary] = Mapped(partial(_indexed, self._folder), missing)
            made = loader(indexing, self.options.index_workers)
            for (url, _), summary in zip(missing, made, strict=True):
                self._refuse_problems(url, summary)
                found[url] = summary
                advance(1)
        summaries = [summary for summary in found.values() if summary is not None]
        for url, summary in zip(found, summaries, strict=True):
            self._refuse_problems(url, summary)
        return summaries

    def _refuse_problems(self, url: str, summary: Summary) -> None:
        """Raise the first problem of a shard, unless ``on_error`` is ``skip``."""
        serious = {reason: first for reason, (_, first) in summary.problems.items() if reason != NO_CAPTION}
        if not serious or self.on_error == "skip":
            return
        reason, key = next(iter(serious.items()))
        count = summary.problems[reason][0]
        where = f"{url} sample {key}" if key else url
        problem = reason if key else reason.removeprefix(OF_SHARD)
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise InputError(
            f"{where}: {problem}{more}; the shard has {_listed(summary.extensions)}, needed are {WANTED}; "
            "fix the shard, or set on_error to skip to train without such samples"
        )

    def _check(self, urls: str, summaries: Sequence[Summary]) -> None:
        """Raise if no sample is usable, or if the cache is smaller than the shards that are read together."""
        extensions: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for summary in summaries:
            extensions.update(summary.extensions)
            reasons.update({reason: count for reason, (count, _) in summary.problems.items()})
        if not any(summary.samples for summary in summaries):
            why = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(5))
            raise InputError(
                f"{urls}: no usable sample in {len(summaries)} shards, which have {_listed(extensions)}; "
                f"needed are {WANTED}" + (f" ({why})" if why else "")
            )
        sizes = [summary.stamp.size for url, summary in zip(self.urls, summaries, strict=True) if is_remote(url)]
        at_once = 2 * self.options.shuffle_shards * max(sizes, default=0)  # one window and the next
        if min(at_once, sum(sizes)) > self._folder.limit:
            needed = -(-10 * min(at_once, sum(sizes)) // GIGABYTE) / 10
            raise InputError(
                f"shards.cache_gb: {self.options.cache_gb} is too little for {2 * self.options.shuffle_shards} shards "
                f"at once, each would be fetched again and again; set it to {needed} or more, or lower "
                "shards.shuffle_shards"
            )

    def _check_columns(self) -> None:
        """Raise if the first sample lacks a named field."""
        named = self._fields()
        if not named:
            return
        _, _, cells, fields = self._read(0, ["json"])
        for column in named:
            if column not in fields:
                has = f"its .json has {', '.join(fields)}" if fields else "it has no .json"
                raise InputError(f"{cells.where}: no field {column!r}; {has}")

    def _fields(self) -> list[str]:
        columns = (self.columns.caption, self.columns.group, self.columns.weight, self.columns.title)
        return [column for column in columns if column is not None]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self, epoch: int, seed: int) -> np.ndarray:
        return shard_order(self.sizes, self.options.shuffle_shards, epoch, seed)

    @cached_property
    def left_out(self) -> SkippedRows:
        """Samples left out at opening; the lost rest of a damaged shard counts as one."""
        left_out = SkippedRows()
        for url in self._missing:
            left_out.add(url, "missing shard")
        for url, summary in zip(self.urls, self._shards.summaries, strict=True):
            listed = bool(summary.problems) and len(left_out.listed) < LISTED
            keys = open_index(url, summary, self._folder).problems if listed else {}
            for reason, (count, first) in summary.problems.items():
                short = "damaged shard" if reason.startswith(OF_SHARD) else reason
                for key in keys.get(reason, [first] * count):
                    left_out.add(f"{url} sample {key}" if key else url, short)
        return left_out

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _read(self, index: int, more: Sequence[str] = ()) -> tuple[OpenShard, Spans, Row, dict[str, Any]]:
        """Return a sample's open shard, the spans of its files, its text cells, and the fields of its .json."""
        number, row = self._locate(index)
        shard = self._shards[number]
        key, spans = shard.index.sample(row)
        where = f"{self.urls[number]} sample {key}"
        wanted = {*more, *(["json"] if self._fields() else [])}
        if self.columns.caption is None:
            wanted.add(next(name for name in ("captions", "text", "json") if name in spans))
        contents = {name: _content(shard, span, where) for name, span in spans.items() if name in wanted}
        fields = _json(contents["json"], where, dict) if "json" in contents else {}
        caption = self._caption(contents, fields, where)
        return shard, spans, Row(None, caption, f"{self._names[number]}/{key}", "", where), fields

    def cells(self, index: int) -> Row:
        shard, spans, cells, fields = self._read(index)
        group = "" if self.columns.group is None else group_name(fields.get(self.columns.group))
        image = partial(_content, shard, spans["image"], cells.where)
        return cells._replace(image=image, group=group, extra=checked_extra(self.columns, fields.get, cells.where))

    def things(self, rows: bool = False) -> pa.ChunkedArray | None:
        return None if self.columns.group is None or rows else self._things

    @cached_property
    def _things(self) -> pa.ChunkedArray | None:
        """Return each sample's group as its thing; a sample without a readable group is a thing of its own."""
        groups: list[str] = []
        with progress("reading groups", len(self), enabled=rank_and_world()[0] == 0) as advance:
            for row in range(len(self)):
                try:
                    groups.append(group_name(self._read(row)[-1].get(self.columns.group or "")))
                except BadSample:
                    groups.append("")
                advance(1)
        return thing_names(pa.chunked_array([groups], pa.string()))

    def image_identity(self, index: int) -> object:
        number, row = self._locate(index)
        return self.urls[number], tuple(self._shards.summaries[number].stamp), row

    def key(self, index: int) -> str:
        number, row = self._locate(index)
        return f"{self._names[number]}/{self._shards[number].index.sample(row)[0]}"

    def check(self) -> None:
        """Do nothing: the images are in the shards, and their headers have been read."""

    def _caption(self, contents: dict[str, bytes], fields: dict[str, Any], where: str) -> Any:
        if self.columns.caption is None and "captions" in contents:
            found: Any = _json(contents["captions"], where, list)
        elif self.columns.caption is None and "text" in contents:
            return _text(contents["text"], where)
        else:
            found = fields.get(self.columns.caption or "caption")
        return [each for each in found if isinstance(each, str)] if isinstance(found, list) else found


def _content(shard: OpenShard, span: tuple[int, int], where: str) -> bytes:
    offset, size = span
    if size > MAX_IMAGE_BYTES:
        raise BadSample(where, "file too large", f"a file of more than {MAX_IMAGE_BYTES >> 20} MB; make it smaller")
    part = read_at(shard.file, BLOCK + size, offset - BLOCK)
    if not _is_member(part, size):
        raise BadSample(where, "shard changed", "the shard changed since the run began; start again")
    return part[BLOCK:]


def _is_member(part: bytes, size: int) -> bool:
    """Return whether bytes are the header of a file of the given size, followed by the file."""
    try:
        header = tarfile.TarInfo.frombuf(part[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return header.size == size and len(part) == BLOCK + size


def _json(content: bytes, where: str, kind: type[T]) -> T:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample(where, "unreadable .json", f"its .json is not JSON ({error}); fix or remove it") from error
    if not isinstance(found, kind):
        raise BadSample(where, "unreadable .json", f"its .json holds no {kind.__name__}; fix or remove it")
    return found


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        detail = f"its caption is not UTF-8 text ({error.reason} at byte {error.start}); fix or remove it"
        raise BadSample(where, "caption is not text", detail) from error


def _listed(extensions: dict[str, int]) -> str:
    names = sorted(extensions, key=lambda name: (-extensions[name], name))
    return "files called " + ", ".join(f"*.{name[:20]}" for name in names[:8]) if names else "no sample files"
