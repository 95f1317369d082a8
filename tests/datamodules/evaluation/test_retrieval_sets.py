"""Captioned images from any source, COCO and Flickr30k."""

import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules.evaluation import COCO, CaptionedPairs, Flickr30k
from lit_clip.evaluation.data import CaptionedImages, MissingData
from tests.helpers.coloured_sets import message_of, paint_shade, shade


def keys_shades_captions(images: CaptionedImages) -> list[tuple[str, int, list[str]]]:
    """Return the key, shade and captions of every image."""
    return [(images.key(i), shade(images.images(i)[0]), images.captions(i)) for i in range(len(images))]


def test_table_rows_with_the_same_image_are_one_image_with_all_captions(tmp_path: Path) -> None:
    for name, number in (("a.png", 10), ("b.png", 20)):
        paint_shade(tmp_path / name, number)
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\nb.png,two\na.png,three\n")
    images = CaptionedPairs(str(tmp_path / "pairs.csv"))
    expected = [("a.png", 10, ["one", "three"]), ("b.png", 20, ["two"])]
    assert keys_shades_captions(images) == expected
    copy = pickle.loads(pickle.dumps(images))
    assert (keys_shades_captions(copy), copy.stamp()) == (expected, images.stamp())
    before = images.stamp()
    paint_shade(tmp_path / "b.png", 200).write_bytes(b"another")
    assert CaptionedPairs(str(tmp_path / "pairs.csv")).stamp() != before


def test_columns_and_root_can_be_set(tmp_path: Path) -> None:
    paint_shade(tmp_path / "images/a.png", 10)
    (tmp_path / "pairs.csv").write_text("place,words\na.png,one\n")
    images = CaptionedPairs(str(tmp_path / "pairs.csv"), str(tmp_path / "images"), "place", "words")
    assert keys_shades_captions(images) == [("a.png", 10, ["one"])]


def test_folder_of_images_and_text_files_is_a_retrieval_set(tmp_path: Path) -> None:
    paint_shade(tmp_path / "a.png", 10)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert keys_shades_captions(CaptionedPairs(str(tmp_path))) == [("a.png", 10, ["one", "two"])]


def test_tar_shards_are_a_retrieval_set(tmp_path: Path) -> None:
    paint_shade(tmp_path / "0.png", 10)
    (tmp_path / "0.txt").write_text("one")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
        tar.add(tmp_path / "0.txt", "0.txt")
    images = CaptionedPairs(str(tmp_path / "0.tar"))
    assert keys_shades_captions(images) == [("0", 10, ["one"])]
    assert len(pickle.loads(pickle.dumps(images)).images(0)) == 1


def test_missing_source_is_missing_data_and_a_missing_column_an_error(tmp_path: Path) -> None:
    assert "nowhere.csv" in message_of(lambda: CaptionedPairs(str(tmp_path / "nowhere.csv")), MissingData)
    (tmp_path / "pairs.csv").write_text("image,words\na.png,one\n")
    assert "image, words" in message_of(lambda: CaptionedPairs(str(tmp_path / "pairs.csv")))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def karpathy_entry(name: str, split: str, captions: Sequence[str], **more: str) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
    return {"filename": name, "split": split, "sentences": sentences, **more}


def test_coco_reads_karpathys_splits_and_val2017_only_by_its_name(tmp_path: Path) -> None:
    """The two have other images, so that a folder with one must not stand for the other."""
    paint_shade(tmp_path / "val2017/7.jpg", 70)
    values = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}],
    }
    write_json(tmp_path / "annotations/captions_val2017.json", values)
    assert keys_shades_captions(COCO(str(tmp_path), "val2017")) == [("7.jpg", 70, ["a", "b"])]
    message = message_of(lambda: COCO(str(tmp_path)), MissingData)
    for part in ("captions_val2017.json", "dataset_coco.json", "coco_test_karpathy.json", "split val2017"):
        assert part in message
    images = [
        karpathy_entry("1.jpg", "train", ["no"], filepath="train2014"),
        karpathy_entry("2.jpg", "test", ["c", "d"], filepath="val2014"),
        karpathy_entry("3.jpg", "val", ["no"], filepath="val2014"),
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    paint_shade(tmp_path / "val2014/2.jpg", 20)
    paint_shade(tmp_path / "val2014/3.jpg", 30)
    assert keys_shades_captions(COCO(str(tmp_path))) == [("val2014/2.jpg", 20, ["c", "d"])]
    assert keys_shades_captions(COCO(str(tmp_path), "val")) == [("val2014/3.jpg", 30, ["no"])]
    assert keys_shades_captions(COCO(str(tmp_path), "val2017")) == [("7.jpg", 70, ["a", "b"])]
    assert "dataset_coco.json" in message_of(lambda: COCO(str(tmp_path / "val2014")), MissingData)


LINES = {
    "flickr30k_test_karpathy.txt": "image,caption\n2.jpg,Two, with a comma .\n2.jpg,b\n1.jpg,One | or two\n",
    "results.csv": "image_name| comment_number| comment\n1.jpg| 0| One | or two\n2.jpg| 0| Two, with a comma .\n"
    "2.jpg| 1| b\n3.jpg| 0| not in the split\n3.jpg| 4   A line without its bar\n",
    "results_20130124.token": "1.jpg#0\tOne | or two\n2.jpg#0\tTwo, with a comma .\n2.jpg#1\tb\n3.jpg#0\tnot in it\n",
}


@pytest.mark.parametrize("file", ["dataset_flickr30k.json", *LINES])
@pytest.mark.parametrize("folder", ["flickr30k-images", "flickr30k_images", "."])
def test_flickr30k_reads_karpathys_test_split_from_any_of_its_files(file: str, folder: str, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        paint_shade(tmp_path / folder / f"{i}.jpg", 10 * i)
    if file in LINES:
        (tmp_path / file).write_text(LINES[file])
        (tmp_path / "test.txt").write_text("2.jpg\n1.jpg\n")
    else:
        images = [
            karpathy_entry("3.jpg", "train", ["no"]),
            karpathy_entry("2.jpg", "test", ["Two, with a comma .", "b"]),
            karpathy_entry("1.jpg", "test", ["One | or two"]),
        ]
        write_json(tmp_path / file, {"images": images, "dataset": "flickr30k"})
    images = Flickr30k(str(tmp_path))
    expected = [("2.jpg", 20, ["Two, with a comma .", "b"]), ("1.jpg", 10, ["One | or two"])]
    assert keys_shades_captions(images) == expected
    copy = pickle.loads(pickle.dumps(images))
    assert (keys_shades_captions(copy), copy.stamp()) == (expected, images.stamp())


def test_flickr30k_list_of_all_images_needs_a_list_of_the_split(tmp_path: Path) -> None:
    paint_shade(tmp_path / "1.jpg")
    (tmp_path / "results.csv").write_text(LINES["results.csv"])
    assert "test.txt" in message_of(lambda: Flickr30k(str(tmp_path)), MissingData)
    (tmp_path / "test.txt").write_text("9.jpg\n")
    assert "9.jpg" in message_of(lambda: Flickr30k(str(tmp_path)))
    (tmp_path / "results.csv").write_text(LINES["results.csv"] + "rubbish\n")
    assert "line 7" in message_of(lambda: Flickr30k(str(tmp_path)))
    assert "nowhere" in message_of(lambda: Flickr30k(str(tmp_path / "nowhere")), MissingData)
