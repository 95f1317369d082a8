"""Label order of the sets that torchvision has, which must be that of the paper's prompts."""

import importlib.util
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from datamodules import evaluation as sets
from lit_clip.evaluation.prompts import prompts_of
from tests.conftest import ROOT
from tests.helpers.coloured_sets import message_of
from tests.helpers.miniature_images import paint, write_mat, write_text
from tests.helpers.miniatures import MINIATURES, open_miniature

pytestmark = pytest.mark.usefixtures("_mat_read_once")

PROMPTS = json.loads((ROOT / "lit_clip/evaluation/paper_prompts.json").read_text(encoding="utf-8"))["sets"]


def prompt_names(name: str) -> list[str]:
    """Return the first name of each class in the paper's ``data/prompts.md``."""
    classes = PROMPTS[name]["classes"]
    if isinstance(classes, str):  # the list is in clip_benchmark
        package = importlib.util.find_spec("clip_benchmark")
        assert package is not None
        assert package.origin is not None
        listed = json.loads((Path(package.origin).parent / "datasets/en_classnames.json").read_text(encoding="utf-8"))
        classes = listed[classes.removeprefix("clip_benchmark:")]
    return [names if isinstance(names, str) else names[0] for names in classes]


def test_sun397_labels_follow_the_papers_names(tmp_path: Path) -> None:
    """The files list the classes backwards, with underscores and slashes where the prompts have spaces."""
    names = prompt_names("SUN397")
    paths = [f"/{name[0]}/{name.replace(' ', '_')}" for name in names]
    folder = tmp_path / "SUN397"
    write_text(folder / "ClassName.txt", "\n".join(reversed(paths)))
    write_text(
        folder / "Testing_01.txt", "\n".join(f"{path}/sun_{i}.jpg" for i, path in reversed(list(enumerate(paths))))
    )
    (folder / paths[-1].lstrip("/")).mkdir(parents=True)
    images = sets.SUN397(str(tmp_path))
    assert images.class_names == names
    assert [(images.key(i), label) for i, label in enumerate(images.labels())] == [
        (f"{path.lstrip('/')}/sun_{label}.jpg", label) for label, path in reversed(list(enumerate(paths)))
    ]


@pytest.mark.parametrize(
    ("path", "words"), [("/t/theater/indoor_seats", "theater indoor seats"), ("/a/abbey", "abbey")]
)
def test_sun397_class_names_are_paths_in_words(path: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "SUN397"
    write_text(folder / "ClassName.txt", f"{path}\n")
    write_text(folder / "Testing_01.txt", f"{path}/sun_a.jpg\n")
    paint(folder / f"{path.lstrip('/')}/sun_a.jpg", 1)
    assert sets.SUN397(str(tmp_path)).class_names == [words]


def test_oxford_pets_labels_follow_the_papers_names(tmp_path: Path) -> None:
    """The set's own numbering ignores case: Abyssinian, american bulldog, ..."""
    names = prompt_names("OxfordPets")
    own = sorted(names, key=str.lower)
    folder = tmp_path / "oxford-iiit-pet"
    lines = [f"{name.replace(' ', '_')}_1 {i} 1 1" for i, name in enumerate(own, 1)]
    write_text(folder / "annotations/test.txt", "\n".join(lines))
    (folder / "images").mkdir()
    images = sets.OxfordPets(str(tmp_path))
    assert images.class_names == names
    assert [images.class_names[label] for label in images.labels()] == own
    assert own != names
    assert prompts_of("paper:OxfordPets", "paper:OxfordPets", images.class_names).names == names


def test_fgvc_aircraft_labels_follow_the_papers_names(tmp_path: Path) -> None:
    names = prompt_names("FGVCAircraft")
    folder = tmp_path / "fgvc-aircraft-2013b/data"
    shuffled = random.Random(0).sample(names, len(names))
    write_text(folder / "variants.txt", "\n".join(shuffled))
    write_text(folder / "images_variant_test.txt", "\n".join(f"{i:07} {name}" for i, name in enumerate(shuffled)))
    (folder / "images").mkdir()
    images = sets.FGVCAircraft(str(tmp_path))
    assert images.class_names == names
    assert [names[label] for label in images.labels()] == shuffled


def test_food101_and_dtd_labels_follow_the_papers_names(tmp_path: Path) -> None:
    food, textures = prompt_names("Food101"), prompt_names("DTD")
    dishes = {name.replace(" ", "_"): [f"{name.replace(' ', '_')}/1"] for name in reversed(food)}
    write_text(tmp_path / "food-101/meta/test.json", json.dumps(dishes))
    (tmp_path / "food-101/images/apple_pie").mkdir(parents=True)
    assert sets.Food101(str(tmp_path)).class_names == food
    write_text(
        tmp_path / "dtd/dtd/labels/test1.txt", "\n".join(f"{name}/{name}_0001.jpg" for name in reversed(textures))
    )
    for name in textures:
        (tmp_path / "dtd/dtd/images" / name).mkdir(parents=True)
    assert sets.DTD(str(tmp_path)).class_names == textures


CALTECH_RENAMED = {  # folder: the paper's name, where it differs
    "BACKGROUND_Google": "background",
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a  crocodile",
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
}


def test_caltech101_labels_follow_the_papers_names_and_thirty_images_train(tmp_path: Path) -> None:
    names = prompt_names("Caltech101")
    folder_of = {words: folder for folder, words in CALTECH_RENAMED.items()}
    folders = [folder_of.get(name, name.replace(" ", "_")) for name in names]
    for folder in folders:
        path = tmp_path / "caltech101/101_ObjectCategories" / folder
        path.mkdir(parents=True)
        for i in range(31 + (folder == "Faces")):
            (path / f"image_{i:04}.jpg").touch()
    train, test = sets.Caltech101(str(tmp_path), "train"), sets.Caltech101(str(tmp_path), "test")
    for images in (train, test):
        assert [images.key(images.labels().index(label)).split("/")[0] for label in range(102)] == folders
        assert prompts_of("paper:Caltech101", "paper:Caltech101", images.class_names).names == names
    assert np.bincount(train.labels()).tolist() == [30] * 102
    assert np.bincount(test.labels()).tolist() == [1, 2, *[1] * 100]
    assert not {train.key(i) for i in range(len(train))} & {test.key(i) for i in range(len(test))}
    other = sets.Caltech101(str(tmp_path), "test", seed=1)
    assert [other.key(i) for i in range(103)] != [test.key(i) for i in range(103)]


def test_caltech101_without_its_background_is_an_error(tmp_path: Path) -> None:
    paint(tmp_path / "caltech101/101_ObjectCategories/accordion/image_0001.jpg", 1)
    assert "BACKGROUND_Google" in message_of(lambda: sets.Caltech101(str(tmp_path)))


# The paper's names for EuroSAT's classes.
EUROSAT_NAMES = {
    "forest": "forest",
    "permanent crop": "permanent crop land",
    "residential": "residential buildings or homes or apartments",
    "river": "river",
    "pasture": "pasture land",
    "sea lake": "lake or sea",
    "herbaceous vegetation": "brushland or shrubland",
    "annual crop": "annual crop land",
    "industrial": "industrial buildings or commercial buildings",
    "highway": "highway or road",
}


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("cifar10", "CIFAR10"),
        ("voc2007", "VOC2007"),
        ("mnist", "MNIST"),
        ("fer2013", "FER2013"),
        ("stl10", "STL10"),
        ("eurosat", "EuroSAT"),
        ("pcam", "PCam"),
        ("clevr_counts", "CLEVRCounts"),
        ("rendered_sst2", "RenderedSST2"),
    ],
)
def test_built_in_class_lists_follow_the_papers_names(name: str, paper: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name]
    miniature.write(tmp_path)
    names = open_miniature(miniature, tmp_path, "test").class_names
    in_words = [EUROSAT_NAMES.get(name, name) for name in names]
    assert in_words == prompts_of(f"paper:{paper}", f"paper:{paper}", names).names
    assert paper == "EuroSAT" or in_words == prompt_names(paper)  # the package lists EuroSAT in another order


@pytest.mark.parametrize(
    ("label", "words"),
    [(0, "20 kph"), (6, "end"), (14, "stop"), (17, "no entry"), (25, "work"), (40, "circle"), (42, "trucks")],
)
def test_gtsrb_signs_follow_the_papers_names(label: int, words: str, tmp_path: Path) -> None:
    ours = {0: "20", 6: "end", 14: "stop", 17: "no entry", 25: "works", 40: "roundabout", 42: "trucks"}
    MINIATURES["gtsrb"].write(tmp_path)
    names = sets.GTSRB(str(tmp_path)).class_names
    assert len(names) == len(prompt_names("GTSRB")) == 43
    assert ours[label] in names[label]
    assert words in prompt_names("GTSRB")[label]


def test_flowers_and_cars_have_the_papers_names(tmp_path: Path) -> None:
    MINIATURES["flowers102"].write(tmp_path)
    ours, paper = sets.Flowers102(str(tmp_path)).class_names, prompt_names("Flowers102")
    plain = [re.sub("[^a-z]", "", name.replace(" and ", " ").replace("air plant", "ball moss")) for name in paper]
    assert [re.sub("[^a-z]", "", name) for name in ours] == plain  # names differ in hyphens and spelling
    names = np.array([prompt_names("StanfordCars")], dtype=object)
    folder = tmp_path / "stanford_cars"
    write_mat(folder / "devkit/cars_meta.mat", class_names=names)
    annotations = np.zeros((1, 196), dtype=[("class", object), ("fname", object)])
    for i in range(196):
        annotations[0, i] = (196 - i, f"{i:05}.jpg")
    write_mat(folder / "cars_test_annos_withlabels.mat", annotations=annotations)
    (folder / "cars_test").mkdir()
    images = sets.StanfordCars(str(tmp_path))
    assert images.class_names == names[0].tolist()
    assert images.labels() == list(range(195, -1, -1))


def test_kitti_distances_follow_the_papers_names(tmp_path: Path) -> None:
    MINIATURES["kitti"].write(tmp_path)
    paper = [re.sub(r"^a photo i took (of|with) |my |\.$", "", name) for name in prompt_names("KITTI")]
    ours = [re.sub("the left", "left", name) for name in sets.KITTI(str(tmp_path)).class_names]
    assert ours == [re.sub("on left", "on left", name) for name in paper]
