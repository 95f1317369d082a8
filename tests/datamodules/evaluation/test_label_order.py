"""Label order of the sets that torchvision has, which must be that of the paper's prompts."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules import evaluation as sets
from lit_clip.evaluation.data import LabelledImages
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


def write_sun397(root: Path, names: list[str]) -> None:
    """Paths have underscores and slashes where the prompts have spaces."""
    paths = [f"/{name[0]}/{name.replace(' ', '_')}" for name in names]
    write_text(root / "SUN397/ClassName.txt", "\n".join(paths))
    write_text(root / "SUN397/Testing_01.txt", "\n".join(f"{path}/sun_a.jpg" for path in paths))
    (root / f"SUN397{paths[0]}").mkdir(parents=True)


def write_pets(root: Path, names: list[str]) -> None:
    lines = [f"{name.replace(' ', '_')}_1 {i} 1 1" for i, name in enumerate(names, 1)]
    write_text(root / "oxford-iiit-pet/annotations/test.txt", "\n".join(lines))
    (root / "oxford-iiit-pet/images").mkdir()


def write_aircraft(root: Path, names: list[str]) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    write_text(folder / "variants.txt", "\n".join(names))
    write_text(folder / "images_variant_test.txt", "\n".join(f"{i:07} {name}" for i, name in enumerate(names)))
    (folder / "images").mkdir()


def write_food(root: Path, names: list[str]) -> None:
    dishes = {name.replace(" ", "_"): [f"{name.replace(' ', '_')}/1"] for name in names}
    write_text(root / "food-101/meta/test.json", json.dumps(dishes))
    (root / "food-101/images/apple_pie").mkdir(parents=True)


def write_textures(root: Path, names: list[str]) -> None:
    write_text(root / "dtd/labels/test1.txt", "\n".join(f"{name}/{name}_0001.jpg" for name in names))
    for name in names:
        (root / "dtd/images" / name).mkdir(parents=True)


def write_cars(root: Path, names: list[str]) -> None:
    """The file of classes has them in the paper's order; the list of images in another."""
    folder = root / "stanford_cars"
    write_mat(folder / "devkit/cars_meta.mat", class_names=np.array([names[::-1]], dtype=object))
    annotations = np.zeros((1, len(names)), dtype=[("class", object), ("fname", object)])
    for i in range(len(names)):
        annotations[0, i] = (len(names) - i, f"{i:05}.jpg")
    write_mat(folder / "cars_test_annos_withlabels.mat", annotations=annotations)
    (folder / "cars_test").mkdir()


LISTED: dict[str, tuple[Callable[[str], LabelledImages], Callable[[Path, list[str]], None]]] = {
    "SUN397": (sets.SUN397, write_sun397),
    "OxfordPets": (sets.OxfordPets, write_pets),  # whose own numbering ignores case
    "FGVCAircraft": (sets.FGVCAircraft, write_aircraft),
    "Food101": (sets.Food101, write_food),
    "DTD": (sets.DTD, write_textures),
    "StanfordCars": (sets.StanfordCars, write_cars),
}


@pytest.mark.parametrize("name", LISTED)
def test_labels_follow_the_papers_names_in_whatever_order_files_list_them(name: str, tmp_path: Path) -> None:
    make, write = LISTED[name]
    names = prompt_names(name)
    write(tmp_path, names[::-1])
    images = make(str(tmp_path))
    assert images.class_names == names
    in_json = name == "Food101"  # whose images follow the sorted classes
    assert images.labels() == list(range(len(names)))[:: 1 if in_json else -1]
    assert prompts_of(f"paper:{name}", f"paper:{name}", images.class_names).names == names


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
    paint(tmp_path / "without/caltech101/101_ObjectCategories/accordion/image_0001.jpg", 1)
    assert "BACKGROUND_Google" in message_of(lambda: sets.Caltech101(str(tmp_path / "without")))


# The paper's words where ours differ.
WORDS = {
    "permanent crop": "permanent crop land",
    "residential": "residential buildings or homes or apartments",
    "pasture": "pasture land",
    "sea lake": "lake or sea",
    "herbaceous vegetation": "brushland or shrubland",
    "annual crop": "annual crop land",
    "industrial": "industrial buildings or commercial buildings",
    "highway": "highway or road",
}
BUILT_IN = ("CIFAR10", "VOC2007", "MNIST", "FER2013", "STL10", "EuroSAT", "PCam", "CLEVRCounts", "RenderedSST2")


@pytest.mark.parametrize("paper", BUILT_IN)
def test_built_in_class_lists_follow_the_papers_names(paper: str, tmp_path: Path) -> None:
    miniature = next(each for each in MINIATURES.values() if each.make.__name__ == paper)
    miniature.write(tmp_path)
    names = open_miniature(miniature, tmp_path, "test").class_names
    in_words = [WORDS.get(name, name) for name in names]
    assert in_words == prompts_of(f"paper:{paper}", f"paper:{paper}", names).names
    assert paper == "EuroSAT" or in_words == prompt_names(paper)  # the package lists EuroSAT in another order


def test_gtsrbs_signs_follow_the_papers_names(tmp_path: Path) -> None:
    MINIATURES["gtsrb"].write(tmp_path)
    ours, papers = sets.GTSRB(str(tmp_path)).class_names, prompt_names("GTSRB")
    assert len(ours) == len(papers) == 43
    known = {0: ("20", "20 kph"), 6: ("end", "end"), 14: ("stop", "stop"), 17: ("no entry", "no entry")}
    known |= {25: ("works", "work"), 40: ("roundabout", "circle"), 42: ("trucks", "trucks")}
    for label, (our, theirs) in known.items():
        assert our in ours[label]
        assert theirs in papers[label]


def test_flowers_and_distances_have_the_papers_names(tmp_path: Path) -> None:
    """But for hyphens, spelling and the words around them."""
    for name in ("flowers102", "kitti"):
        MINIATURES[name].write(tmp_path)
    plain = [
        re.sub("[^a-z]", "", name.replace(" and ", " ").replace("air plant", "ball moss"))
        for name in prompt_names("Flowers102")
    ]
    assert [re.sub("[^a-z]", "", name) for name in sets.Flowers102(str(tmp_path)).class_names] == plain
    paper = [re.sub(r"^a photo i took (of|with) |my |\.$", "", name) for name in prompt_names("KITTI")]
    ours = [re.sub("the left", "left", name) for name in sets.KITTI(str(tmp_path)).class_names]
    assert ours == [re.sub("on left", "on left", name) for name in paper]
