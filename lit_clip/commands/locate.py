"""``lit-clip locate``: find where images show texts."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.table import Column, Table

from lit_clip import load_model
from lit_clip.commands.class_output import json_text
from lit_clip.embedding.encode import check_complete, report_skipped
from lit_clip.embedding.image_files import ImageFile, find_images
from lit_clip.embedding.reading import UnreadableRow
from lit_clip.errors import BadSample, require
from lit_clip.locating.locator import FALSE_ALARMS, Locator
from lit_clip.locating.overlay import overlays
from lit_clip.locating.regions import resized_mask
from lit_clip.tools.atomic import claimed, make_folder, remove, replacing
from lit_clip.tools.console import Console, Text, progress, stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.html import thumbnail, write_page
from lit_clip.tools.images import OnError, image_for_model, or_skip, png_program
from lit_clip.tools.reading import read_text

TEMPLATE = Path(__file__).parent / "templates" / "locate.html"
JSON, PAGE, SKIPPED = "locations.json", "locate.html", "skipped.txt"
KINDS = ("overlay", "mask")  # of the files for an image and a text
NAME = re.compile(r"[a-z0-9-]*[0-9a-f]{12}(\.mask)?\.png")  # of such a file, see file_stem
PROGRAM = "lit-clip locate"  # in such a file, by which a later run knows it wherever it lies
SHOWN, THUMBNAIL = 100, 320  # images on the page, and pixels of an overlay's longer side there


def locate(
    images: str,
    texts: list[str],
    *,
    model: str,
    output: str = "locations",
    background: str | None = None,
    false_alarms: float = FALSE_ALARMS,
    scale: float = 1,
    on_error: OnError = "error",
) -> None:
    """Show where images show texts, and say which texts they do not show.

    Each place of an image belongs to the text that fits it best, if that fits better than texts of other things do
    anywhere in the image. A text's region has a box and a mask in pixels of the image.

    Args:
        images: a file, or a folder with everything below.
        texts: what to find, each in quotes, after the file or folder; two names of one thing would compete.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        output: a folder for locations.json, for each image and text a heat map over the image and a mask, and
            locate.html, a page of the first 100 images. An earlier run's files are replaced, whatever its texts were;
            images in the folder are not read, nor are heat maps and masks of earlier runs in other folders.
        background: a text file with one text of another thing per line, of the form of yours; by default the names of
            the 100 classes of CIFAR-100.
        false_alarms: share of images in which a text of a thing that is not there may be seen, if the background is of
            its kind.
        scale: of the images; 2 finds smaller things, and takes four times as long.
        on_error: error ends the run at an image that cannot be read; skip lists it in a file.
    """
    _check_texts(texts)
    others = None
    if background:
        lines = read_text(Path(background), "--background").splitlines()
        others = [" ".join(line.split()) for line in lines if line.strip()]
        require(bool(others), f"--background {background}: the file is empty; write one text per line")
    folder = Path(output)
    require(not folder.exists() or folder.is_dir(), f"--output {folder}: is a file; name a folder")
    files = _outside(find_images([images], on_error), images, folder)
    with claimed(folder):
        locator = Locator(load_model(model).to(best_device()), texts, others, false_alarms, scale)
        make_folder(folder, "--output")
        answers = Answers(locator, files, folder, on_error)
        answers.collect()
    Console().print(answers.table())
    stderr().print(f"overlays, masks, {JSON} and {PAGE}: {folder}")


def _check_texts(texts: Sequence[str]) -> None:
    require(bool(texts), "nothing to find; type a text after the file or folder, in quotes")
    for text in texts:
        require(bool(text.strip()), "a text to find is empty; type one after the file or folder, in quotes")
        named = bool(Path(text).suffix) and os.path.isfile(text)
        require(not named, f"{text}: is a file, and would be found as a text; several images go in a folder")
    for text, count in Counter(" ".join(each.casefold().split()) for each in texts).items():
        require(count == 1, f"{text!r}: typed more than once; a place belongs to one text, type each once")


def _outside(files: list[ImageFile], images: str, folder: Path) -> list[ImageFile]:
    """Leave out images in the output folder, and heat maps and masks of earlier runs in any folder."""
    top, output = (os.path.realpath(each) for each in (images, folder))
    if not os.path.isdir(top):
        return files
    wrong = f"--output {folder}: the images are in it, where the next run would read the heat maps; name another folder"
    require(not Path(top).is_relative_to(output), wrong)
    found = [file for file in files if not Path(os.path.realpath(file.path.parent)).is_relative_to(output)]
    found = [file for file in found if png_program(file.path) != PROGRAM]
    require(bool(found), f"{images}: no images outside of --output {folder} but heat maps of earlier runs")
    return found


@dataclass
class Answers:
    """Results for each image, written to disk at once."""

    locator: Locator
    files: Sequence[ImageFile]
    folder: Path
    on_error: OnError
    rows: list[dict[str, Any]] = field(default_factory=list)  # of locations.json
    shown: list[dict[str, Any]] = field(default_factory=list)  # of the page
    unreadable: list[UnreadableRow] = field(default_factory=list)

    def collect(self) -> None:
        """Find the texts in all images; after Ctrl-C, keep the finished results in a partial file."""
        try:
            with progress("images", len(self.files)) as advance:
                for row, file in enumerate(self.files):
                    self._add(row, file)
                    advance(1)
        except KeyboardInterrupt:
            kept = self._write(f"{JSON}.partial")
            raise KeyboardInterrupt(f"what is done is in {kept}") from None
        done = len(self.files) - len(self.unreadable)
        check_complete(done, len(self.files), self.unreadable)
        self._remove_earlier()
        self._write(JSON)
        title = " | ".join(self.locator.texts)
        write_page(self.folder / PAGE, TEMPLATE, title=title, images=self.shown, done=done)
        report_skipped([file.key for file in self.files], self.unreadable, self.folder / SKIPPED)

    def _add(self, row: int, file: ImageFile) -> None:
        try:
            image = image_for_model(file.path)
        except BadSample as error:
            require(self.on_error == "skip", or_skip(str(error), "--on_error skip"))
            self.unreadable.append(UnreadableRow(row, error.reason, str(error)))
            return
        located, found = self.locator(image), list[tuple[dict[str, Any], str]]()
        pictures = overlays(image, located)
        for text, region, picture in zip(self.locator.texts, located.regions, pictures, strict=True):
            stem = file_stem(file.key, text)
            facts: dict[str, Any] = {
                "image": file.key,
                "text": text,
                "seen": region.seen,
                "cosine": round(region.cosine, 6),
                "margin": round(region.margin, 6),
                "peak": region.point(image.size),
                "box": region.box(image.size),
                "size": list(image.size),
                "overlay": f"{stem}.png",
                "mask": f"{stem}.mask.png" if region.seen else None,
            }
            _save(picture, self.folder / facts["overlay"])
            if region.seen:
                _save(Image.fromarray(resized_mask(region.mask, image.size)), self.folder / facts["mask"])
            found.append((facts, thumbnail(picture, THUMBNAIL) if len(self.shown) < SHOWN else ""))
        self.rows += [facts for facts, _ in found]
        if len(self.shown) < SHOWN:
            self.shown.append({"key": file.key, "level": f"{located.level:.3f}", "texts": found})

    def _remove_earlier(self) -> None:
        written = {row[kind] for row in self.rows for kind in KINDS}
        for path in self.folder.glob("*.png"):
            if path.name not in written and NAME.fullmatch(path.name) and png_program(path) == PROGRAM:
                remove(path)
        remove(self.folder / f"{JSON}.partial")

    def _write(self, name: str) -> Path:
        with replacing(self.folder / name) as draft:
            draft.write_text(json_text(self.rows), encoding="utf-8")
        return self.folder / name

    def table(self) -> Table:
        """Return the results as a table for the terminal."""
        table = Table("image", "text", "box", *(Column(name, justify="right") for name in ("cosine", "margin")))
        for row in self.rows:
            box = ", ".join(map(str, row["box"])) if row["seen"] else "not seen"
            numbers = f"{row['cosine']:.3f}", f"{row['margin']:+.3f}"
            table.add_row(Text(row["image"], overflow="fold"), Text(row["text"]), box, *numbers)
        return table


def file_stem(key: str, text: str) -> str:
    """Return a file's name for an image and a text: readable, unique, and of safe characters."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{Path(key).stem} {text}".lower()).strip("-")
    return f"{words[:60].rstrip('-')}-{hex_digest([key, text])[:12]}".lstrip("-")


def _save(image: Image.Image, path: Path) -> None:
    header = PngInfo()
    header.add_text("Software", PROGRAM)
    with replacing(path) as draft:
        image.save(draft, "PNG", pnginfo=header)
