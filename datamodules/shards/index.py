"""The index of a tar shard: the position of each sample's files, read once from the headers and stored in a file."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from lit_clip.errors import InputError
from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.images import IN_TARS
from lit_clip.tools.reading import reading
from ..loading.bad_samples import LONGEST_BLANK, as_unicode, is_blank
from ..loading.store import Stamp
from ..pairs.source import NO_CAPTION

INDEX_SUFFIX = ".index.arrow"
FORMAT = "3"  # of the index; one of another format is written again
BLOCK = tarfile.BLOCKSIZE  # size of a header; files start at multiples of it

FIELDS = ("image", "text", "captions", "json")
SPANS = [f"{name}_{part}" for name in FIELDS for part in ("offset", "size")]  # names of columns
COLUMNS = pa.schema({"key": pa.large_string(), **dict.fromkeys(SPANS, pa.int64())})
SCANNED = (*FIELDS, "array")  # an array is the image of a sample without another, beside which it is mostly features
_FIELD_OF = {suffix[1:]: "image" for suffix in IN_TARS} | {"npy": "array"}
_FIELD_OF |= {"txt": "text", "captions.json": "captions", "json": "json"}
WANTED = "an image (.jpg, .png, .webp, ...) and a caption (.txt, or .json with a caption in it) with the same name"
OF_SHARD = "in a shard that "  # starts the reasons that concern the rest of a shard


@dataclass(frozen=True)
class Summary:
    """The head of an index: everything needed to open a set of shards.

    ``path`` belongs to the index, ``stamp`` to the shard.
    """

    path: str
    stamp: Stamp
    samples: int
    problems: dict[str, tuple[int, str]]  # reason -> number of samples left out for it, and the first one's key
    extensions: dict[str, int]  # extension -> number of files


class DamagedError(Exception):
    """The rest of a tar cannot be read; the message follows the tar's name."""


def split_name(name: str) -> tuple[str, str]:
    """Split a name into key and extension as webdataset does: at the first dot of the last part of the path.

    Hidden files and files without extension belong to no sample: their key is empty.
    """
    match = re.fullmatch(r"(?:\./)*((?:.*/)?[^./][^./]*)\.([^/]*)", name)
    return (match[1], match[2].lower()) if match else ("", "")


def tar_members(file: BinaryIO, size: int) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the complete regular files of a tar; then raise :class:`DamagedError` if it is truncated or damaged.

    tarfile itself stops silently at a truncated or broken header.
    """
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs; else it keeps every member
            if member.offset < end or member.size < 0:  # would loop for ever
                raise DamagedError(f"is damaged at byte {end}")
            end = member.offset_data
            if not member.isreg() or member.issparse():
                continue
            end += member.size
            if end > size:
                raise DamagedError(f"is truncated in the middle of {member.name}")
            yield member, tar
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise DamagedError(f"is truncated or damaged at byte {tar.offset}: no end mark")


class ShardScan:
    """Contents of a shard, from its headers; the files of a sample may come in any order."""

    def __init__(self) -> None:
        self.spans: dict[str, list[int]] = {}  # offset and size of each of SCANNED; an absent field has offset -1
        self.extensions: Counter[str] = Counter()  # extension -> number of files
        self.damage = ""  # why the rest of the shard is lost
        self.blank: set[str] = set()
        self.duplicates: dict[str, None] = {}  # a set that keeps its order
        self.double_arrays: dict[str, None] = {}

    def add(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        key, extension = split_name(member.name)
        if not key:
            return
        self.extensions[extension] += 1
        spans = self.spans.setdefault(key, [-1, 0] * len(SCANNED))
        if extension not in _FIELD_OF:
            return
        start = 2 * SCANNED.index(_FIELD_OF[extension])
        if spans[start] >= 0:
            (self.double_arrays if extension == "npy" else self.duplicates)[key] = None
            return
        spans[start : start + 2] = member.offset_data, member.size
        if extension == "txt" and member.size <= LONGEST_BLANK:  # longer texts are not read for the index
            text = tar.extractfile(member)
            if text is not None and is_blank(text.read().decode("utf-8-sig", "replace")):
                self.blank.add(key)

    def samples(self) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
        """Return the spans of FIELDS of each usable sample, and the keys of the others by reason."""
        usable, problems = {}, {self.damage: [""]} if self.damage else {}

        def problem(reason: str, key: str) -> None:
            problems.setdefault(reason, []).append(as_unicode(key))

        doubled = {key: None for key in self.double_arrays if self.spans[key][0] < 0}
        for key in self.duplicates | doubled:
            problem("duplicate key", key)
        for key, (*spans, array_offset, array_size) in self.spans.items():
            if spans[0] < 0:
                spans[:2] = array_offset, array_size
            if spans[0] < 0:
                problem("missing image", key)
            elif max(spans[2::2]) < 0:
                problem("missing caption", key)
            elif key in self.blank and spans[2 * FIELDS.index("captions")] < 0:
                problem(NO_CAPTION, key)
            else:
                usable[key] = spans
        return usable, problems


def scan_shard(file: BinaryIO, size: int) -> ShardScan:
    """Read the headers of a seekable tar of ``size`` bytes, and the texts short enough to be blank captions."""
    scan = ShardScan()
    try:
        for member, tar in tar_members(file, size):
            scan.add(member, tar)
    except DamagedError as error:
        scan.damage = f"{OF_SHARD}{error}"
    except InputError:  # its store does not answer
        raise
    except Exception as error:  # tarfile raises anything for bytes that are not a tar
        file.seek(0)
        packed = file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
        kind = "compressed; unpack it to .tar" if packed else f"not a tar ({str(error) or type(error).__name__})"
        scan.damage = f"{OF_SHARD}is {' '.join(kind.split())}"
    return scan


def write_index(scan: ShardScan, stamp: Stamp, path: Path) -> Summary:
    """Write the index file of a shard and return its head."""
    samples, problems = scan.samples()
    spans = np.array(list(samples.values()), np.int64).reshape(-1, len(SPANS))
    columns = {"key": pa.array(map(as_unicode, samples), pa.large_string())}
    columns |= {name: pa.array(np.ascontiguousarray(spans[:, i])) for i, name in enumerate(SPANS)}
    table = pa.table(columns).combine_chunks()
    metadata = {
        "format": FORMAT,
        "size": str(stamp.size),
        "version": stamp.version,
        "samples": str(len(samples)),
        "problems": json.dumps(problems),
        "extensions": json.dumps(scan.extensions),
        "content": _digest(table),
    }
    metadata["head"] = hex_digest(sorted(metadata.items()))
    table = table.replace_schema_metadata(metadata)
    with replacing(path) as draft, pa.OSFile(str(draft), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    summary = read_summary(path)
    assert summary is not None, f"{path}: written and not readable"
    return summary


def _digest(table: pa.Table) -> str:
    keys = [chunk.buffers() for chunk in table["key"].chunks if len(chunk)]
    offsets = [np.frombuffer(buffers[1], np.int64)[: len(table) + 1] for buffers in keys]
    texts = [memoryview(buffers[2])[: stops[-1]].tobytes() for buffers, stops in zip(keys, offsets, strict=True)]
    columns = [table[name].to_numpy() for name in SPANS]
    return hex_digest([*texts, *map(np.ndarray.tobytes, [*offsets, *columns])])


def read_summary(path: Path) -> Summary | None:
    """Return the head of an index file; None if it must be made: missing, damaged or of another format."""
    try:
        with reading(path, "index"), pa.memory_map(str(path)) as file:
            metadata = {key.decode(): value.decode() for key, value in pa.ipc.open_file(file).schema.metadata.items()}
            if metadata["format"] != FORMAT or metadata.pop("head") != hex_digest(sorted(metadata.items())):
                return None
            problems = {reason: (len(keys), keys[0]) for reason, keys in json.loads(metadata["problems"]).items()}
            stamp = Stamp(int(metadata["size"]), metadata["version"])
            return Summary(str(path), stamp, int(metadata["samples"]), problems, json.loads(metadata["extensions"]))
    except InputError:
        return None


class MappedIndex:
    """An index file mapped into memory.

    Its content is checked against its hash, and its structure as well: an index may come with the shard from elsewhere.
    Both take milliseconds for a shard of usual size.
    """

    def __init__(self, summary: Summary) -> None:
        path = summary.path
        with reading(path, "index", hint="delete it, and it is written again"):
            table = pa.ipc.open_file(pa.memory_map(path)).read_all()
            self._check(table, summary)
            self.keys = table["key"]
            self.columns = [table[name].to_numpy() for name in SPANS]
            self._check_spans(summary.stamp.size)
            self.problems: dict[str, list[str]] = json.loads(table.schema.metadata[b"problems"])

    @staticmethod
    def _check(table: pa.Table, summary: Summary) -> None:
        if not table.schema.equals(COLUMNS) or len(table) != summary.samples:
            raise ValueError(f"{len(table)} rows of other columns")
        if any(column.num_chunks > 1 or column.null_count for column in table.columns):
            raise ValueError("in parts, or with gaps")
        table.validate(full=True)
        if _digest(table) != table.schema.metadata[b"content"].decode():
            raise ValueError("content does not fit its hash")

    def _check_spans(self, size: int) -> None:
        for offsets, sizes in zip(self.columns[::2], self.columns[1::2], strict=True):
            inside = (offsets >= BLOCK) & (sizes >= 0) & (sizes <= size) & (offsets <= size - sizes)
            if not np.all(inside | (offsets == -1)):
                raise ValueError("points outside the shard")

    def sample(self, row: int) -> tuple[str, dict[str, tuple[int, int]]]:
        """Return a sample's key, and the offset and size of each of its files by field."""
        spans = [(int(self.columns[2 * i][row]), int(self.columns[2 * i + 1][row])) for i in range(len(FIELDS))]
        found = {name: span for name, span in zip(FIELDS, spans, strict=True) if span[0] >= 0}
        return self.keys[row].as_py(), found
