"""Folders of classes as pairs: each image with its class's prompts, equal classes in one group."""

import random
from pathlib import Path

import pytest
from PIL import Image

from datamodules import Captions
from datamodules.evaluation.own_classes import ImageFolderClasses
from datamodules.open_source import open_source
from datamodules.pairs.mixture import Concatenated
from datamodules.pairs.source import Classes
from lit_clip.errors import InputError
from lit_clip.evaluation.prompts import templates_of
from lit_clip.models.config import Preprocessing

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
