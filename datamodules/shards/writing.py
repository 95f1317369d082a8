"""Write pairs into tar shards."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.loading.store import stamp_of
from datamodules.pairs.source import EncodedPair, PairSource
from datamodules.shards.index import INDEX_SUFFIX, read_summary, scan_shard, write_index
from lit_clip.errors import BadSample, InputError
from lit_clip.tools.atomic import not_written, replacing
from lit_clip.tools.console import progress
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.images import OnError, decoding_at_least, open_image
from lit_clip.tools.reading import reading
from lit_clip.tools.workers import loader

MANIFEST = "shards.json"
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG followed by further images, as some cameras write
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "PPM": "ppm",
}


def manifest_of(data: str, source: PairSource, shard_size: int, options: dict[str, str | None]) -> dict[str, Any]:
    """Return all that decides which pair goes into which shard, with a hash of about a hundred captions."""
    sample: list[list[str]] = []
    for index in range(0, len(source), -(-len(source) // 100)):
        try:
            sample.append(source.captions(index))
        except BadSample as error:
            sample.append([str(error)])
    named = {name: value for name, value in options.items() if value is not None}
    place = data if "://" in data else os.path.abspath(data)
    return {"data": place, **named, "pairs": len(source), "shard_size": shard_size, "captions": hex_digest(sample)}


def keep_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into a new folder; in an old one compare it, so that no folder mixes two sets of shards.

    Raises:
        InputError: the folder holds other shards.
    """
    if not path.exists():
        if tars := sorted(path.parent.glob("*.tar")):
            raise InputError(f"{path.parent}: {tars[0].name} was not written by lit-clip shard; give an empty folder")
        with replacing(path) as draft:
            draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        return
    with reading(path, "file of lit-clip shard", hint="give an empty folder"):
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **manifest} if before.get(name) != manifest.get(name)]
    if changed:
        changes = ", ".join(f"{name} {before.get(name)} then and {manifest.get(name)} now" for name in changed)
        raise InputError(f"{path.parent}: begun with other data ({changes}); give an empty folder")


@dataclass
class ShardWriter(Dataset[tuple[int, int]]):
    """Dataset whose items write a shard each and return how many pairs it has and how many were skipped."""

    source: PairSource
    folder: Path
    shard_size: int
    on_error: OnError

    def __len__(self) -> int:
        return -(-len(self.source) // self.shard_size)

    def __getitem__(self, number: int) -> tuple[int, int]:
        path = self.folder / f"{number:05d}.tar"
        list_of_skipped = path.with_suffix(".skipped.jsonl")
        if not path.exists():
            part = path.with_name(f".{path.name}.part")
            try:
                skipped = _write_shard(part, self._samples(number), self.on_error)
                lines = "".join(json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in skipped)
                list_of_skipped.write_text(lines, encoding="utf-8") if lines else list_of_skipped.unlink(
                    missing_ok=True
                )
                os.replace(part, path)  # last: a shard that has its name is complete
            except OSError as error:  # of writing: what cannot be read is a BadSample
                part.unlink(missing_ok=True)
                raise not_written(path, error, "; make room and run the same command again") from error
        stamp, index = stamp_of(str(path)), Path(f"{path}{INDEX_SUFFIX}")
        summary = read_summary(index)
        if summary is None or summary.stamp != stamp:
            with path.open("rb") as file:
                write_index(scan_shard(file, stamp.size), stamp, index)
            summary = read_summary(index)
        assert summary is not None
        skipped_lines = list_of_skipped.read_text(encoding="utf-8").splitlines() if list_of_skipped.exists() else []
        return summary.samples, len(skipped_lines)

    def _samples(self, number: int) -> Iterator[tuple[str, EncodedPair | BadSample]]:
        """Yield the key and the pair of each sample of a shard, or the error of a bad one."""
        digits = max(4, len(str(self.shard_size - 1)))
        first = number * self.shard_size
        for index in range(first, min(first + self.shard_size, len(self.source))):
            try:
                yield f"{number:05d}{index - first:0{digits}d}", self.source.read(index)
            except BadSample as error:
                yield "", error


def _write_shard(
    path: Path, samples: Iterator[tuple[str, EncodedPair | BadSample]], on_error: OnError
) -> list[tuple[str, str]]:
    """Write a tar and force it to disk; return (where, reason) of each skipped sample."""
    skipped = []
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, pair in samples:
                try:
                    if isinstance(pair, BadSample):
                        raise pair
                    for name, content in _files(key, pair):
                        member = tarfile.TarInfo(name)  # no owner or time: the same pairs give the same tar
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                except BadSample as error:
                    if on_error == "error":
                        raise
                    skipped.append((error.where, error.reason))
        file.flush()
        os.fsync(file.fileno())
    return skipped


def _files(key: str, pair: EncodedPair) -> list[tuple[str, bytes]]:
    """Return the names and contents of a sample's files.

    Raises:
        BadSample: the image cannot be decoded, or its format is not one for shards.
    """
    with decoding_at_least(lambda width, height: (1, 1)):
        image = open_image(io.BytesIO(pair.image), pair.where)
    if image.format not in EXTENSIONS:
        detail = f"images in shards must be {', '.join(sorted(EXTENSIONS))}, this is {image.format}; convert it"
        raise BadSample(pair.where, "format not supported in shards", detail)
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


def write_shards(writer: ShardWriter, workers: int) -> list[tuple[int, int]]:
    """Write every missing shard; return how many pairs each has and how many were skipped."""
    for path in writer.folder.glob(".*.tar.part"):  # left by a killed run
        path.unlink()
    counts = []
    with progress("writing shards", len(writer)) as advance:
        for count in loader(writer, workers):  # pyright: ignore[reportArgumentType]  # counts are its batches
            counts.append(count)
            advance(1)
    return counts
