"""Folders of images with a text file beside each, and folders of classes as pairs."""

import os
import pickle
import random
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from datamodules import Captions, ImageFolderClasses
from datamodules.open_source import open_source
from datamodules.pairs import folder as folders
from datamodules.pairs.mixture import Concatenated
from datamodules.pairs.source import Classes
from lit_clip.errors import BadSample, InputError
from lit_clip.evaluation.prompts import templates_of
from lit_clip.models.config import Preprocessing


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
    for name in ("captions.csv", "captions.txt"):
        (tmp_path / name).write_text("image,caption\na.png,a cat\n")
    with pytest.raises(InputError, match=r"give the table itself \(captions.csv, captions.txt\)"):
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


def deep(folder: Path, depth: int) -> Path:
    """Make folders so many levels deep and return the innermost."""
    for _ in range(depth):
        folder = folder / "d"
        folder.mkdir()
    return folder


def test_folders_are_walked_at_any_depth_and_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    innermost = deep(tmp_path / "top", 1050)
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


IMAGES = ["gold_fish/a.png", "gold_fish/deep/b.png", "tench/a.png", "tench/c.JPG", "tench/d.png"]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder of two classes, with files to ignore."""
    for number, name in enumerate([*IMAGES, "tench/.hidden.png", ".cache/x.png"]):
        path = tmp_path / "classes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 30, 0, 0)).save(path, "png")
    (tmp_path / "classes/notes.txt").write_text("no class")
    return tmp_path / "classes"


def test_captions_are_the_templates_with_the_classs_name(classes: Path) -> None:
    source = open_source(classes, classes=Classes(["a photo of a {}.", "{}, {}"]))
    evaluated = ImageFolderClasses(str(classes))
    assert len(source) == len(evaluated)
    for row, name in enumerate(IMAGES):
        image, label = evaluated[row]
        words = evaluated.class_names[label]
        pair = source.load(row, None)
        assert source.captions(row) == [f"a photo of a {words}.", f"{words}, {words}"]
        assert (pair.caption, pair.key, pair.group) == (f"a photo of a {words}.", name, name.partition("/")[0])
        assert pair.image.tobytes() == image.tobytes()
    drawn = {source.load(0, random.Random(seed)).caption for seed in range(20)}
    assert drawn == {"a photo of a gold fish.", "gold fish, gold fish"}


def test_templates_and_class_names_are_those_of_an_evaluation(classes: Path, tmp_path: Path) -> None:
    source = open_source(classes, classes=Classes("imagenet"))
    assert source.captions(4) == [template.replace("{}", "tench") for template in templates_of("imagenet")]
    (tmp_path / "names.yaml").write_text("classes: [goldfish, [tench, Tinca tinca]]\ntemplates: ['a {}', 'the {}']\n")
    source = open_source(classes, classes=Classes(names=str(tmp_path / "names.yaml")))
    assert source.captions(0) == ["a goldfish", "the goldfish"]
    assert source.captions(2) == ["a tench", "the tench", "a Tinca tinca", "the Tinca tinca"]
    for options, problem in {
        ("nonesuch", None): "templates: 'nonesuch' has no {}",
        ("imagenet", "imagenet"): "1000 class names, but the set has 2 classes",
    }.items():
        with pytest.raises(InputError, match=problem):
            open_source(classes, classes=Classes(*options))


def test_batches_have_the_class_as_group_and_an_epoch_draws_other_templates(classes: Path) -> None:
    data = Captions(str(classes), str(classes), classes=Classes("imagenet"), batch_size=5, num_workers=0)
    data.preprocessing = Preprocessing(image_size=8)
    data.setup("fit")
    loader = data.train_dataloader()
    first, again = list(loader), list(data.train_dataloader())
    assert [batch.captions for batch in first] == [batch.captions for batch in again]
    loader.batch_sampler.sampler.set_epoch(1)
    (batch,), (other,) = first, list(loader)
    assert sorted(batch.keys) == sorted(other.keys) == sorted(IMAGES)
    assert list(batch.groups) == [key.partition("/")[0] for key in batch.keys]
    assert dict(zip(batch.keys, batch.captions, strict=True)) != dict(zip(other.keys, other.captions, strict=True))


def test_without_validation_data_images_are_held_out(classes: Path, tmp_path: Path) -> None:
    data = Captions(str(classes), classes=Classes("a {}"), batch_size=1, num_workers=0)
    train, val = data.sources(fit=True)
    assert train is not None
    keys = [source.read(row).key for source in (train, val) for row in range(len(source))]
    assert (len(val), sorted(keys)) == (1, sorted(IMAGES))
    (tmp_path / "val.csv").write_text(f"image,caption\n{classes}/tench/a.png,of its own\n")
    _, val = Captions(str(classes), str(tmp_path / "val.csv"), classes=Classes("a {}")).sources(fit=True)
    assert val.captions(0) == ["of its own"]


def test_several_folders_of_the_same_classes_are_one_source(classes: Path) -> None:
    both = open_source([classes, classes], classes=Classes("a {}"))
    assert isinstance(both, Concatenated)
    assert {both.load(row, None).group for row in range(len(both))} == {"gold_fish", "tench"}


def test_mistakes_are_one_line(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"or set --data.classes.templates \(such as imagenet\) if each subfolder is a class$"
    ):
        open_source(classes, option_prefix="--data.")
    (tmp_path / "t.csv").write_text("image,caption\na.png,a cat\n")
    with pytest.raises(
        InputError, match=r"^--classes.templates: .*t.csv is not a folder of classes; leave classes.templates out"
    ):
        open_source(tmp_path / "t.csv", classes=Classes("imagenet"), option_prefix="--")
    with pytest.raises(InputError, match="tench: no subfolders"):
        open_source(classes / "tench", classes=Classes("imagenet"))
    (classes / "zebra").mkdir()
    with pytest.raises(InputError, match="zebra: no images of this class"):
        open_source(classes, classes=Classes("imagenet"))
