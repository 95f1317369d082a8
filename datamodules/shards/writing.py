"""Write pairs into tar shards."""

import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lit_clip.errors import BadSample, InputError
from lit_clip.models.preprocess import to_rgb
from lit_clip.tools.atomic import Share, not_written, replacing
from lit_clip.tools.console import progress
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.images import OnError, decoding_at_least, full_size, image_for_model
from lit_clip.tools.levels import levels_of
from lit_clip.tools.reading import reading
from lit_clip.tools.workers import Mapped, loader
from ..loading.store import stamp_of
from ..pairs.source import PairSource, Row
from .index import INDEX_SUFFIX, read_summary, scan_shard, write_index

MANIFEST = "shards.json"
OURS = re.compile(rf"{re.escape(MANIFEST)}|\d{{5,}}\.(tar({re.escape(INDEX_SUFFIX)})?|skipped\.jsonl)")
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG followed by further images, as some cameras write
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "PPM": "ppm",
    "NPY": "npy",
}
QUALITY = 95  # of resized images, as img2dataset's
LONGEST_JPEG = 65_500  # pixels of a side that libjpeg writes


class Written(NamedTuple):
    """Counts of one or more shards."""

    pairs: int
    skipped: int
    resized: int = 0  # images; none of a shard that was complete before
    bytes_before: int = 0  # of those images
    bytes_after: int = 0


def manifest_of(
    data: str, source: PairSource, shard_size: int, resize: int | None, options: dict[str, str | None]
) -> dict[str, Any]:
    """Return everything that decides the content of each shard, with a hash of about a hundred captions."""
    sample: list[list[str]] = []
    for index in range(0, len(source), -(-len(source) // 100)):
        try:
            sample.append(source.captions(index))
        except BadSample as error:
            sample.append([str(error)])
    named = {name: value for name, value in {**options, "resize": resize}.items() if value is not None}
    place = data if "://" in data else os.path.abspath(data)
    return {"data": place, **named, "pairs": len(source), "shard_size": shard_size, "captions": hex_digest(sample)}


def keep_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into a new folder, or compare it in an old one: a folder must not mix two sets of shards."""
    visible = sorted(each.name for each in path.parent.iterdir() if not each.name.startswith("."))
    if others := [name for name in visible if not (path.exists() and OURS.fullmatch(name))]:
        raise InputError(f"{path.parent}: {others[0]} was not written by lit-clip shard; give an empty folder")
    if not path.exists():
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
class ShardWriter:
    """Write one shard at a time."""

    source: PairSource
    folder: Path
    shard_size: int
    on_error: OnError
    resize: int | None
    share: Share = Share()

    @property
    def numbers(self) -> range:
        return range(self.share.number, -(-len(self.source) // self.shard_size), self.share.of)

    def write(self, number: int) -> Written:
        """Write a shard unless it is complete, and return its counts."""
        path = self.folder / f"{number:05d}.tar"
        list_of_skipped = path.with_suffix(".skipped.jsonl")
        sizes: list[tuple[int, int]] = []
        if not path.exists():
            part = path.with_name(f".{path.name}{self.share.suffix}.part")
            try:
                skipped = self._write(part, number, sizes)
                lines = "".join(json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in skipped)
                list_of_skipped.unlink(missing_ok=True)
                if lines:
                    list_of_skipped.write_text(lines, encoding="utf-8")
                os.replace(part, path)  # last: a shard that has its name is complete
            except OSError as error:  # of writing: what cannot be read is a BadSample
                part.unlink(missing_ok=True)
                raise not_written(path, error, "; make room and run the same command again") from error
        stamp, index = stamp_of(str(path)), Path(f"{path}{INDEX_SUFFIX}")
        summary = read_summary(index)
        if summary is None or summary.stamp != stamp:
            with path.open("rb") as file:
                summary = write_index(scan_shard(file, stamp.size), stamp, index)
        skipped_lines = list_of_skipped.read_text(encoding="utf-8").splitlines() if list_of_skipped.exists() else []
        before, after = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        return Written(summary.samples, len(skipped_lines), len(sizes), before, after)

    def _write(self, path: Path, number: int, sizes: list[tuple[int, int]]) -> list[tuple[str, str]]:
        """Write a tar and force it to disk; return (where, reason) of each skipped sample.

        ``sizes`` is given the bytes of each resized image, before and after.
        """
        skipped = []
        digits, first = max(4, len(str(self.shard_size - 1))), number * self.shard_size
        with path.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(first, min(first + self.shard_size, len(self.source))):
                    try:
                        pair = self.source.read(index)
                        extension, content, about = _image_file(pair, self.resize)
                    except BadSample as error:
                        if self.on_error == "error":
                            raise
                        skipped.append((error.where, error.reason))
                        continue
                    key = f"{number:05d}{index - first:0{digits}d}"
                    if content is not pair.image:
                        sizes.append((len(pair.image), len(content)))
                    for name, data in ((f"{key}.{extension}", content), *_texts(key, pair, about)):
                        member = tarfile.TarInfo(name)  # no owner or time: the same pairs give the same tar
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            file.flush()
            os.fsync(file.fileno())
        return skipped


def _image_file(pair: Row, resize: int | None) -> tuple[str, bytes, dict[str, int]]:
    """Return the extension and content of a pair's image, and img2dataset's size fields if it was resized."""
    with decoding_at_least(lambda width, height: (width, height) if reduced(width, height, resize) else (1, 1)):
        image = image_for_model(io.BytesIO(pair.image), pair.where)
    if image.format not in EXTENSIONS:
        detail = f"images in shards must be {', '.join(sorted(EXTENSIONS))}, this is {image.format}; convert it"
        raise BadSample(pair.where, "format not supported in shards", detail)
    original = full_size(image)[:2]
    size = None if levels_of(image) else reduced(*original, resize)  # a JPEG has no deep levels
    if size is None:
        return EXTENSIONS[image.format], pair.image, {}
    if image.mode in ("1", "P"):
        image = to_rgb(image)  # Pillow would pick colours of the palette and mix none
    small, file = image.resize(size, Image.Resampling.BICUBIC), io.BytesIO()
    # RGB conversion comes after resizing, as in training. JPEG stores grey levels as they are.
    (small if small.mode == "L" else to_rgb(small)).save(file, "JPEG", quality=QUALITY)
    about = {"width": size[0], "height": size[1], "original_width": original[0], "original_height": original[1]}
    return "jpg", file.getvalue(), about


def reduced(width: int, height: int, short: int | None) -> tuple[int, int] | None:
    """Return the size of an image with a short side of ``short`` pixels; None if the image keeps its size.

    An image that is not larger stays, and one that would be too long for a JPEG.
    """
    if short is None or min(width, height) <= short:
        return None
    long = short * max(width, height) // min(width, height)  # as torchvision's Resize
    return None if long > LONGEST_JPEG else (short, long) if width <= height else (long, short)


def _texts(key: str, pair: Row, about_image: dict[str, int]) -> list[tuple[str, bytes]]:
    about: dict[str, str | int] = {"key": key, "caption": pair.captions[0], "source": pair.key, **about_image}
    if pair.group:
        about["group"] = pair.group
    files = [(f"{key}.txt", pair.captions[0].encode()), (f"{key}.json", json.dumps(about, ensure_ascii=False).encode())]
    if len(pair.captions) > 1:
        files.append((f"{key}.captions.json", json.dumps(pair.captions, ensure_ascii=False).encode()))
    return files


def write_shards(writer: ShardWriter, workers: int) -> Written:
    """Write every missing shard, and return the counts of all."""
    for path in writer.folder.glob(f".*.tar{writer.share.suffix or '*'}.part"):  # left by a killed run
        path.unlink()
    counts = []
    with progress("writing shards", len(writer.numbers)) as advance:
        for count in loader(Mapped(writer.write, writer.numbers), workers):
            counts.append(count)
            advance(1)
    return Written(*map(sum, zip(*counts, strict=True))) if counts else Written(0, 0)
