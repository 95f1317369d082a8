"""The suite file ``configs/evaluation/paper.yaml``: its sets, metrics, notes, miniatures, and label order."""

import copy
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules import evaluation as sets
from datamodules.evaluation.faces import FER_PLUS
from lit_clip.evaluation.data import LabelledImages, MissingData
from lit_clip.evaluation.prompts import prompts_of
from lit_clip.evaluation.suite import SuiteEntry, read_suite
from tests.conftest import ROOT
from tests.evaluation.test_prompts import COUNTS
from tests.helpers.coloured_sets import message_of, paint, write_files, write_objectnet
from tests.helpers.miniature_images import structs, write_mat
from tests.helpers.miniatures import MINIATURES, open_miniature

pytestmark = pytest.mark.usefixtures("_mat_read_here")

SUITE = ROOT / "configs/evaluation/paper.yaml"


TABLE_9 = list(COUNTS)
OTHER_METRICS = {
    "FGVCAircraft": "mean_per_class",
    "OxfordPets": "mean_per_class",
    "Caltech101": "mean_per_class",
    "Flowers102": "mean_per_class",
    "VOC2007": "map11",
    "Kinetics700": "mean_top1_top5",
    "HatefulMemes": "roc_auc",
}


@pytest.fixture(scope="module")
def suite() -> dict[str, SuiteEntry]:
    return read_suite(SUITE)


def test_suite_has_the_27_sets_of_table_9_with_their_metrics_and_prompts(suite: dict[str, SuiteEntry]) -> None:
    entries = {entry.paper: entry for entry in suite.values() if entry.paper in TABLE_9}
    assert sorted(entries) == sorted(TABLE_9)
    assert {name: entry.metric for name, entry in entries.items()} == {
        name: OTHER_METRICS.get(name, "top1") for name in TABLE_9
    }
    for name, entry in entries.items():
        prompts = "imagenet" if name == "ImageNet" else f"paper:{name}"
        assert (entry.class_names, entry.templates) == (prompts, prompts)
        assert entry.how_to_get
        assert {"train", "test"} <= set(entry.splits)
        few = [] if name == "VOC2007" else ["few_shot"]  # not defined for images with several classes
        assert entry.tasks == ["zero_shot", "linear_probe", *few]
    assert len(entries["STL10"].folds) == 10
    assert len(entries["UCF101"].folds) == 3


def test_notes_contain_the_sizes_of_table_9(suite: dict[str, SuiteEntry]) -> None:
    """Notes give table 9's sizes too where a set differs from them, or where a split combines several."""
    notes = {entry.paper: entry.note for entry in suite.values()}
    sizes = {"Food101": "102", "SUN397": "19,850", "Caltech101": "6,085", "Country211": "43,200", "FER2013": "32,140"}
    sizes |= {"KITTI": "6,770", "PCam": "294,912", "RenderedSST2": "7,792", "UCF101": "1,794", "Kinetics700": "494,801"}
    assert all(size in notes[name] for name, size in sizes.items())


IN_SUITE = [name for name in read_suite(SUITE) if name in MINIATURES and "all" not in MINIATURES[name].rows]


@pytest.mark.parametrize("name", IN_SUITE)
def test_suite_entries_open_the_miniatures(name: str, tmp_path: Path, suite: dict[str, SuiteEntry]) -> None:
    miniature, entry = MINIATURES[name], copy.deepcopy(suite[name])
    rows = miniature.write(tmp_path / entry.location)
    entry.data["init_args"].update(miniature.options)
    assert getattr(sets, entry.data["class_path"].removeprefix("datamodules.evaluation.")) is miniature.make
    for split, options in entry.splits.items():
        images = entry.open(split, 0, tmp_path)
        if name != "stl10" and "class_path" not in options:  # its folds are subsets
            assert len(images) == len(rows[options["split"]])
    assert entry.how_to_get in message_of(lambda: entry.open("test", 0, tmp_path / "nowhere"), MissingData)


def test_fer_plus_has_the_papers_names_of_fer2013_in_its_own_label_order(suite: dict[str, SuiteEntry]) -> None:
    entry = suite["fer_plus"]
    prompts = prompts_of(entry.class_names, entry.templates, list(FER_PLUS))
    papers = prompts_of("paper:FER2013", "paper:FER2013", list(FER_PLUS[:-1]))
    assert prompts.names == list(FER_PLUS)
    assert prompts.texts[:-1] == papers.texts
    assert len(prompts.texts[-1]) == len(papers.texts[0])


def test_suite_opens_present_sets_and_says_how_to_get_missing_ones(
    tmp_path: Path, tars: Path, imagenet_v2: Path, resisc45: Path, suite: dict[str, SuiteEntry]
) -> None:
    """The miniatures lie where the suite looks for them; the errors of all other sets say how to get them."""
    data = tmp_path / "data"
    (data / "imagenetv2").mkdir(parents=True)
    tars.rename(data / "wds_mnist")
    (data / "imagenetv2" / imagenet_v2.name).symlink_to(imagenet_v2)
    (data / "resisc45").symlink_to(resisc45)
    MINIATURES["birdsnap"].write(data / "birdsnap")
    write_objectnet(data / "objectnet/objectnet-1.0")
    sizes = {"wds_mnist": 7, "imagenetv2": 1000, "resisc45": 720, "birdsnap": 2, "objectnet": 2, "digits": 797}
    assert {name: len(suite[name].open("test", 0, data)) for name in sizes} == sizes
    for name in ("imagenet_a", "imagenet_r", "imagenet_sketch", "ayahoo", "sun", "hateful_memes", "wds_flickr30k"):
        assert suite[name].how_to_get
        assert suite[name].how_to_get in message_of(lambda name=name: suite[name].open("test", 0, data), MissingData)
    wds = {name: entry for name, entry in suite.items() if name.startswith("wds_")}
    assert len(wds) == 41
    captioned = {"wds_mscoco_captions", "wds_flickr8k", "wds_flickr30k"}
    assert {name for name, entry in wds.items() if entry.tasks == ["retrieval"]} == captioned
    for entry in wds.values():
        assert entry.data["init_args"]["root"].startswith("wds_")
        own = None if entry.tasks == ["zero_shot"] else ["{}"]  # None: the set has its own; captions are used unchanged
        assert (entry.class_names, entry.templates) == (None, own)


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
    images = "\n".join(f"{path}/sun_a.jpg" for path in paths)
    write_files(root / "SUN397", {"ClassName.txt": "\n".join(paths), "Testing_01.txt": images, f"{paths[0][1:]}/a": ""})


def write_pets(root: Path, names: list[str]) -> None:
    lines = [f"{name.replace(' ', '_')}_1 {i} 1 1" for i, name in enumerate(names, 1)]
    write_files(root / "oxford-iiit-pet", {"annotations/test.txt": "\n".join(lines), "images/a": ""})


def write_aircraft(root: Path, names: list[str]) -> None:
    images = "\n".join(f"{i:07} {name}" for i, name in enumerate(names))
    files = {"variants.txt": "\n".join(names), "images_variant_test.txt": images, "images/a": ""}
    write_files(root / "fgvc-aircraft-2013b/data", files)


def write_food(root: Path, names: list[str]) -> None:
    dishes = {name.replace(" ", "_"): [f"{name.replace(' ', '_')}/1"] for name in names}
    write_files(root / "food-101", {"meta/test.json": dishes, "images/apple_pie/a": ""})


def write_textures(root: Path, names: list[str]) -> None:
    images = "\n".join(f"{name}/{name}_0001.jpg" for name in names)
    write_files(root / "dtd", {"labels/test1.txt": images, **{f"images/{name}/a": "" for name in names}})


def write_cars(root: Path, names: list[str]) -> None:
    """The file of classes has them in the paper's order; the list of images in another."""
    folder = root / "stanford_cars"
    write_mat(folder / "devkit/cars_meta.mat", class_names=np.array([names[::-1]], dtype=object))
    cars = structs(*({"class": len(names) - i, "fname": f"{i:05}.jpg"} for i in range(len(names))))
    write_mat(folder / "cars_test_annos_withlabels.mat", annotations=cars)
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
