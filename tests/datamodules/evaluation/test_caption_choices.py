"""Images with right and wrong captions, and captions and class names in other languages, on miniatures."""

import csv
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.evaluation import (
    MMVPVLM,
    XTD10,
    AROOrder,
    AROVisualGenome,
    BabelImageNet,
    Crossmodal3600,
    ImageNet,
    SugarCrepe,
    TranslatedImageNet,
    WinoGAViL,
    Winoground,
)
from datamodules.evaluation.caption_choices import SYMMETRIC
from datamodules.evaluation.imagenet import imagenet_wnids
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.suite import read_suite
from tests.conftest import ROOT
from tests.helpers.coloured_sets import assert_same_after_pickling, colour, colour_of, message_of, paint, write_files


def write_json(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_sugar_crepe(root: Path, subset: str = "swap_att") -> str:
    """Keys are not contiguous, and an image has two questions, as in the real files."""
    rows = {
        key: {"filename": f"{image:012}.jpg", "caption": f"right {key}", "negative_caption": f"wrong {key}"}
        for key, image in (("0", 5), ("3", 2), ("7", 5))
    }
    images = {f"val2017/{number:012}.jpg": number for number in (2, 5)}
    return str(write_files(root, {**images, f"{subset}.json": rows}) / f"{subset}.json")


def write_aro(root: Path) -> None:
    paint(root / "images/1.jpg", 1)
    Image.new("RGB", (20, 10), (9, 9, 9)).save(root / "images/2.jpg", format="PNG")
    box = {"bbox_x": 1, "bbox_y": 2, "bbox_w": 7, "bbox_h": 5}
    images = [("1.jpg", {**box, "bbox_x": 0, "bbox_y": 0, "bbox_w": 4, "bbox_h": 3}), ("2.jpg", box), ("2.jpg", box)]
    relations = ["on", "near", "under"]
    texts = [{"true_caption": f"right {i}", "false_caption": f"wrong {i}"} for i in range(3)]
    relation = [
        {"image_path": name, **region, **text, "relation_name": kind}
        for (name, region), text, kind in zip(images, texts, relations, strict=True)
    ]
    pairs = [["open", "white"]] * 25 + [["big", "red"]] * 24
    attribution = [{"image_path": "1.jpg", **box, **texts[0], "attributes": pair} for pair in pairs]
    write_files(root, {"visual_genome_relation.json": relation, "visual_genome_attribution.json": attribution})


def write_mmvp(root: Path, rows: list[list[str]] | None = None) -> None:
    rows = rows or [["1", "Texts", "one"], ["2", "Texts", "two"], ["3", "State", "on"], ["4", "State", "off, now"]]
    for number in range(1, 5):
        paint(root / f"MLLM_VLM Images/{'Texts' if number < 3 else 'State'}/{number}.jpg", number)
    with (root / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["Question ID", "Type", "Statement"], *rows])


def write_winoground(root: Path) -> None:
    rows = [
        {"id": n, "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1", "collapsed_tag": "Object"}
        | {"caption_0": f"some plants surrounding lightbulb {n}", "caption_1": f"a lightbulb surrounding plants {n}"}
        for n in range(2)
    ]
    images = {f"data/images/ex_{number // 2}_img_{number % 2}.png": number for number in range(4)}
    write_files(root, {**images, "data/examples.jsonl": rows})


def write_winogavil(root: Path) -> None:
    few, many = ["eagle", "teepee", "tea party", "metal", "ash"], [f"thing {i}" for i in range(9)] + ["ash"]
    rows = [("Bald", few, ["ash", "eagle"]), ("apple", few, ["metal"]), ("dark", many, ["ash", "thing 3"])]
    for number, name in enumerate(dict.fromkeys(few + many)):
        paint(root / f"winogavil_images/{name}.jpg", number)
    with (root / "winogavil_dataset.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "candidates", "cue", "associations", "ID"])
        for number, (cue, candidates, right) in enumerate(rows):
            writer.writerow([number, json.dumps(candidates), cue, json.dumps(right), number])


def test_sugar_crepe_equals_clip_benchmarks_reader(tmp_path: Path) -> None:
    path = write_sugar_crepe(tmp_path)
    peer = pytest.importorskip("clip_benchmark.datasets.sugar_crepe").SugarCrepe(tmp_path / "val2017", path)
    images = SugarCrepe(str(tmp_path), "swap_att")
    assert len(images) == 2  # each image is encoded once
    assert len(images.choices()) == len(peer) == 3
    for choice, (image, captions) in zip(images.choices(), peer, strict=True):
        assert list(choice.captions) == captions
        assert images.images(choice.images[0])[0].tobytes() == image.tobytes()
    again = pickle.loads(pickle.dumps(images))
    assert (again.stamp(), again.choices()) == (images.stamp(), images.choices())


def test_visual_genome_questions_are_about_regions_and_grouped_as_in_the_authors_notebook(tmp_path: Path) -> None:
    write_aro(tmp_path)
    images = AROVisualGenome(str(tmp_path), "relation")
    assert [choice.group for choice in images.choices()] == ["on", "", "under"]  # "near" is symmetric
    assert [choice.captions for choice in images.choices()] == [(f"right {i}", f"wrong {i}") for i in range(3)]
    assert [choice.images for choice in images.choices()] == [(0,), (1,), (1,)]
    assert images.images(1)[0].size == (7, 5)
    assert (images.images(0)[0].size, colour_of(images, 0)) == ((4, 3), colour(1))
    before = images.stamp()
    groups = [choice.group for choice in AROVisualGenome(str(tmp_path), "attribution").choices()]
    assert groups == ["open_white"] * 25 + [""] * 24
    rows = json.loads((tmp_path / "visual_genome_relation.json").read_text())
    rows[0]["bbox_w"] = 3
    write_files(tmp_path, {"visual_genome_relation.json": rows})
    assert AROVisualGenome(str(tmp_path), "relation").stamp() != before
    assert len(set(SYMMETRIC.read_text().splitlines())) == 157


def test_orders_start_with_the_right_caption_and_an_equal_order_is_no_alternative(tmp_path: Path) -> None:
    paint(tmp_path / "coco/val2014/1.jpg", 1)
    options = ["a cat on a mat", "a mat on a cat", "a cat on a mat", "on a cat a mat", "a mat on a cat"]
    write_files(tmp_path, {"order.json": [{"image": "val2014/1.jpg", "caption_options": options}] * 2})
    images = AROOrder(str(tmp_path / "order.json"), str(tmp_path / "coco"))
    assert [choice.captions for choice in images.choices()] == [(options[0], options[1], options[3], options[4])] * 2
    assert (len(images), colour_of(images, 0)) == (1, colour(1))


def test_mmvp_rows_are_pairs(tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    images = MMVPVLM(str(tmp_path))
    assert [choice.captions for choice in images.choices()] == [("one", "two"), ("on", "off, now")]
    assert [choice.group for choice in images.choices()] == ["Texts", "State"]
    assert [colour_of(images, row) for row in images.choices()[1].images] == [colour(3), colour(4)]


def test_winoground_pairs_images_and_captions_by_number(tmp_path: Path) -> None:
    write_winoground(tmp_path)
    images = Winoground(str(tmp_path))
    assert [choice.images for choice in images.choices()] == [(0, 1), (2, 3)]
    assert images.choices()[1].captions[1] == "a lightbulb surrounding plants 1"
    assert images.choices()[0].group == "Object"
    assert [colour_of(images, row) for row in range(4)] == [colour(row) for row in range(4)]


def test_winogavil_puts_associations_first_and_the_cue_after_an_article(tmp_path: Path) -> None:
    write_winogavil(tmp_path)
    images = WinoGAViL(str(tmp_path))
    named = [([images.key(row) for row in choice.images], choice.right) for choice in images.choices()]
    assert named[0] == (["eagle.jpg", "ash.jpg", "teepee.jpg", "tea party.jpg", "metal.jpg"], 2)
    assert [choice.captions for choice in images.choices()] == [("A bald",), ("An apple",), ("A dark",)]
    assert (named[1][1], len(named[2][0])) == (1, 10)
    assert [len(WinoGAViL(str(tmp_path), part).choices()) for part in ("5-6", "10-12")] == [2, 1]
    assert len(WinoGAViL(str(tmp_path), "10-12")) == 10  # only the images of its questions


SETS: dict[str, tuple[Callable[[Path], Any], Callable[[str], Any], str]] = {
    "crepe": (write_sugar_crepe, lambda root: SugarCrepe(root, "swap_att"), "swap_att.json"),
    "relation": (write_aro, lambda root: AROVisualGenome(root, "relation"), "visual_genome_relation.json"),
    "attribution": (write_aro, lambda root: AROVisualGenome(root, "attribution"), "visual_genome_attribution.json"),
    "mmvp": (write_mmvp, MMVPVLM, "Questions.csv"),
    "winoground": (write_winoground, Winoground, "data/examples.jsonl"),
    "winogavil": (write_winogavil, WinoGAViL, "winogavil_dataset.csv"),
}


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("crepe", lambda text: text.replace("negative_caption", "negative"), ("json row 0", "negative_caption")),
        ("crepe", lambda text: "{}", ("no questions",)),
        ("crepe", lambda text: "3", ("or a list",)),
        ("relation", lambda text: text.replace('"bbox_h": 5', '"bbox_h": "5"'), ("row 1", "bbox_h")),
        ("relation", lambda text: text.replace('"bbox_h": 5', f'"bbox_h": {"9" * 400}'), ("row 1", "bbox_h")),
        ("attribution", lambda text: text.replace('"open", ', ""), ("row 0", "attributes")),
        ("mmvp", lambda text: text.replace("\n2,", "\n5,"), ("'1'",)),
        ("mmvp", lambda text: text.replace("4,State", "4;State"), ("csv row 3",)),
        ("mmvp", lambda text: text.replace(",one", ", "), ("csv row 0",)),
        ("mmvp", lambda text: text[: text.index("4,State")], ("'3'",)),
        ("winoground", lambda text: text.replace("caption_1", "c1", 1), ("line 1", "caption_1")),
        ("winoground", lambda text: text[:-9], ("JSON text in line 2",)),
        ("winogavil", lambda text: text.replace('[""metal""]', '[""iron""]'), ("row 1", "0 of 5")),
        ("winogavil", lambda text: text.replace('[""metal', "[metal"), ("associations of row 1",)),
    ],
)
def test_damaged_files_are_errors_that_name_the_row(
    tmp_path: Path, name: str, change: Callable[[str], str], parts: tuple[str, ...]
) -> None:
    write, make, file = SETS[name]
    write(tmp_path)
    make(str(tmp_path))
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert change(text) != text
    (tmp_path / file).write_text(change(text), encoding="utf-8")
    message = message_of(lambda: make(str(tmp_path)))
    for part in (str(tmp_path / file), *parts):
        assert part in message


def test_an_absent_file_or_folder_of_images_is_missing_data(tmp_path: Path) -> None:
    assert "swap_att" in message_of(lambda: SugarCrepe(str(tmp_path), "swap_att"), MissingData)
    write_winoground(tmp_path)
    (tmp_path / "data/images").rename(tmp_path / "elsewhere")
    assert "images" in message_of(lambda: Winoground(str(tmp_path)), MissingData)
    write_files(tmp_path, {"order.json": [{"image": "val2014/1.jpg", "caption_options": []}]})
    assert "caption_options" in message_of(lambda: AROOrder(str(tmp_path / "order.json"), str(tmp_path)))


NAMES = ["COCO_train2014_000000000007.jpg", "COCO_val2014_000000000001.jpg", "COCO_val2014_000000000005.jpg"]


def write_xtd(root: Path) -> None:
    files: dict[str, Any] = {f"{name.split('_')[1]}/{name}": number for number, name in enumerate(NAMES)}
    for folder, language in (("XTD10", "it"), ("MIC", "de"), ("STAIR", "jp")):
        files[f"{folder}/test_1kcaptions_{language}.txt"] = "".join(f"{language} {number}.\n" for number in range(3))
    write_files(root, {**files, "XTD10/test_image_names.txt": "\n".join(NAMES)})


def write_xm3600(root: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "image/key": f"key{number}",
            "de": {"caption": [f"Hündchen {number}", "ein anderes"], "caption/tokenized": ["x"]},
            "ja": {"caption": [f"犬 {number}"]},
        }
        for number in (4, 2)
    ]
    return write_files(root, {"captions.jsonl": rows, "images/key4.jpg": 4, "images/key2.jpg": 2})


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
    assert "tr" in message_of(lambda: XTD10(str(tmp_path), "tr"), MissingData)
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
    assert all(part in message for part in ("captions.jsonl", "xx"))


@pytest.mark.parametrize("language", ["ar", "cn", "it", "jp"])
def test_translated_class_names_and_templates_are_clip_benchmarks(tmp_path: Path, language: str) -> None:
    images = TranslatedImageNet(write_classes(tmp_path), language)
    assert images.class_names == package_json(f"{language}_classnames.json")["imagenet1k"]
    templates = package_json(f"{language}_zeroshot_classification_templates.json")["imagenet1k"]
    assert [template.replace("{}", "{c}") for template in images.templates] == templates
    assert images.labels() == [0, 0, 2, 2, 5, 5, 999, 999]
    assert "xx_classnames" in message_of(lambda: TranslatedImageNet(str(tmp_path), "xx"), MissingData)


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


def test_babel_restricts_images_to_the_classes_of_the_users_own_file(tmp_path: Path) -> None:
    files = {"names.json": {"XX": [[2, 999], ["zwei", "letzte"]]}, "prompts.json": {"XX": ["Bild: {}"]}}
    write_files(tmp_path, {**files, "other.json": {"XX": [[0, 999], ["zwei", "letzte"]]}})
    names, prompts, other = (str(tmp_path / f"{name}.json") for name in ("names", "prompts", "other"))
    images = BabelImageNet(write_classes(tmp_path / "imagenet"), "XX", names, prompts)
    assert images.labels() == [0, 0, 1, 1]
    assert [colour_of(images, index) for index in range(4)] == [colour(number) for number in (2, 3, 999, 1000)]
    assert [images.key(index) for index in (0, 3)] == ["n01484850/0.JPEG", "n15075141/1.JPEG"]
    assert images.templates == ["Bild: {}"]
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
    names = str(write_files(tmp_path, {"names.json": {"XX": entry}}) / "names.json")
    message = message_of(lambda: BabelImageNet(write_classes(tmp_path), "XX", names))
    assert all(each in message for each in (part, "names.json"))
    assert "no 'YY'; it has XX" in message_of(lambda: BabelImageNet(str(tmp_path), "YY", names))


def test_suite_has_every_language_of_the_files() -> None:
    languages: dict[str, list[str]] = {}
    for entry in read_suite(ROOT / "configs/evaluation/languages.yaml").values():
        kind = entry.data["class_path"].rpartition(".")[2]
        languages.setdefault(kind, []).append(entry.data["init_args"]["language"])
    assert sorted(languages["BabelImageNet"]) == sorted(package_json("babel_imagenet.json"))
    crossmodal = pytest.importorskip("clip_benchmark.datasets.crossmodal3600")
    assert languages["Crossmodal3600"] == crossmodal.SUPPORTED_LANGUAGES
    assert sorted(languages["XTD10"]) == pytest.importorskip("clip_benchmark.datasets.xtd10").SUPPORTED_LANGUAGES
