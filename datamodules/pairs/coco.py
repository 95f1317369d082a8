"""Captions in a JSON file: COCO's, Karpathy's splits of COCO and Flickr, or an array of objects."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError, require
from lit_clip.tools.reading import reading
from .source import PairSource, SourceOptions, find_split
from .text_table import Problems, RawRow, open_records, open_rows, open_table, shown


def open_json(path: Path, options: SourceOptions) -> PairSource:
    """Open a ``.json`` file in any of this module's formats, or with one object per line."""
    if _is_lines(path):
        return open_table(path, options)
    with reading(path, "JSON file", hint="fix it, or save it as UTF-8"):
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(values, list):
        return open_records(path, values, options)
    images = values.get("images") if isinstance(values, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        found = ", ".join(key[:60] for key in list(values)[:8]) if isinstance(values, dict) else ""
        raise InputError(
            f"{path}: no list \"images\", found {found or 'nothing'}; it must be COCO's captions, Karpathy's splits, "
            "an array of objects with an image and a caption, or one such object per line"
        )
    options.refuse_columns(path)
    if isinstance(values.get("annotations"), list):
        options.refuse_split(path)
        annotations = values["annotations"]
        return open_rows(path, options, lambda each: _coco(path, images, annotations, each), "image id", _find_root)
    if any("sentences" in image for image in images[:1]):
        return open_rows(path, options, lambda _: _karpathy(path, images, options), "image number", _find_root)
    raise InputError(
        f'{path}: "images" without captions; they must be in "annotations" or in each image\'s "sentences"'
    )


def _is_lines(path: Path) -> bool:
    """Return whether the first line is a complete object that is not in COCO's format."""
    with reading(path, "JSON file"), path.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return not first.strip()
    try:
        return "images" not in json.loads(first)
    except (ValueError, RecursionError):
        return False


def _coco(path: Path, images: list[dict[str, Any]], annotations: list[Any], problems: Problems) -> Iterator[RawRow]:
    captions: dict[int, list[Any]] = {}
    number_of: dict[int, int] = {}
    for number, image in enumerate(images):
        usable = isinstance(image.get("file_name"), str) and _is_id(image.get("id"))
        require(usable, f"{path}: image {number} needs a file_name and an integer id")
        other = number_of.setdefault(image["id"], number)
        same = f"images {other} and {number} have the same id {image['id']}, so their captions cannot be told apart"
        require(other == number, f"{path}: {same}; give each its own")
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or "image_id" not in annotation:
            raise InputError(f"{path}: annotation {number} has no image_id; fix the file")
        where, found = f"{path}: annotation {number}", shown(annotation["image_id"])
        require("caption" in annotation, f"{where} has no caption; give captions_*.json, not instances_*.json")
        require(_is_id(annotation["image_id"]), f"{where} has the image_id {found}, which is not an integer")
        if annotation["image_id"] in number_of:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        else:
            problems.left_out.add(f"{path} annotation {number}", "annotation without an image")
    for image in images:
        yield RawRow(image["id"], image["file_name"], captions.get(image["id"], []))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _karpathy(path: Path, images: list[dict[str, Any]], options: SourceOptions) -> Iterator[RawRow]:
    """Yield the wanted split; ``train`` includes ``restval``, as is common."""
    splits = list(dict.fromkeys(str(image.get("split")) for image in images))
    wanted = find_split(path, splits, options)
    included = {"train", "restval"} if wanted == "train" else {wanted}
    for number, image in enumerate(images):
        if str(image.get("split")) not in included:
            continue
        sentences = image.get("sentences")
        if not isinstance(image.get("filename"), str) or not isinstance(sentences, list):
            raise InputError(f"{path}: image {number} needs a filename and a list of sentences")
        folder = image.get("filepath")
        require(
            folder is None or isinstance(folder, str),
            f"{path}: image {number} has the filepath {shown(folder)}, no text",
        )
        name = f"{folder}/{image['filename']}" if folder else image["filename"]
        captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
        yield RawRow(number, name, captions)


def _find_root(path: Path, image: str) -> Path:
    """Find the image folder: beside the file, or at the place in COCO's archives."""
    above = path.parent.parent
    named = path.stem.removeprefix("captions_")  # captions_train2017.json
    places = [path.parent, path.parent / "images", path.parent / named, above, above / "images", above / named]
    places.append(above / "images" / named)
    for place in places:
        if os.path.isfile(place / image):  # unlike the method, false for a name that is too long
            return place
    raise InputError(
        f"{path}: {image} is not in {', '.join(map(str, places))}; set columns.root to the folder of its images"
    )
