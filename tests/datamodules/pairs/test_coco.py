"""JSON files of captions: COCO's, Karpathy's splits, and unknown ones."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.open_source import open_source
from datamodules.pairs.source import Columns, PairSource
from lit_clip.errors import InputError

COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 397133, "file_name": "000000397133.jpg", "height": 4, "width": 4},
        {"id": 37777, "file_name": "000000037777.jpg"},
        {"id": 5, "file_name": "000000000005.jpg"},
    ],
    "annotations": [
        {"image_id": 37777, "id": 1, "caption": "The dining table near the kitchen has a bowl of fruit on it."},
        {"image_id": 397133, "id": 2, "caption": "A man is in a kitchen making pizzas.\n"},
        {"image_id": 37777, "id": 3, "caption": "A small kitchen has various appliances and a table."},
        {"image_id": 37777, "id": 4, "caption": " "},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": "a.jpg", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filepath": "train2014", "filename": "b.jpg", "split": "train", "sentences": [{"raw": "three", "tokens": []}]},
        {"filepath": "val2014", "filename": "c.jpg", "split": "restval", "sentences": [{"raw": "four"}]},
        {"filepath": "val2014", "filename": "d.jpg", "split": "val", "sentences": [{"raw": "five"}]},
    ],
}


def paint(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / name)


def contents(source: PairSource) -> list[tuple[str, list[str]]]:
    return [(source.load(i, None).key, source.captions(i)) for i in range(len(source))]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("images", ["annotations", "annotations/images", "val2017", "images/val2017", "images", "."])
def test_coco_images_are_found_where_its_archives_put_them(tmp_path: Path, images: str, indent: int | None) -> None:
    table = tmp_path / "annotations/captions_val2017.json"
    table.parent.mkdir()
    table.write_text(json.dumps(COCO, indent=indent))
    paint(tmp_path / images, *(image["file_name"] for image in COCO["images"][:2]))
    source = open_source(table)
    first, second = (annotation["caption"] for annotation in COCO["annotations"][:3:2])
    assert contents(source) == [
        ("000000397133.jpg", ["A man is in a kitchen making pizzas.\n"]),
        ("000000037777.jpg", [first, second]),
    ]
    assert source.left_out.listed == [(f"{table} image id 5", "no caption")]
    assert source.read(0).where == f"{table} image id 397133"
    assert {source.load(1, random.Random(seed)).caption for seed in range(20)} == {first, second}


def test_missing_coco_images_are_an_error_that_lists_the_folders_searched(tmp_path: Path) -> None:
    (tmp_path / "captions_val2017.json").write_text(json.dumps(COCO))
    with pytest.raises(InputError, match=r"000000397133.jpg is not in .*val2017.*; set columns.root"):
        open_source(tmp_path / "captions_val2017.json")
    paint(tmp_path / "elsewhere", *(image["file_name"] for image in COCO["images"]))
    assert len(open_source(tmp_path / "captions_val2017.json", columns=Columns(root=str(tmp_path / "elsewhere")))) == 2


def test_karpathy_splits_are_one_source_each_and_train_includes_restval(tmp_path: Path) -> None:
    table = tmp_path / "dataset_coco.json"
    table.write_text(json.dumps(KARPATHY))
    paint(tmp_path, *(f"{image['filepath']}/{image['filename']}" for image in KARPATHY["images"]))
    expected = {
        "test": [("val2014/a.jpg", ["one", "two"])],
        "train": [("train2014/b.jpg", ["three"]), ("val2014/c.jpg", ["four"])],
        "restval": [("val2014/c.jpg", ["four"])],
        "val": [("val2014/d.jpg", ["five"])],
        "validation": [("val2014/d.jpg", ["five"])],
    }
    for split, pairs in expected.items():
        assert contents(open_source(table, split=split)) == pairs
    assert contents(open_source(table, default_split="val", split="test")) == expected["test"]
    with pytest.raises(InputError, match="several splits; its splits are test, train, restval, val; set split"):
        open_source(table)


def test_flickr_file_without_folders_is_read(tmp_path: Path) -> None:
    (image,) = [{key: value for key, value in KARPATHY["images"][0].items() if key != "filepath"}]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": [image], "dataset": "flickr30k"}))
    paint(tmp_path / "images", "a.jpg")
    assert contents(open_source(tmp_path / "dataset_flickr30k.json")) == [("a.jpg", ["one", "two"])]


def broken(**changes: Any) -> dict[str, Any]:
    return {**COCO, **changes}


BROKEN: dict[str, tuple[Any, str]] = {
    "another object": ({"data": [], "version": 1}, 'no list "images", found data, version'),
    "no captions": ({"images": COCO["images"]}, '"images" without captions'),
    "boxes": (broken(annotations=[{"image_id": 5, "bbox": [1, 2, 3, 4]}]), "annotation 0 has no caption.*instances"),
    "annotation without image": (broken(annotations=[{"caption": "a"}]), "annotation 0 has no image_id"),
    "nameless image": (broken(images=[{"id": 1}]), "image 0 needs a file_name"),
    "number as caption": (
        broken(annotations=[{"image_id": 5, "caption": 7}]),
        r"image id 5: the caption is not text: \[7\]",
    ),
    "no annotations": (broken(annotations=[]), r"no row with an image and a caption \(3 rows without a caption\)"),
    "array of words": (["a", "b"], "row 1: not a JSON object"),
    "empty array": ([], "no row"),
    "a number": (7, "found nothing"),
    "half a file": (json.dumps(COCO, indent=1)[:200].encode(), "not a readable JSON file"),
    "not UTF-8": (b'{"images": [\n"caf\xe9"', "not UTF-8 text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unknown_json_file_is_an_error_that_names_it(tmp_path: Path, case: str) -> None:
    content, message = BROKEN[case]
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=1).encode()
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(InputError, match=f"t.json.*({message})"):
        open_source(tmp_path / "t.json")


def test_non_text_caption_only_loses_its_image_with_on_error_skip(tmp_path: Path) -> None:
    annotations = [*COCO["annotations"], {"image_id": 5, "caption": 7}]
    (tmp_path / "t.json").write_text(json.dumps(broken(annotations=annotations)))
    source = open_source(tmp_path / "t.json", on_error="skip", columns=Columns(root="."))
    assert len(source) == 2
    assert source.left_out.counts == {"caption is not text": 1}
