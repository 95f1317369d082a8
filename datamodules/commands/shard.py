"""``lit-clip shard``: any source of pairs as tar shards in img2dataset's layout, with their indexes."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import Dataset

from datamodules.loading.bad_samples import BadSample, OnError
from datamodules.loading.images import decoding_at_least, open_image
from datamodules.pairs.source import Encoded, PairSource, open_source
from datamodules.shards.files import stamp_of
from datamodules.shards.index import INDEX_SUFFIX, read_summary, scan_shard, write_index
from lit_clip.cli.subcommands import progress, stderr
from lit_clip.embedding.image_files import loader
from lit_clip.errors import InputError, require

PLAN = "shards.json"
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with more pictures behind it, as some cameras write
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "PPM": "ppm",
}


def shard(
    data: str,
    output: str,
    *,
    shard_size: int = 10_000,
    workers: int = 8,
    root: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
    split: str | None = None,
    on_error: OnError = "error",
) -> None:
    """Write pairs as tar shards, as img2dataset does, with an index of each.

    Pictures are copied byte for byte, after they have been decoded once to see that they can be. A shard gets its name
    when it is whole; the same command given again keeps those and writes the others.

    Args:
        data: a table, a folder of pictures with captions beside them, or whatever else training takes.
        output: a folder, for nothing else.
        shard_size: pairs of a shard.
        workers: processes.
        root: where relative image paths start.
        image_column: of a table; found out if not given.
        caption_column: likewise.
        group_column: of a table; kept in the shards' .json as group.
        split: of data that come in splits.
        on_error: what a pair that cannot be read does; skip lists it beside its shard, in a .skipped.jsonl.
    """
    from filelock import FileLock, Timeout

    require(shard_size >= 1, f"--shard_size {shard_size} must be at least 1")
    options = {
        "root": root,
        "image_column": image_column,
        "caption_column": caption_column,
        "group_column": group_column,
        "split": split,
    }
    folder = Path(output)
    require(not folder.exists() or folder.is_dir(), f"{folder}: there is a file of that name; give a folder")
    source = open_source(data, **options, typed="--", on_error=on_error)
    source.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _keep_plan(folder / PLAN, _plan(data, source, shard_size, options))
            counts = _write_all(Plan(source, folder, shard_size, on_error), workers)
    except Timeout as error:
        raise InputError(f"{folder}: another lit-clip shard is writing there") from error
    _report(source, folder, counts)


def _plan(data: str, source: PairSource, shard_size: int, options: dict[str, str | None]) -> dict[str, Any]:
    """What decides which pair goes into which shard; of the captions a hundred stand for all."""
    digest = hashlib.sha256()
    for index in range(0, len(source), -(-len(source) // 100)):
        try:
            captions = source.captions(index)
        except BadSample as error:
            captions = [str(error)]
        digest.update(json.dumps(captions).encode())
    given = {name: value for name, value in options.items() if value is not None}
    place = data if "://" in data else os.path.abspath(data)
    return {"data": place, **given, "pairs": len(source), "shard_size": shard_size, "captions": digest.hexdigest()}


def _keep_plan(path: Path, plan: dict[str, Any]) -> None:
    """A folder that other shards were begun in would end up with some of each.

    Raises:
        InputError: this is such a folder.
    """
    if not path.exists():
        found = sorted(entry.name for entry in path.parent.glob("*.tar"))
        require(not found, f"{path.parent}: {found[0] if found else ''} is not of lit-clip shard; give an empty folder")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(plan, indent=1), encoding="utf-8")
        os.replace(part, path)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in {**before, **plan} if before.get(name) != plan.get(name)]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not what lit-clip shard wrote; give an empty folder") from error
    if other:
        what = ", ".join(f"{name} {before.get(name)} then and {plan.get(name)} now" for name in other)
        raise InputError(f"{path.parent}: begun with other data ({what}); give an empty folder")


@dataclass
class Plan(Dataset[tuple[int, int]]):
    """A shard is written by asking for it: the answer is how many pairs it has, and how many were skipped."""

    source: PairSource
    folder: Path
    shard_size: int
    on_error: OnError

    def __len__(self) -> int:
        return -(-len(self.source) // self.shard_size)

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{number:05d}.tar"

    def __getitem__(self, number: int) -> tuple[int, int]:
        path = self.path(number)
        bad = path.with_suffix(".skipped.jsonl")
        if not path.exists():
            skipped = _write_shard(path, self._members(number), self.on_error)
            lines = "".join(json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in skipped)
            bad.write_text(lines, encoding="utf-8") if lines else bad.unlink(missing_ok=True)
            os.replace(_part(path), path)
        stamp, index = stamp_of(str(path)), Path(f"{path}{INDEX_SUFFIX}")
        summary = read_summary(index)
        if summary is None or summary.stamp != stamp:
            with path.open("rb") as file:
                write_index(scan_shard(file, stamp.size), stamp, index)
            summary = read_summary(index)
        assert summary is not None
        return summary.samples, len(bad.read_text(encoding="utf-8").splitlines()) if bad.exists() else 0

    def _members(self, number: int) -> Iterator[tuple[str, "Encoded | BadSample"]]:
        """Key and pair, or what is wrong with it."""
        digits = max(4, len(str(self.shard_size - 1)))
        first = number * self.shard_size
        for index in range(first, min(first + self.shard_size, len(self.source))):
            try:
                yield f"{number:05d}{index - first:0{digits}d}", self.source.read(index)
            except BadSample as error:
                yield "", error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _write_shard(
    path: Path, pairs: Iterator[tuple[str, "Encoded | BadSample"]], on_error: OnError
) -> list[tuple[str, str]]:
    """Write a shard beside its name, safe on the disk.

    Returns:
        Where and why of what was skipped.
    """
    skipped = []
    with _part(path).open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, pair in pairs:
                try:
                    if isinstance(pair, BadSample):
                        raise pair
                    for name, content in _files(key, pair):
                        member = tarfile.TarInfo(name)  # owner and time are nobody's: the same pairs give the same tar
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                except BadSample as error:
                    if on_error == "error":
                        raise
                    skipped.append((error.where, error.reason))
        _to_disk(file)
    return skipped


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _files(key: str, pair: Encoded) -> list[tuple[str, bytes]]:
    """Names and contents of a sample's files.

    Raises:
        BadSample: the picture cannot be decoded, or is of a format that shards do not have.
    """
    with decoding_at_least(lambda width, height: (1, 1)):
        image = open_image(io.BytesIO(pair.image), pair.where)
    if image.format not in EXTENSIONS:
        detail = f"pictures in shards are {', '.join(sorted(EXTENSIONS))}, this is {image.format}; convert it"
        raise BadSample(pair.where, "format is not for shards", detail)
    about = {"key": key, "caption": pair.captions[0], "source": pair.key}
    if pair.group:
        about["group"] = pair.group
    files = [
        (f"{key}.{EXTENSIONS[image.format]}", pair.image),
        (f"{key}.txt", pair.captions[0].encode()),
        (f"{key}.json", json.dumps(about, ensure_ascii=False).encode()),
    ]
    if len(pair.captions) > 1:
        files.append((f"{key}.captions.json", json.dumps(pair.captions, ensure_ascii=False).encode()))
    return files


def _write_all(plan: Plan, workers: int) -> list[tuple[int, int]]:
    for path in plan.folder.glob(".*.tar.part"):  # of a run that was stopped
        path.unlink()
    counts = []
    with progress("writing shards", len(plan)) as advance:
        for count in loader(plan, workers):  # pyright: ignore[reportArgumentType]  # counts are its batches
            counts.append(count)
            advance(1)
    return counts


def _report(source: PairSource, folder: Path, counts: list[tuple[int, int]]) -> None:
    pairs, skipped = (sum(column) for column in zip(*counts, strict=True))
    if not pairs:
        raise InputError(f"{folder}: none of {skipped} pairs could be read; {folder}/*.skipped.jsonl say why")
    note = f", {skipped} skipped ({folder}/*.skipped.jsonl)" if skipped else ""
    left_out = f", left out: {source.left_out}" if str(source.left_out) else ""
    stderr().print(f"{folder}: {pairs} pairs in {len(counts)} shards{note}{left_out}", markup=False)
