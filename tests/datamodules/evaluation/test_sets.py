"""Sets that torchvision has, on miniatures of their owners' files, and in the layouts of Kaggle, Zenodo and the hub."""

import csv
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader

from datamodules import evaluation as sets
from datamodules.evaluation.imagenet import imagenet_wnids
from lit_clip.errors import InputError
from lit_clip.evaluation.data import CaptionedImages, LabelledImages, MissingData
from tests.helpers.coloured_sets import message_of, paint, paint_shade, shade, write_files, write_tar
from tests.helpers.miniature_arrays import FACES, USAGES, write_fer2013
from tests.helpers.miniature_images import Row, Rows, encodes, pixels, write_mat, write_text
from tests.helpers.miniatures import MINIATURES, VOC_OBJECTS, open_miniature

pytestmark = pytest.mark.usefixtures("_mat_read_here")


def check_rows(images: LabelledImages, rows: list[Row]) -> None:
    assert [(images.key(i), label) for i, label in enumerate(images.labels())] == [row[:2] for row in rows]
    assert len(images) == len(rows)
    assert images.labels() == [images[i][1] for i in range(len(images))]
    assert all(encodes(images.images(i)[0], row.number) for i, row in enumerate(rows))


@pytest.mark.parametrize("name", MINIATURES)
def test_splits_have_their_images_labels_and_keys(name: str, tmp_path: Path) -> None:
    """Also in a data worker, without the pixels, and read from the files alone that results.json lists."""
    miniature, root, stamps = MINIATURES[name], tmp_path / "whole", set()
    splits = miniature.write(root)
    for split, rows in splits.items():
        images = open_miniature(miniature, root, split)
        check_rows(images, rows)
        names = miniature.names if isinstance(miniature.names, dict) else dict(enumerate(miniature.names))
        assert {label: images.class_names[label] for label in names} == names
        assert isinstance(miniature.names, dict) or len(images.class_names) == len(names)
        stamps.add(images.stamp())
        pickled = pickle.dumps(images)
        assert len(pickled) < 20_000 + 300 * len(images)
        copy = pickle.loads(pickled)
        check_rows(copy, rows)
        assert (copy.class_names, copy.stamp()) == (images.class_names, images.stamp())
        assert str(copy.truth) == str(images.truth)
        for path in {*images.annotation_paths, *images.image_paths()} if not miniature.drawn else ():
            target = tmp_path / split / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        if not miniature.drawn:
            check_rows(open_miniature(miniature, tmp_path / split, split), rows)
    last = open_miniature(miniature, root, list(splits)[-1])
    assert {name: getattr(last.truth, name) for name in miniature.truth} == miniature.truth
    assert len(stamps) == len(splits)
    for path in open_miniature(miniature, root, list(splits)[0]).image_paths():
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert open_miniature(miniature, root, list(splits)[0]).stamp() not in stamps


@pytest.mark.parametrize("name", MINIATURES)
def test_missing_or_damaged_file_is_an_error_naming_it(name: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name]
    split, rows = next(iter(miniature.write(tmp_path).items()))
    assert "nowhere" in message_of(lambda: open_miniature(miniature, tmp_path / "nowhere", split), MissingData)
    images = open_miniature(miniature, tmp_path, split)
    path = images.image_paths()[0]
    if path.name == Path(rows[0].key).name:
        path.write_bytes(b"\xff\xd8\xff not an image")
        assert path.name in message_of(lambda: images[0])
        assert len(rows) == 1 or encodes(images[1][0], rows[1].number)
    if miniature.pixels and name != "fer2013":
        path = tmp_path / miniature.pixels
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert path.name in message_of(lambda: open_miniature(miniature, tmp_path, "test")[0])
        path.write_bytes(whole)
    if miniature.index:
        path = tmp_path / miniature.index
        path.write_bytes(b"<html>404: not found</html>\n")
        assert path.name in message_of(lambda: open_miniature(miniature, tmp_path, "test"))


MISTAKES = [(name, file) for name, miniature in MINIATURES.items() for file in miniature.mistakes]


@pytest.mark.parametrize(("name", "file"), MISTAKES)
def test_mistake_in_a_file_is_an_error_that_says_what_is_wrong(name: str, file: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name]
    content, words = miniature.mistakes[file]
    splits = miniature.write(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        write_files(tmp_path, {file: content})
    kind = MissingData if content is None and not file.endswith(".jpg") else InputError
    assert words in message_of(lambda: [open_miniature(miniature, tmp_path, split) for split in splits], kind)


@pytest.mark.parametrize("name", [name for name, m in MINIATURES.items() if m.torchvision])
def test_torchvision_reads_the_same_images_and_classes(name: str, tmp_path: Path) -> None:
    miniature = MINIATURES[name]
    theirs_class = getattr(torchvision.datasets, miniature.torchvision)
    for split in miniature.write(tmp_path):
        ours, theirs = open_miniature(miniature, tmp_path, split), theirs_class(str(tmp_path), split=split)
        pairs = sorted(
            (image.convert("RGB").tobytes(), label) for image, label in (theirs[i] for i in range(len(theirs)))
        )
        found = sorted((ours[i][0].convert("RGB").tobytes(), ours[i][1]) for i in range(len(ours)))
        assert [image for image, _ in found] == [image for image, _ in pairs]
        renamed = dict(zip([label for _, label in found], [label for _, label in pairs], strict=True))
        assert [(image, renamed[label]) for image, label in found] == pairs  # their label order may differ
        names = getattr(theirs, "classes", None)
        if names is not None:
            words = {label: str(name).replace("_", " ").lower() for label, name in enumerate(names)}
            assert all(ours.class_names[label].lower() == words[other] for label, other in renamed.items())


def test_voc2007_marks_present_absent_and_difficult_classes(tmp_path: Path) -> None:
    """A class with only difficult objects is not counted; torchvision's annotations are the reference."""
    rows = MINIATURES["voc2007"].write(tmp_path)
    for split in rows:
        images = sets.VOC2007(str(tmp_path), split)  # pyright: ignore[reportArgumentType]
        assert images.labels() == [-1] * len(rows[split])
        relevance = images.truth.relevance
        assert relevance is not None
        assert relevance.dtype == torch.int8
        theirs = torchvision.datasets.VOCDetection(str(tmp_path), year="2007", image_set=split)
        for i, row in enumerate(rows[split]):
            assert encodes(theirs[i][0], row.number)
            expected = [0] * 20
            for thing in theirs[i][1]["annotation"]["object"]:
                label = images.class_names.index(thing["name"])
                expected[label] = max(expected[label], 2 if thing["difficult"] == "0" else 1)
            assert relevance[i].tolist() == [{0: 0, 1: -1, 2: 1}[value] for value in expected]
    assert (sets.VOC2007(str(tmp_path), "train").truth.relevance == -1).sum() == 0
    assert (sets.VOC2007(str(tmp_path), "test").truth.relevance == -1).sum() == 1
    assert VOC_OBJECTS["000001"] == ["dog", "tvmonitor*"]


def test_stl10_folds_are_read_from_its_file_and_share_the_test_images(tmp_path: Path) -> None:
    rows = MINIATURES["stl10"].write(tmp_path)
    stamps = set()
    for fold in range(10):
        images = sets.STL10(str(tmp_path), "train", fold)
        check_rows(images, [rows["train"][fold % 4], rows["train"][(fold + 2) % 4]])
        assert sets.STL10(str(tmp_path), "test", fold).stamp() == sets.STL10(str(tmp_path), "test").stamp()
        stamps.add(images.stamp())
    assert len(stamps) == 4
    message = message_of(lambda: sets.STL10(str(tmp_path), "train", 10))
    assert "fold_indices.txt" in message
    assert "between 0 and 9" in message


@pytest.mark.parametrize("name", [name for name, m in MINIATURES.items() if m.pixels])
def test_forked_worker_opens_the_pixel_file_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 handles and file positions must not be shared by a forked process and its parent."""
    miniature = MINIATURES[name]
    split = "test" if name == "fer_plus" else "train"  # with two images
    rows = miniature.write(tmp_path)[split]
    images: Any = open_miniature(miniature, tmp_path, split)
    original = images._open_pixels

    def watched() -> Any:
        (tmp_path / f"opened by {os.getpid()}").touch()
        return original()

    monkeypatch.setattr(images, "_open_pixels", watched)
    assert encodes(images[1][0], rows[1].number)
    loader = DataLoader(images, batch_size=1, num_workers=1, collate_fn=list, multiprocessing_context="fork")
    for row, ((image, _),) in zip(rows, loader, strict=True):
        assert encodes(image, row.number)
        assert encodes(images[0][0], rows[0].number)
    assert len(list(tmp_path.glob("opened by *"))) == 2


def test_fer2013_also_reads_icml_face_data_csv(tmp_path: Path) -> None:
    rows = FACES
    write_fer2013(tmp_path, rows, "icml_face_data.csv")
    for split in ("train", "val", "test"):
        images = sets.FER2013(str(tmp_path), split)
        check_rows(images, rows[split])


def test_fer2013_face_with_too_few_pixels_is_an_error_naming_the_row(tmp_path: Path) -> None:
    write_fer2013(tmp_path, FACES)
    path = tmp_path / "fer2013/fer2013.csv"
    lines = path.read_text().splitlines()
    lines[4] = "1,7 7 7,PrivateTest"
    path.write_text("\n".join(lines))
    images = sets.FER2013(str(tmp_path))
    message = message_of(lambda: images[0])
    assert "fer2013.csv" in message
    assert "row 3" in message
    assert images[1][0].size == (48, 48)


def test_eurosat_splits_are_thirds_of_the_sampled_images(tmp_path: Path) -> None:
    folder = tmp_path / "eurosat/2750"
    for name in ("Forest", "PermanentCrop", "Residential", "River", "Pasture", "SeaLake", "HerbaceousVegetation"):
        paint(folder / name / f"{name}_1.jpg", 1)
    for name in ("AnnualCrop", "Industrial", "Highway"):
        paint(folder / name / f"{name}_1.jpg", 1)
    message = message_of(lambda: sets.EuroSAT(str(tmp_path)))
    assert "AnnualCrop: 1 images, not 1500" in message  # 500 a split: train and val together are table 9's 10,000
    for folder in (tmp_path / "eurosat/2750").iterdir():
        for number in range(40):
            (folder / f"{folder.name}_{number + 1}.jpg").touch()
    splits = {split: sets.EuroSAT(str(tmp_path), split, 30) for split in ("train", "val", "test")}
    counts = {split: np.bincount(images.labels()).tolist() for split, images in splits.items()}
    assert counts == dict.fromkeys(splits, [10] * 10)
    keys = {split: [images.key(i) for i in range(len(images))] for split, images in splits.items()}
    assert len({key for some in keys.values() for key in some}) == 300
    other = sets.EuroSAT(str(tmp_path), "train", 30, seed=1)
    assert [other.key(i) for i in range(len(other))] != keys["train"]


OTHER_PLACES = [  # a set, where its miniature lies, and where it is moved to
    ("eurosat", "eurosat/2750", "EuroSAT_RGB"),  # Zenodo 7711810
    ("eurosat", "eurosat/2750", "2750"),
    ("eurosat", "eurosat/2750", "."),
    ("dtd", "dtd/dtd", "dtd"),
    ("dtd", "dtd/dtd", "."),
    ("oxford_pets", "oxford-iiit-pet", "."),
    ("caltech101", "caltech101", "caltech-101"),
    ("caltech101", "caltech101", "."),
    ("fer2013", "fer2013", "."),
    ("fer_plus", "fer2013", "."),
    ("imagenet", "val", "validation"),
    ("imagenet", "val", "ILSVRC/Data/CLS-LOC/val"),
]


def move(root: Path, source: str, target: str) -> None:
    """Move a folder, or its content into ``root`` itself."""
    apart = root.with_name("apart")
    (root / source).rename(apart)
    if target == ".":
        for path in apart.iterdir():
            path.rename(root / path.name)
    else:
        shutil.rmtree(root / Path(source).parts[0], ignore_errors=True)
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        apart.rename(root / target)


def content(images: LabelledImages) -> list[tuple[str, int, bytes]]:
    return [(images.key(i), label, images[i][0].tobytes()) for i, label in enumerate(images.labels())]


@pytest.mark.parametrize(("name", "source", "target"), OTHER_PLACES)
def test_set_in_another_place_has_the_same_keys_labels_and_images(
    name: str, source: str, target: str, tmp_path: Path
) -> None:
    miniature, root = MINIATURES[name], tmp_path / "root"
    splits = [split for split in miniature.write(root) if (root / split).is_dir() or name != "imagenet"]
    expected = {split: content(open_miniature(miniature, root, split)) for split in splits}
    names = open_miniature(miniature, root, splits[-1]).class_names
    move(root, source, target)
    for split in ["val"] if name == "imagenet" else splits:
        images = open_miniature(miniature, root, split)
        assert content(images) == expected[split]
        assert images.class_names == names
        assert all(path.is_file() for path in [*images.image_paths(), *images.annotation_paths])
    if target != ".":
        (root / Path(target).parts[0]).rename(root / "elsewhere")
        message = message_of(lambda: open_miniature(miniature, root, splits[-1]), MissingData)
        assert target in message


def write_flat_validation(root: Path, folder: str) -> list[str]:
    """Write the validation images as the archive has them and return the class of each, in the order of names."""
    wnids = ["n15075141", "n01440764", "n01484850", "n01440764"]
    for number in range(len(wnids)):
        paint(root / folder / f"ILSVRC2012_val_{number + 1:08}.JPEG", number)
    return wnids


def write_devkit(root: Path, wnids: list[str]) -> None:
    numbers = {wnid: number for number, wnid in enumerate(sorted(set(wnids)), start=7)}
    synsets = np.zeros((len(numbers), 1), dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    for row, (wnid, number) in enumerate(numbers.items()):
        synsets[row, 0] = (number, wnid)
    data = root / "ILSVRC2012_devkit_t12/data"
    write_mat(data / "meta.mat", synsets=synsets)
    write_text(data / "ILSVRC2012_validation_ground_truth.txt", "".join(f"{numbers[wnid]}\n" for wnid in wnids))


def write_solution(root: Path, wnids: list[str]) -> Path:
    """Write Kaggle's labels, which are in no order and may list several boxes."""
    rows = [(f"ILSVRC2012_val_{n + 1:08}", f"{wnid} 1 2 30 40 " * (1 + n % 2)) for n, wnid in enumerate(wnids)]
    path = root / "LOC_val_solution.csv"
    lines = "".join(f"{name},{boxes}\n" for name, boxes in reversed(rows))
    write_text(path, f"ImageId,PredictionString\n{lines}")
    return path


@pytest.mark.parametrize("folder", ["ILSVRC/Data/CLS-LOC/val", "val"])
@pytest.mark.parametrize("labels", ["meta.bin", "devkit", "LOC_val_solution.csv"])
def test_imagenets_validation_images_may_lie_in_one_folder(labels: str, folder: str, tmp_path: Path) -> None:
    """As in the archive and at Kaggle: images sorted by name match torchvision's, the kit's and Kaggle's labels."""
    wnids = write_flat_validation(tmp_path, folder)
    if labels == "meta.bin":
        torch.save(({"n01440764": ("tench",)}, wnids), tmp_path / "meta.bin")
    elif labels == "devkit":
        write_devkit(tmp_path, wnids)
    else:
        write_solution(tmp_path, wnids)
    images = sets.ImageNet(str(tmp_path))
    assert [imagenet_wnids()[label] for label in images.labels()] == wnids
    assert images.class_names[images.labels()[0]] == "toilet paper"
    assert all(encodes(images[i][0], i) for i in range(len(wnids)))
    assert all(labels in path.as_posix() for path in images.annotation_paths)
    paint(tmp_path / folder / "ILSVRC2012_val_00000009.JPEG", 9)
    wrong = "ILSVRC2012_val_00000009.JPEG is not in it" if "LOC" in labels else "5 images, not 4"
    assert wrong in message_of(lambda: sets.ImageNet(str(tmp_path)))


def test_classes_that_imagenet_lacks_and_missing_labels_are_errors(tmp_path: Path) -> None:
    wnids = write_flat_validation(tmp_path, "val")
    assert "LOC_val_solution.csv" in message_of(lambda: sets.ImageNet(str(tmp_path)), MissingData)
    write_solution(tmp_path, [*wnids[:-1], "n00000000"])
    assert "'n00000000' is none of the 1000 classes" in message_of(lambda: sets.ImageNet(str(tmp_path)))
    MINIATURES["imagenet"].write(tmp_path / "folders")
    paint(tmp_path / "folders/val/n00000001/a.JPEG", 1)
    assert "'n00000001' is none of the 1000 classes" in message_of(lambda: sets.ImageNet(str(tmp_path / "folders")))


def write_timm_tars(root: Path, rows: Rows, canonical: Path, info: bool) -> None:
    """Write timm/imagenet-1k-wds: samples of .jpg, .cls and .json in a random order, named without their folder."""
    filenames: dict[str, list[str]] = {}
    for split, name in (("train", "train"), ("val", "validation")):
        keys = [row.key for row in rows[split]][::-1]
        half = len(keys) // 2
        for number, some in enumerate((keys[half:], keys[:half])):
            path, files = root / f"imagenet1k-{name}-{number:02}.tar", dict[str, bytes]()
            filenames.setdefault(name, []).append(path.name)
            for key in some:
                stem, label = Path(key).stem, imagenet_wnids().index(Path(key).parts[0])
                files |= {f"{stem}.cls": str(label).encode(), f"{stem}.jpg": (canonical / split / key).read_bytes()}
                files[f"{stem}.json"] = json.dumps({"filename": key, "label": label}).encode()
            write_tar(path, files)
    if info:
        splits = {split: {"name": split, "filenames": files} for split, files in filenames.items()}
        write_text(root / "_info.json", json.dumps({"splits": splits}))


@pytest.mark.parametrize("info", [True, False])
def test_timms_tar_files_have_the_keys_labels_and_order_of_class_folders(info: bool, tmp_path: Path) -> None:
    wnids = ["n01440764", "n01484850", "n15075141"]
    rows: Rows = dict(MINIATURES["imagenet"].rows)
    for split in rows:  # names that differ between classes, as ImageNet's do
        stem = "{}_{}" if split == "train" else "ILSVRC2012_val_{}{}"
        rows[split] = [
            row._replace(key=f"{wnid}/{stem.format(wnid, i)}.JPEG")
            for row, (wnid, i) in zip(rows[split], [(wnid, i) for wnid in wnids for i in (1, 2)], strict=True)
        ]
        for row in rows[split]:
            paint(tmp_path / "folders" / split / row.key, row.number)
    (tmp_path / "tars").mkdir()
    write_timm_tars(tmp_path / "tars", rows, tmp_path / "folders", info)
    for split in ("train", "val"):
        ours, expected = (sets.ImageNet(str(tmp_path / layout), split) for layout in ("tars", "folders"))
        assert content(ours) == content(expected)
        assert len(ours.image_paths()) == 2
    (tmp_path / "tars/imagenet1k-validation-01.tar").unlink()
    if info:
        message = message_of(lambda: sets.ImageNet(str(tmp_path / "tars")), MissingData)
        assert "imagenet1k-validation-01.tar" in message


def test_tar_sample_whose_name_contradicts_its_label_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "imagenet1k-train-0000.tar", {"n01440764_1.jpg": b"x", "n01440764_1.cls": b"3"})
    message = message_of(lambda: sets.ImageNet(str(tmp_path), "train"))
    assert "its name is of n01440764, but its label 3 is n01491361" in message
    assert "validation" in message_of(lambda: sets.ImageNet(str(tmp_path)), MissingData)


EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # Kaggle's folders in label order


def write_face_folders(root: Path) -> None:
    """Write FER2013's miniature as msambare/fer2013 has it: folders of emotions, both test splits in ``test``."""
    from PIL import Image

    for part in ("train", "test"):
        for name in EMOTIONS:
            folder = root / part / name
            folder.mkdir(parents=True)
            usage = "Training" if part == "train" else "PrivateTest"
            Image.fromarray(pixels(100, 48, 1)).save(folder / f"{usage}_99999999.png")
    for split, row in ((split, row) for split, rows in FACES.items() for row in rows):
        folder = root / ("train" if split == "train" else "test") / EMOTIONS[row.label]
        Image.fromarray(pixels(row.number, 48, 1)).save(folder / f"{USAGES[split]}_{10_000_000 + row.number}.png")


@pytest.mark.parametrize("place", ["fer2013", "."])
def test_kaggles_folders_of_faces_have_the_challenges_splits(place: str, tmp_path: Path) -> None:
    """Its ``test`` folder has the images of two splits, which their names tell."""
    write_fer2013(tmp_path / "table", FACES)
    write_face_folders(tmp_path / "folders" / place)
    for split in ("train", "val", "test"):
        ours, expected = (sets.FER2013(str(tmp_path / layout), split) for layout in ("folders", "table"))
        assert ours.class_names == expected.class_names
        added = pixels(100, 48, 1).tobytes()  # one of each emotion
        found = sorted((label, image) for _, label, image in content(ours) if image != added)
        assert found == sorted((label, image) for _, label, image in content(expected))
        assert len(ours) - len(found) == (0 if split == "val" else 7)
    wrong = tmp_path / "folders" / place / "test/angry/Training_1.png"
    wrong.write_bytes(b"")
    assert "Training_1.png: its name does not start with" in message_of(lambda: sets.FER2013(str(tmp_path / "folders")))
    wrong.unlink()
    (tmp_path / "folders" / place / "test/contempt").mkdir()
    assert "contempt" in message_of(lambda: sets.FER2013(str(tmp_path / "folders")))
    assert "fer2013new.csv" in message_of(lambda: sets.FERPlus(str(tmp_path / "folders")), MissingData)


def captioned(images: CaptionedImages) -> list[tuple[str, int, list[str]]]:
    return [(images.key(i), shade(images.images(i)[0]), images.captions(i)) for i in range(len(images))]


CAPTIONS = {"2.jpg": ["Two, with a comma .", 'a "quoted" one'], "1.jpg": ["One"]}


def write_karpathy(path: Path, folder: str | None) -> None:
    entries = [
        {
            "filename": name,
            "split": "test",
            "sentences": [{"raw": caption} for caption in captions],
            **({"filepath": folder} if folder else {}),
        }
        for name, captions in CAPTIONS.items()
    ]
    other = {"filename": "3.jpg", "split": "train", "sentences": [{"raw": "no"}], "filepath": "train2014"}
    write_text(path, json.dumps({"images": [other, *entries], "dataset": "any"}))


def test_hubs_table_of_flickr30k_has_karpathys_test_split(tmp_path: Path) -> None:
    """nlphuji/flickr30k: a column ``raw`` with a JSON list of captions."""
    for layout in ("hub", "karpathy"):
        for number in (1, 2, 3):
            paint_shade(tmp_path / layout / f"flickr30k-images/{number}.jpg", 10 * number)
    write_karpathy(tmp_path / "karpathy/dataset_flickr30k.json", None)
    table = tmp_path / "hub/flickr_annotations_30k.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        writer.writerow([json.dumps(["no"]), "[0]", "train", "3.jpg", "0"])
        for number, (name, captions) in enumerate(CAPTIONS.items(), start=1):
            writer.writerow([json.dumps(captions), f"[{number}]", "test", name, str(number)])
    ours, expected = (sets.Flickr30k(str(tmp_path / layout)) for layout in ("hub", "karpathy"))
    assert captioned(ours) == captioned(expected) == [(name, 10 * int(name[0]), CAPTIONS[name]) for name in CAPTIONS]
    assert ours.annotation_paths == [table]
    table.write_text("raw,split,filename\nnot json,test,1.jpg\n")
    assert "1.jpg" in message_of(lambda: sets.Flickr30k(str(tmp_path / "hub")))


@pytest.mark.parametrize("place", ["", "annotations/"])
def test_clip_benchmarks_file_of_cocos_test_split_equals_karpathys(place: str, tmp_path: Path) -> None:
    """COCO's own format, with the names of images inside ``val2014``."""
    for layout in ("benchmark", "karpathy"):
        for number in (1, 2):
            paint_shade(tmp_path / layout / f"val2014/{number}.jpg", 10 * number)
    write_karpathy(tmp_path / "karpathy/dataset_coco.json", "val2014")
    images = [{"id": int(name[0]), "file_name": name} for name in CAPTIONS]
    annotations = [
        {"id": 10 * image["id"] + i, "image_id": image["id"], "caption": caption}
        for image in images
        for i, caption in enumerate(CAPTIONS[image["file_name"]])
    ]
    path = tmp_path / "benchmark" / f"{place}coco_test_karpathy.json"
    write_text(path, json.dumps({"images": images, "annotations": annotations}))
    ours, expected = (sets.COCO(str(tmp_path / layout)) for layout in ("benchmark", "karpathy"))
    assert captioned(ours) == captioned(expected)
    assert [key for key, _, _ in captioned(ours)] == ["val2014/2.jpg", "val2014/1.jpg"]
    assert ours.annotation_paths == [path]
    assert "coco_val_karpathy.json" in message_of(lambda: sets.COCO(str(tmp_path / "benchmark"), "val"), MissingData)


@pytest.mark.parametrize(
    "make",
    [sets.EuroSAT, sets.DTD, sets.OxfordPets, sets.Caltech101, sets.FER2013, sets.FERPlus, sets.ImageNet, sets.COCO],
)
def test_folder_without_a_known_layout_is_missing(make: Callable[[str], object], tmp_path: Path) -> None:
    paint(tmp_path / "some/where/1.png", 1)
    assert str(tmp_path) in message_of(lambda: make(str(tmp_path)), MissingData)
