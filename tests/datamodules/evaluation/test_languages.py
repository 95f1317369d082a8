"""Captions and class names in other languages, on miniatures in the authors' and CLIP_benchmark's files."""

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from datamodules.evaluation import XTD10, BabelImageNet, Crossmodal3600, ImageNet, TranslatedImageNet
from datamodules.evaluation.imagenet import imagenet_wnids
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.suite import read_suite
from tests.conftest import ROOT
from tests.helpers.coloured_sets import assert_same_after_pickling, colour, colour_of, message_of, paint

NAMES = ["COCO_train2014_000000000007.jpg", "COCO_val2014_000000000001.jpg", "COCO_val2014_000000000005.jpg"]


def write_xtd(root: Path) -> None:
    for folder, language in (("XTD10", "it"), ("MIC", "de"), ("STAIR", "jp")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        text = "".join(f"{language} {number}.\n" for number in range(3))
        (root / folder / f"test_1kcaptions_{language}.txt").write_text(text, encoding="utf-8")
    (root / "XTD10/test_image_names.txt").write_text("\n".join(NAMES))
    for number, name in enumerate(NAMES):
        paint(root / name.split("_")[1] / name, number)


def write_xm3600(root: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "image/key": f"key{number}",
            "image/locale": "de",
            "de": {"caption": [f"Hündchen {number}", "ein anderes"], "caption/tokenized": ["x"]},
            "ja": {"caption": [f"犬 {number}"]},
        }
        for number in (4, 2)
    ]
    (root / "captions.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for number in (4, 2):
        paint(root / f"images/key{number}.jpg", number)
    return root


def write_classes(root: Path, labels: tuple[int, ...] = (0, 2, 5, 999)) -> str:
    """Two validation images of each class, whose colours are their labels and label + 1."""
    for label in labels:
        for number in range(2):
            paint(root / "val" / imagenet_wnids()[label] / f"{number}.JPEG", label + number)
    return str(root)


def package_json(name: str) -> Any:
    package = importlib.util.find_spec("clip_benchmark")
    if package is None or not package.submodule_search_locations:
        pytest.skip("clip-benchmark is not installed")
    return json.loads((Path(package.submodule_search_locations[0]) / "datasets" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ["it", "de", "jp"])
def test_xtd_pairs_the_lines_of_its_two_files(tmp_path: Path, language: str) -> None:
    write_xtd(tmp_path)
    images = XTD10(str(tmp_path), language)
    assert [images.captions(index) for index in range(3)] == [[f"{language} {number}."] for number in range(3)]
    assert [colour_of(images, index) for index in range(3)] == [colour(index) for index in range(3)]
    assert images.stamp() == XTD10(str(tmp_path), "it").stamp()  # so that the languages share features
    assert pickle.loads(pickle.dumps(images)).stamp() == images.stamp()


def test_xtd_reads_images_from_one_folder_and_refuses_other_numbers_of_captions(tmp_path: Path) -> None:
    write_xtd(tmp_path)
    (tmp_path / "images").mkdir()
    for path in [*tmp_path.glob("*2014/*.jpg")]:
        path.rename(tmp_path / "images" / path.name)
    images = XTD10(str(tmp_path), "it")
    assert [colour_of(images, index) for index in range(3)] == [colour(index) for index in range(3)]
    with pytest.raises(MissingData, match="tr"):
        XTD10(str(tmp_path), "tr")
    (tmp_path / "MIC/test_1kcaptions_de.txt").write_text("eins\n")
    assert "1 captions for 3 images" in message_of(lambda: XTD10(str(tmp_path), "de"))
    for path in ("MIC/test_1kcaptions_de.txt", "XTD10/test_image_names.txt"):
        (tmp_path / path).write_text("")
    assert "0 captions for 0 images" in message_of(lambda: XTD10(str(tmp_path), "de"))


def test_crossmodal_uses_the_first_caption_as_clip_benchmark_does(tmp_path: Path) -> None:
    peer = pytest.importorskip("clip_benchmark.datasets.crossmodal3600")
    write_xm3600(tmp_path / "xm3600")  # a folder that CLIP_benchmark's reader does not download again
    peer.create_annotation_file(str(tmp_path), "de")
    path = tmp_path / "crossmodal3600_captions-de.json"
    theirs = peer.Crossmodal3600(root=str(tmp_path), ann_file=str(path))
    images = Crossmodal3600(str(tmp_path / "xm3600"), "de")
    assert len(images) == len(theirs) == 2
    for index in range(2):
        image, captions = theirs[index]
        assert images.captions(index) == captions
        assert images.images(index)[0].convert("RGB").tobytes() == image.tobytes()
    assert Crossmodal3600(str(tmp_path / "xm3600"), "ja").captions(0) == ["犬 4"]
    message = message_of(lambda: Crossmodal3600(str(tmp_path / "xm3600"), "xx"))
    assert "captions.jsonl" in message
    assert "xx" in message


@pytest.mark.parametrize("language", ["ar", "cn", "it", "jp"])
def test_translated_class_names_and_templates_are_clip_benchmarks(tmp_path: Path, language: str) -> None:
    images = TranslatedImageNet(write_classes(tmp_path), language)
    assert images.class_names == package_json(f"{language}_classnames.json")["imagenet1k"]
    templates = package_json(f"{language}_zeroshot_classification_templates.json")["imagenet1k"]
    assert [template.replace("{}", "{c}") for template in images.templates] == templates
    assert images.labels() == [0, 0, 2, 2, 5, 5, 999, 999]
    with pytest.raises(MissingData, match="xx_classnames"):
        TranslatedImageNet(str(tmp_path), "xx")


@pytest.mark.parametrize("language", ["DE", "JA", "LA"])
def test_babel_has_the_classes_with_a_name_in_the_order_of_its_file(tmp_path: Path, language: str) -> None:
    classes, names = package_json("babel_imagenet.json")[language]
    templates = package_json("nllb_dist13b_prompts.json").get(language, ["{}"])
    images = BabelImageNet(write_classes(tmp_path), language)
    assert images.class_names == names
    assert images.templates == templates
    labels = ImageNet(str(tmp_path)).labels()
    assert images.labels() == [classes.index(label) for label in labels if label in classes]
    assert images.rows == [row for row, label in enumerate(labels) if label in classes]
    assert_same_after_pickling(images)


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_babel_restricts_images_to_the_classes_of_the_users_own_file(tmp_path: Path) -> None:
    names = write_json(tmp_path / "names.json", {"XX": [[2, 999], ["zwei", "letzte"]]})
    prompts = write_json(tmp_path / "prompts.json", {"XX": ["Bild: {}"]})
    images = BabelImageNet(write_classes(tmp_path / "imagenet"), "XX", names, prompts)
    assert images.labels() == [0, 0, 1, 1]
    assert [colour_of(images, index) for index in range(4)] == [colour(number) for number in (2, 3, 999, 1000)]
    assert [images.key(index) for index in (0, 3)] == ["n01484850/0.JPEG", "n15075141/1.JPEG"]
    assert images.templates == ["Bild: {}"]
    other = write_json(tmp_path / "other.json", {"XX": [[0, 999], ["zwei", "letzte"]]})
    again = BabelImageNet(str(tmp_path / "imagenet"), "XX", other, prompts)
    assert again.labels() == images.labels()
    assert again.stamp() != images.stamp()  # other images, so other results


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ([[2, 1], ["a", "b"]], "ascending"),
        ([[1, 1000], ["a", "b"]], "at most 999"),
        ([[1, 2], ["a"]], "as many"),
        ([[1, "2"], ["a", "b"]], "a whole number"),
        ([[1, 2], ["a", 3]], "a text"),
        (3, "names.json"),
    ],
)
def test_a_damaged_list_of_names_is_an_error_that_names_the_file(tmp_path: Path, entry: Any, part: str) -> None:
    names = write_json(tmp_path / "names.json", {"XX": entry})
    message = message_of(lambda: BabelImageNet(write_classes(tmp_path), "XX", names))
    assert part in message
    assert "names.json" in message
    with pytest.raises(InputError, match="no 'YY'; it has XX"):
        BabelImageNet(str(tmp_path), "YY", names)


def test_suite_has_every_language_of_the_files() -> None:
    languages: dict[str, list[str]] = {}
    for entry in read_suite(ROOT / "configs/evaluation/languages.yaml").values():
        kind = entry.data["class_path"].rpartition(".")[2]
        languages.setdefault(kind, []).append(entry.data["init_args"]["language"])
    assert sorted(languages["BabelImageNet"]) == sorted(package_json("babel_imagenet.json"))
    crossmodal = pytest.importorskip("clip_benchmark.datasets.crossmodal3600")
    assert languages["Crossmodal3600"] == crossmodal.SUPPORTED_LANGUAGES
    assert sorted(languages["XTD10"]) == pytest.importorskip("clip_benchmark.datasets.xtd10").SUPPORTED_LANGUAGES
