"""Folders of images with a text file beside each."""

import os
import pickle
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import ImageFolderClasses
from datamodules.open_source import open_source
from datamodules.pairs import folder as folders
from datamodules.pairs.source import Classes
from lit_clip.errors import BadSample, InputError


def paint(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (i, 0, 0)).save(folder / name)


def test_images_at_any_depth_are_paired_with_texts_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "BATCH_ROWS", 2)
    names = ["b.PNG", "a.jpg", "deep/er/c.webp", "deep/d.v2.png", "deep.png"]
    paint(tmp_path, *names, "no text.png", ".hidden/e.png", ".f.png")
    for name in (*names, ".hidden/e.png", ".f.png"):
        (tmp_path / name).with_suffix(".txt").write_text(f"of {name}\n", encoding="utf-8")
    (tmp_path / "no image.txt").write_text("read me")
    source = open_source(tmp_path)
    found = [source.load(index, None) for index in range(len(source))]
    assert [pair.key for pair in found] == ["a.jpg", "b.PNG", "deep/d.v2.png", "deep/er/c.webp", "deep.png"]
    assert [pair.caption for pair in found] == [f"of {pair.key}" for pair in found]
    assert source.left_out.counts == {"no caption": 1}
    assert source.read(1).image == (tmp_path / "b.PNG").read_bytes()
    assert pickle.loads(pickle.dumps(source)).captions(4) == ["of deep.png"]


def test_each_line_is_a_caption_and_the_samples_seed_draws_one(tmp_path: Path) -> None:
    paint(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("\ufeffone\r\n\r\n  two \r\nnan\r\nthree", encoding="utf-8", newline="")
    source = open_source(tmp_path)
    assert source.captions(0) == ["one", "two", "three"]
    drawn = [source.load(0, random.Random(seed)).caption for seed in range(30)]
    assert drawn == [random.Random(seed).choice(["one", "two", "three"]) for seed in range(30)]


BAD_TEXTS = {"blank": b" \n", "nan": b"NaN", "not UTF-8": "café".encode("latin-1")}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_unusable_text_is_a_bad_sample_that_names_its_image(tmp_path: Path, case: str) -> None:
    paint(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(BAD_TEXTS[case])
    source = open_source(tmp_path)
    for read in (source.captions, source.read, lambda index: source.load(index, None)):
        with pytest.raises(BadSample) as error:
            read(0)
        assert error.value.where == f"{tmp_path}: a.png"
        assert error.value.reason == ("not UTF-8" if case == "not UTF-8" else "no caption")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadSample, match="cannot read a.txt"):
        source.captions(0)


def test_folder_of_images_without_texts_is_an_error_with_a_hint(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "b.png")
    with pytest.raises(InputError, match="its 2 images have no .txt beside them; a.jpg needs its caption in a.txt"):
        open_source(tmp_path)
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a cat\n")
    with pytest.raises(InputError, match=r"give the table itself \(captions.csv\)"):
        open_source(tmp_path)


def test_img2dataset_output_as_files_is_a_folder_of_images(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for shard in ("00000", "00001"):
        paint(tmp_path, f"{shard}/{shard}0000.jpg")
        (tmp_path / f"{shard}/{shard}0000.txt").write_text(f"of {shard}")
        (tmp_path / f"{shard}/{shard}0000.json").write_text("{}")
        pq.write_table(pa.table({"url": ["http://x/a.jpg"], "caption": ["of"]}), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    source = open_source(tmp_path)
    assert [source.captions(index) for index in range(len(source))] == [["of 00000"], ["of 00001"]]


def test_division_has_each_image_once(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(10)]
    paint(tmp_path, *names)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    train, val = open_source(tmp_path).divide(0.3, seed=0)
    assert (len(train), len(val)) == (7, 3)
    colors = [part.load(i, None).image.getpixel((0, 0))[0] for part in (train, val) for i in range(len(part))]
    assert np.array_equal(np.sort(colors), np.arange(10))


def deep(folder: Path, depth: int) -> Path:
    """Make folders so many levels deep and return the innermost."""
    for _ in range(depth):
        folder = folder / "d"
        folder.mkdir()
    return folder


def test_folders_are_walked_at_any_depth_and_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    innermost = deep(tmp_path / "top", 1200)
    (innermost / "a.txt").write_text("deep")
    Image.new("RGB", (4, 4)).save(innermost / "a.png")
    for link, target in (("top/back", ".."), ("top/here", "."), ("top/d/self", "self"), ("top/d/d/root", "/")):
        (tmp_path / link).symlink_to(target)
    elsewhere = tmp_path / "elsewhere"
    paint(elsewhere, "b.png")
    (elsewhere / "b.txt").write_text("linked")
    (tmp_path / "top/linked").symlink_to(elsewhere)
    source = open_source(tmp_path / "top")
    captions = [source.load(row, None).caption for row in range(len(source))]
    subprocess.run(["rm", "-r", str(tmp_path / "top/d")], check=True)  # pytest's and shutil's removal recurse
    assert captions == ["deep", "linked"]


def test_names_that_are_not_unicode_are_left_out_and_counted(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "b.png")
    for name in (b"a", b"caf\xe9"):
        os.link(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path), name + b"2.png"))
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name + b"2.txt"))).write_text("a cat")
    source = open_source(tmp_path)
    assert [source.key(row) for row in range(len(source))] == ["a2.png"]
    assert source.left_out.counts == {"its name is not UTF-8": 1, "no caption": 2}
    assert source.left_out.listed == [(f"{tmp_path}: caf\\xe92.png", "its name is not UTF-8")]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_text_that_is_no_small_file_is_a_bad_sample_in_place_of_being_waited_for(tmp_path: Path, kind: str) -> None:
    paint(tmp_path, "a.png")
    text = tmp_path / "a.txt"
    if kind == "pipe":
        os.mkfifo(text)
    elif kind == "device":
        text.symlink_to("/dev/zero")
    elif kind == "folder":
        text.mkdir()
    else:
        text.touch()
        os.truncate(text, 1 << 33)
    with pytest.raises(BadSample, match=r"a\.png: cannot read a\.txt \(it (is not a file|has more than 1 MB)\)"):
        open_source(tmp_path).load(0, None)


def test_folder_that_cannot_be_listed_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path, "locked/a.png", "open/b.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:  # the tests may run as root, whom no permission stops
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for options in ({}, {"classes": Classes(["a {}"])}):
        with pytest.raises(InputError, match=r"locked: not a readable folder \(Permission denied\)"):
            open_source(tmp_path, **options)
    with pytest.raises(InputError, match=r"locked: not a readable folder \(Permission denied\)"):
        ImageFolderClasses(str(tmp_path))


def test_class_whose_name_is_not_unicode_is_an_error_that_names_it(tmp_path: Path) -> None:
    paint(tmp_path, "a/a.png")
    os.rename(tmp_path / "a", os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    for read in (lambda: open_source(tmp_path, classes=Classes(["a {}"])), lambda: ImageFolderClasses(str(tmp_path))):
        with pytest.raises(InputError, match=r"caf\\(xe9|udce9).* rename") as error:
            read()
        assert str(error.value).isascii()
