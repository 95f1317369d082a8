"""Write pairs into tar shards."""

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

from datamodules.loading.bad_samples import OnError
from datamodules.pairs.source import EncodedPair, PairSource
from datamodules.shards.files import stamp_of
from datamodules.shards.index import INDEX_SUFFIX, read_summary, scan_shard, write_index
from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.console import progress
from lit_clip.tools.images import decoding_at_least, open_image
from lit_clip.tools.workers import loader

PLAN = "shards.json"


EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with more images behind it, as some cameras write
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "PPM": "ppm",
}


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
class ShardPlan(Dataset[tuple[int, int]]):
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

    def _members(self, number: int) -> Iterator[tuple[str, "EncodedPair | BadSample"]]:
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
    path: Path, pairs: Iterator[tuple[str, "EncodedPair | BadSample"]], on_error: OnError
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


def _files(key: str, pair: EncodedPair) -> list[tuple[str, bytes]]:
    """Names and contents of a sample's files.

    Raises:
        BadSample: the image cannot be decoded, or is of a format that shards do not have.
    """
    with decoding_at_least(lambda width, height: (1, 1)):
        image = open_image(io.BytesIO(pair.image), pair.where)
    if image.format not in EXTENSIONS:
        detail = f"images in shards are {', '.join(sorted(EXTENSIONS))}, this is {image.format}; convert it"
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


def _write_all(plan: ShardPlan, workers: int) -> list[tuple[int, int]]:
    for path in plan.folder.glob(".*.tar.part"):  # of a run that was stopped
        path.unlink()
    counts = []
    with progress("writing shards", len(plan)) as advance:
        for count in loader(plan, workers):  # pyright: ignore[reportArgumentType]  # counts are its batches
            counts.append(count)
            advance(1)
    return counts
