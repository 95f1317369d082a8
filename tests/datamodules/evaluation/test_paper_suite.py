"""The suite file ``configs/evaluation/paper.yaml``: its sets, metrics and notes, and that it opens miniatures."""

import copy
from pathlib import Path

import pytest

from datamodules import evaluation as sets
from datamodules.evaluation.faces import FER_PLUS
from lit_clip.evaluation.data import ImageSet, MissingData
from lit_clip.evaluation.prompts import prompts_of
from lit_clip.evaluation.suite import SuiteEntry, read_suite
from tests.conftest import ROOT
from tests.helpers.coloured_sets import message_of, write_birdsnap, write_objectnet
from tests.helpers.miniatures import MINIATURES

pytestmark = pytest.mark.usefixtures("_mat_read_once")

SUITE = ROOT / "configs/evaluation/paper.yaml"


# The sets of the paper's table 9, in its order, and their metrics where they are not top-1 accuracy.
TABLE_9 = [
    "Food101",
    "CIFAR10",
    "CIFAR100",
    "Birdsnap",
    "SUN397",
    "StanfordCars",
    "FGVCAircraft",
    "VOC2007",
    "DTD",
    "OxfordPets",
    "Caltech101",
    "Flowers102",
    "MNIST",
    "FER2013",
    "STL10",
    "EuroSAT",
    "RESISC45",
    "GTSRB",
    "KITTI",
    "Country211",
    "PCam",
    "UCF101",
    "Kinetics700",
    "CLEVRCounts",
    "HatefulMemes",
    "RenderedSST2",
    "ImageNet",
]


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


@pytest.mark.parametrize("name", MINIATURES)
def test_suite_entries_open_the_miniatures(name: str, tmp_path: Path, suite: dict[str, SuiteEntry]) -> None:
    miniature, entry = MINIATURES[name], copy.deepcopy(suite[name])
    rows = miniature.write(tmp_path / entry.location)
    entry.data["init_args"].update(miniature.options)
    assert getattr(sets, entry.data["class_path"].removeprefix("datamodules.evaluation.")) is miniature.make
    for split, options in entry.splits.items():
        images = entry.open(split, 0, tmp_path)
        if name != "stl10":  # its folds are subsets
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
    tmp_path: Path, tars: Path, imagenet_v2: Path, resisc45: Path
) -> None:
    """The miniatures lie where the suite looks for them; the errors of all other sets say how to get them."""
    suite = read_suite(ROOT / "configs/evaluation/paper.yaml")
    data = tmp_path / "data"
    data.mkdir()
    tars.rename(data / "wds_mnist")
    (data / "imagenetv2").mkdir()
    (data / "imagenetv2" / imagenet_v2.name).symlink_to(imagenet_v2)
    (data / "resisc45").symlink_to(resisc45)
    write_birdsnap(data / "birdsnap")
    write_objectnet(data / "objectnet/objectnet-1.0")
    opened: dict[str, ImageSet] = {
        name: suite[name].open("test", 0, data)
        for name in ("wds_mnist", "imagenetv2", "resisc45", "birdsnap", "objectnet", "digits")
    }
    assert {name: len(images) for name, images in opened.items()} == {
        "wds_mnist": 7,
        "imagenetv2": 1000,
        "resisc45": 720,
        "birdsnap": 2,
        "objectnet": 2,
        "digits": 797,
    }
    missing = ["imagenet_a", "imagenet_r", "imagenet_sketch", "ayahoo", "sun", "hateful_memes", "wds_flickr30k"]
    for name in missing:
        message = message_of(lambda name=name: suite[name].open("test", 0, data), MissingData)
        assert suite[name].how_to_get
        assert suite[name].how_to_get in message
    wds = {name: entry for name, entry in suite.items() if name.startswith("wds_")}
    assert len(wds) == 41
    assert {name for name, entry in wds.items() if entry.tasks == ["retrieval"]} == {
        "wds_mscoco_captions",
        "wds_flickr8k",
        "wds_flickr30k",
    }
    for entry in wds.values():
        assert entry.data["init_args"]["root"].startswith("wds_")
        own = None if entry.tasks == ["zero_shot"] else ["{}"]  # None: the set has its own; captions are used unchanged
        assert (entry.class_names, entry.templates) == (None, own)
