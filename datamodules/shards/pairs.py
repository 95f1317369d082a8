"""Pairs in tar shards, as img2dataset and webdataset write them: ``key.jpg``, ``key.txt`` and maybe ``key.json``."""

import io
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from datamodules.loading.bad_samples import BLANK, OnError, check_caption
from datamodules.loading.cache import default_cache_dir
from datamodules.pairs.source import LISTED, NO_CAPTION, EncodedPair, LeftOut, Pair, PairSource
from datamodules.shards.files import (
    OpenShard,
    OpenShards,
    ShardFolder,
    expand_urls,
    find_index,
    is_remote,
    make_index,
    stamp_of,
)
from datamodules.shards.index import BLOCK, OF_SHARD, WANTED, MappedIndex, Stamp, Summary
from datamodules.shards.order import resampled_order, shard_order
from lit_clip.distributed import rank_and_world
from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.console import progress
from lit_clip.tools.images import open_image
from lit_clip.tools.workers import loader

T = TypeVar("T")

GIGABYTE = 10**9
GAP = 64 * 1024  # bytes between two files of a sample that are rather read than asked past


@dataclass
class ShardOptions:
    """How tar shards are read.

    Attributes:
        shuffle_shards: samples are shuffled among those of about so many shards, and the shards among all.
        resampled: draw shards and samples with replacement instead of each sample once an epoch.
        epoch_size: samples an epoch of a ``resampled`` set; None: as many as there are.
        cache_folder: for what is fetched from stores; None: ``~/.cache/lit-clip/shards``.
        cache_gb: of whole shards that are kept there, those used longest ago making room; 0: keep none and read each
            sample by its place in the store.
        index_workers: processes that read the headers of shards without an index.
    """

    shuffle_shards: int = 10
    resampled: bool = False
    epoch_size: int | None = None
    cache_folder: str | None = None
    cache_gb: float = 50.0
    index_workers: int = 8

    def __post_init__(self) -> None:
        require(self.shuffle_shards >= 1, f"shards.shuffle_shards: {self.shuffle_shards} must be at least 1")
        require(self.cache_gb >= 0, f"shards.cache_gb: {self.cache_gb} must be at least 0")
        require(self.index_workers >= 0, f"shards.index_workers: {self.index_workers} must be at least 0")
        if self.epoch_size is not None:
            require(
                self.resampled, "shards.epoch_size: each sample comes once an epoch unless shards.resampled is true"
            )
            require(self.epoch_size >= 1, f"shards.epoch_size: {self.epoch_size} must be at least 1")


class _Indexing(Dataset[Summary]):
    """A shard is indexed by asking for it."""

    def __init__(self, shards: Sequence[tuple[str, Stamp]], folder: ShardFolder) -> None:
        self.shards, self.folder = shards, folder

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Summary:
        url, stamp = self.shards[number]
        return find_index(url, stamp, self.folder) or make_index(url, stamp, self.folder)  # of another process


def _names(urls: Sequence[str]) -> list[str]:
    """What tells shards apart, for keys: their paths below what all have in common, without ``.tar``."""
    names = [(url if is_remote(url) else os.path.abspath(url)).removesuffix(".tar") for url in urls]
    folders = {name.rpartition("/")[0] for name in names}
    common = os.path.commonpath(folders) if len(folders) > 1 and not any(map(is_remote, folders)) else ""
    if len(folders) == 1 or common:
        start = len(common or folders.pop())
        return [name[start:].lstrip("/") for name in names]
    return names


class TarPairs(PairSource):
    """The pairs of tar shards, each read by its place in the tar.

    Files of one name belong to one sample: an image, a caption (``.txt``; else that of ``.json``; of several in
    ``.captions.json``, a list, one is drawn) and whatever else. Where a shard's samples lie is read off its headers
    once and kept beside it, as ``x.tar.index.arrow``, or in the cache folder if it cannot be written there; a changed
    shard is indexed again. Opening shards that have an index reads nothing else.

    Shards of a store (any URL that fsspec knows) are fetched whole when their first sample is read, and kept in the
    cache folder up to a limit. A store that does not answer is asked three times and then ends the run: its samples are
    not bad ones.

    Args:
        urls: see :func:`datamodules.shards.files.expand_urls`.
        options: of reading.
        caption_column: a field of the ``.json`` that holds the caption (or a list of them).
        group_column: a field of the ``.json`` that names the group.
        on_error: what a shard that is missing, cut off or no tar does, and a sample without an image or a caption:
            ``error`` raises, ``skip`` leaves out what cannot be read. Blank captions are left out in either case, as
            they are of tables. ``left_out`` counts them all.

    Raises:
        InputError: no shard, a broken one under ``error``, or no sample that can be used.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        options: ShardOptions | None = None,
        caption_column: str | None = None,
        group_column: str | None = None,
        on_error: OnError = "error",
    ) -> None:
        self.options = options or ShardOptions()
        self.caption_column, self.group_column, self.on_error = caption_column, group_column, on_error
        self._absent: list[str] = []
        folder = (
            Path(self.options.cache_folder).expanduser()
            if self.options.cache_folder
            else default_cache_dir() / "shards"
        )
        self._folder = ShardFolder(folder, int(self.options.cache_gb * GIGABYTE))
        wanted = expand_urls(urls)
        stamps = self._stamps(wanted)
        self.urls = [url for url in wanted if url in stamps]
        summaries = self._summaries(stamps)
        self._check(str(urls), summaries)
        self.sizes = [summary.samples for summary in summaries]
        self._ends = np.cumsum(self.sizes)
        self._shards = OpenShards(self.urls, summaries, self._folder)
        self._names = _names(wanted)
        if len(self.urls) < len(wanted):
            self._names = [name for name, url in zip(self._names, wanted, strict=True) if url in stamps]
        self._check_columns()

    def _stamps(self, urls: Sequence[str]) -> dict[str, Stamp]:
        stamps = {}
        for url in urls:
            try:
                stamps[url] = stamp_of(url)
            except FileNotFoundError as error:
                if self.on_error == "error":
                    raise InputError(f"{url}: no such shard; fix the name, or set on_error: skip") from error
                self._absent.append(url)
        if not stamps:
            raise InputError(f"{urls[0]}: no such shard, nor any other of {len(urls)}")
        return stamps

    def _summaries(self, stamps: dict[str, Stamp]) -> list[Summary]:
        found = {url: find_index(url, stamp, self._folder) for url, stamp in stamps.items()}
        missing = [(url, stamps[url]) for url, summary in found.items() if summary is None]
        rank, world = rank_and_world()
        first = len(missing) * rank // world  # every rank begins at another one, and finds what the others have made
        missing = missing[first:] + missing[:first]
        shown = rank == 0 and len(missing) > 1
        with progress("indexing shards", len(missing), enabled=shown) as advance:
            indexing: Any = _Indexing(missing, self._folder)
            made = loader(indexing, self.options.index_workers)
            for (url, _), summary in zip(missing, made, strict=True):
                self._complain(url, summary)
                found[url] = summary
                advance(1)
        for url, summary in found.items():
            assert summary is not None
            self._complain(url, summary)
        return [summary for summary in found.values() if summary is not None]

    def _complain(self, url: str, summary: Summary) -> None:
        """Under ``error`` raise what is wrong with a shard."""
        serious = {reason: first for reason, (_, first) in summary.problems.items() if reason != NO_CAPTION}
        if not serious or self.on_error == "skip":
            return
        reason, key = next(iter(serious.items()))
        count = summary.problems[reason][0]
        where = f"{url} sample {key}" if key else url
        what = reason if key else reason.removeprefix(OF_SHARD)
        more = f" (and of {count - 1} more)" if count > 1 else ""
        raise InputError(
            f"{where}: {what}{more}; the shard has {_listed(summary.extensions)}, wanted are {WANTED}; "
            "fix the shard, or set on_error: skip to go on without what is missing"
        )

    def _check(self, urls: str, summaries: Sequence[Summary]) -> None:
        """No sample at all, or a cache too small for what is read at a time, is an error."""
        extensions: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for summary in summaries:
            extensions.update(summary.extensions)
            reasons.update({reason: count for reason, (count, _) in summary.problems.items()})
        if not any(summary.samples for summary in summaries):
            why = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(5))
            raise InputError(
                f"{urls}: no usable sample in {len(summaries)} shards, which have {_listed(extensions)}; "
                f"wanted are {WANTED}" + (f" ({why})" if why else "")
            )
        sizes = [summary.stamp.size for url, summary in zip(self.urls, summaries, strict=True) if is_remote(url)]
        at_once = 2 * self.options.shuffle_shards * max(sizes, default=0)  # of one window and the next
        if self._folder.limit and min(at_once, sum(sizes)) > self._folder.limit:
            needed = -(-10 * min(at_once, sum(sizes)) // GIGABYTE) / 10
            raise InputError(
                f"shards.cache_gb: {self.options.cache_gb} is too little for {2 * self.options.shuffle_shards} shards "
                f"at a time, each would be fetched again and again; set it to {needed} or more, shards.shuffle_shards "
                "lower, or cache_gb to 0 to read each sample by its place in the store"
            )

    def _check_columns(self) -> None:
        """A field that the first sample does not have is a mistake."""
        columns = [column for column in (self.caption_column, self.group_column) if column is not None]
        if not columns:
            return
        _, where, contents = self._sample(0, ["json"])
        fields = _fields(contents, where)
        for column in columns:
            if column not in fields:
                has = f"its .json has {', '.join(fields)}" if fields else "it has no .json"
                raise InputError(f"{where}: no field {column!r}; {has}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def epoch_size(self) -> int:
        return self.options.epoch_size or len(self)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Rows of an epoch: :func:`shard_order`, or :func:`resampled_order`."""
        if self.options.resampled:
            return resampled_order(self.sizes, self.options.shuffle_shards, self.epoch_size, epoch, seed)
        return shard_order(self.sizes, self.options.shuffle_shards, epoch, seed)

    def divide(self, share: float, seed: int) -> tuple[PairSource, PairSource]:
        message = (
            "shards.resampled: of shards drawn with replacement none is kept for validation; give data.init_args.val"
        )
        require(not self.options.resampled, message)
        return super().divide(share, seed)

    @property
    def left_out(self) -> LeftOut:
        """What is missing of a shard counts as one sample, however many it was."""
        left_out = LeftOut()
        for url in self._absent:
            left_out.add(url, "missing shard")
        for url, summary in zip(self.urls, self._shards.summaries, strict=True):
            keys = MappedIndex(summary.path).problems if summary.problems and len(left_out.listed) < LISTED else {}
            for reason, (count, first) in summary.problems.items():
                what = "damaged shard" if reason.startswith(OF_SHARD) else reason
                for key in keys.get(reason, [first] * count):
                    left_out.add(f"{url} sample {key}" if key else url, what)
        return left_out

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a sample's shard, and its own in that."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _sample(self, index: int, wanted: Sequence[str]) -> tuple[str, str, dict[str, bytes]]:
        """A sample's key, how the user knows it, and those of its files that are wanted and there."""
        number, row = self._place(index)
        shard = self._shards[number]
        key, spans = shard.index.sample(row)
        where = f"{self.urls[number]} sample {key}"
        return f"{self._names[number]}/{key}", where, _contents(shard, self._of_caption(spans, wanted), where)

    def _of_caption(self, spans: dict[str, tuple[int, int]], wanted: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Of ``captions``, ``text`` and ``json`` only the one that the caption is taken from, and what is wanted."""
        fields = set(wanted)
        if self.caption_column is None:
            fields.add(next(name for name in ("captions", "text", "json") if name in spans))
        if self.caption_column is not None or self.group_column is not None:
            fields.add("json")
        return {name: span for name, span in spans.items() if name in fields}

    def read(self, index: int) -> EncodedPair:
        key, where, contents = self._sample(index, ["image"])
        group = _fields(contents, where).get(self.group_column) if self.group_column else None
        name = "" if group is None else str(group).strip()
        return EncodedPair(contents["image"], self._captions(contents, where), key, name, where)

    def load(self, index: int, rng: random.Random | None) -> Pair:
        stored = self.read(index)
        several = rng is not None and len(stored.captions) > 1
        caption = rng.choice(stored.captions) if rng is not None and several else stored.captions[0]
        return Pair(open_image(io.BytesIO(stored.image), stored.where), caption, stored.key, stored.group)

    def captions(self, index: int) -> list[str]:
        _, where, contents = self._sample(index, [])
        return self._captions(contents, where)

    def _captions(self, contents: dict[str, bytes], where: str) -> list[str]:
        found: Any
        if self.caption_column is not None:
            found = _fields(contents, where).get(self.caption_column)
        elif "captions" in contents:
            found = _json(contents["captions"], where, list)
        elif "text" in contents:
            found = _text(contents["text"], where)
        else:
            found = _fields(contents, where).get("caption")
        every = [caption for caption in found if _says(caption)] if isinstance(found, list) else [found]
        return [check_caption(caption, where) for caption in every or [None]]


def _says(caption: object) -> bool:
    """Whether one of several captions is one; the others do without it."""
    return isinstance(caption, str) and caption.strip().lower() not in BLANK


def _contents(shard: OpenShard, spans: dict[str, tuple[int, int]], where: str) -> dict[str, bytes]:
    """Files of a sample by field, in one reading where they lie together."""
    if not spans:
        return {}
    first = min(offset for offset, _ in spans.values()) - BLOCK
    last = max(offset + size for offset, size in spans.values())
    together = last - first <= sum(size + BLOCK for _, size in spans.values()) + GAP
    data = shard.read(first, last - first) if together else b""
    contents = {}
    for name, (offset, size) in spans.items():
        start = offset - BLOCK
        part = data[start - first : start - first + BLOCK + size] if together else shard.read(start, BLOCK + size)
        if not _fits(part, size):
            changed = "the shard has changed since the run began; start the run again"
            raise BadSample(where, "shard has changed", changed)
        contents[name] = part[BLOCK:]
    return contents


def _fits(part: bytes, size: int) -> bool:
    """Whether bytes are a header of a file of that size, and the file."""
    try:
        header = tarfile.TarInfo.frombuf(part[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return header.size == size and len(part) == BLOCK + size


def _json(content: bytes, where: str, kind: type[T]) -> T:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample(where, "json cannot be read", f"its .json is not JSON ({error})") from error
    if not isinstance(found, kind):
        raise BadSample(where, "json cannot be read", f"its .json holds no {kind.__name__}")
    return found


def _fields(contents: dict[str, bytes], where: str) -> dict[str, Any]:
    return _json(contents["json"], where, dict) if "json" in contents else {}


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        detail = f"its caption is not UTF-8 text ({error.reason} at byte {error.start}); fix or remove it"
        raise BadSample(where, "caption is no text", detail) from error


def _listed(extensions: dict[str, int]) -> str:
    """The ends of names that files have, the most frequent first."""
    names = sorted(extensions, key=lambda name: (-extensions[name], name))
    return "files called " + ", ".join(f"*.{name}" for name in names[:8]) if names else "no file of a sample"
