"""Sets read from miniatures: layout, listing and labels, and what torchvision's own classes say."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader

from datamodules import evaluation as sets
from lit_clip.evaluation.data import LabelledImages, MissingData, MultiLabel
from tests.helpers.coloured_sets import message_of
from tests.helpers.miniature_arrays import python2_pickle, write_fer2013, write_stl10
from tests.helpers.miniature_files import VOC_OBJECTS, write_imagenet, write_voc2007
from tests.helpers.miniature_images import Row, encodes, paint, write_mat, write_text
from tests.helpers.miniatures import MINIATURES, open_miniature

pytestmark = pytest.mark.usefixtures("_mat_read_once")


DRAWN = ("caltech101", "eurosat")  # from all images of a folder, also those that are in no split


def check_rows(images: LabelledImages, rows: list[Row]) -> None:
    assert len(images) == len(rows)
    assert [images.key(i) for i in range(len(images))] == [row.key for row in rows]
    assert images.labels() == [images[i][1] for i in range(len(images))]
    assert all(encodes(images[i][0], row.number) for i, row in enumerate(rows))
    named = [(label, row.name) for label, row in zip(images.labels(), rows, strict=True) if row.name]
    assert [images.class_names[label] for label, _ in named] == [name for _, name in named]
    assert len(images.images(0)) == 1


@pytest.mark.parametrize("name", MINIATURES)
def test_splits_have_their_images_labels_and_keys(name: str, tmp_path: Path) -> None:
    """Also in a data worker, without the pixels, and read from the files alone that results.json lists."""
    miniature, root, stamps = MINIATURES[name], tmp_path / "whole", set()
    splits = miniature.write(root)
    for split, rows in splits.items():
        images = open_miniature(miniature, root, split)
        check_rows(images, rows)
        stamps.add(images.stamp())
        pickled = pickle.dumps(images)
        assert len(pickled) < 20_000 + 300 * len(images)
        copy = pickle.loads(pickled)
        check_rows(copy, rows)
        assert (copy.class_names, copy.stamp()) == (images.class_names, images.stamp())
        for path in {*images.annotation_paths, *images.image_paths()} if name not in DRAWN else ():
            target = tmp_path / split / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        if name not in DRAWN:
            check_rows(open_miniature(miniature, tmp_path / split, split), rows)
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
    rows = write_voc2007(tmp_path)
    for split in rows:
        images = sets.VOC2007(str(tmp_path), split)  # pyright: ignore[reportArgumentType]
        assert isinstance(images, MultiLabel)
        assert images.labels() == [-1] * len(rows[split])
        relevance = images.relevance()
        assert relevance.dtype == torch.int8
        theirs = torchvision.datasets.VOCDetection(str(tmp_path), year="2007", image_set=split)
        for i, row in enumerate(rows[split]):
            assert encodes(theirs[i][0], row.number)
            expected = [0] * 20
            for thing in theirs[i][1]["annotation"]["object"]:
                label = images.class_names.index(thing["name"])
                expected[label] = max(expected[label], 2 if thing["difficult"] == "0" else 1)
            assert relevance[i].tolist() == [{0: 0, 1: -1, 2: 1}[value] for value in expected]
    assert (sets.VOC2007(str(tmp_path), "train").relevance() == -1).sum() == 0
    assert (sets.VOC2007(str(tmp_path), "test").relevance() == -1).sum() == 1
    assert VOC_OBJECTS["000001"] == ["dog", "tvmonitor*"]


def test_unknown_voc2007_object_is_an_error_naming_the_file(tmp_path: Path) -> None:
    write_voc2007(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2007/Annotations/000002.xml"
    path.write_text(path.read_text().replace("pottedplant", "giraffe"))
    message = message_of(lambda: sets.VOC2007(str(tmp_path)))
    assert "000002.xml" in message
    assert "giraffe" in message


def test_stl10_folds_are_read_from_its_file_and_share_the_test_images(tmp_path: Path) -> None:
    rows = write_stl10(tmp_path)
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
    reader = type(getattr(images, "reader", images))
    original = reader.open

    def watched(self: Any) -> Any:
        (tmp_path / f"opened by {os.getpid()}").touch()
        return original(self)

    monkeypatch.setattr(reader, "open", watched)
    assert encodes(images[1][0], rows[1].number)
    loader = DataLoader(images, batch_size=1, num_workers=1, collate_fn=list, multiprocessing_context="fork")
    for row, ((image, _),) in zip(rows, loader, strict=True):
        assert encodes(image, row.number)
        assert encodes(images[0][0], rows[0].number)
    assert len(list(tmp_path.glob("opened by *"))) == 2


def test_fer2013_also_reads_icml_face_data_csv(tmp_path: Path) -> None:
    rows = write_fer2013(tmp_path, "icml_face_data.csv")
    for split in ("train", "val", "test"):
        images = sets.FER2013(str(tmp_path), split)
        check_rows(images, rows[split])


def test_fer2013_face_with_too_few_pixels_is_an_error_naming_the_row(tmp_path: Path) -> None:
    write_fer2013(tmp_path)
    path = tmp_path / "fer2013/fer2013.csv"
    lines = path.read_text().splitlines()
    lines[4] = "1,7 7 7,PrivateTest"
    path.write_text("\n".join(lines))
    images = sets.FER2013(str(tmp_path))
    message = message_of(lambda: images[0])
    assert "fer2013.csv" in message
    assert "row 3" in message
    assert images[1][0].size == (48, 48)


def test_pickled_cifar_batch_cannot_run_code(tmp_path: Path) -> None:
    MINIATURES["cifar10"].write(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(marker).encode())
    message = message_of(lambda: sets.CIFAR10(str(tmp_path)))
    assert "test_batch" in message
    assert "system" in message
    assert not marker.exists()


def test_cifar_label_without_a_class_is_an_error(tmp_path: Path) -> None:
    MINIATURES["cifar100"].write(tmp_path)
    batch = {"fine_labels": [3], "data": np.zeros((1, 3072), np.uint8)}
    (tmp_path / "cifar-100-python/test").write_bytes(python2_pickle(batch))
    assert "label 3 is none of the 3" in message_of(lambda: sets.CIFAR100(str(tmp_path)))


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


def test_clevr_count_outside_three_to_ten_is_an_error(tmp_path: Path) -> None:
    scenes = {"scenes": [{"image_filename": "CLEVR_val_000000.png", "objects": [{}] * 11}]}
    write_text(tmp_path / "clevr/CLEVR_v1.0/scenes/CLEVR_val_scenes.json", json.dumps(scenes))
    message = message_of(lambda: sets.CLEVRCounts(str(tmp_path), test=1))
    assert "CLEVR_val_000000.png has 11 objects" in message


def test_lists_without_images_are_missing_data(tmp_path: Path) -> None:
    write_text(tmp_path / "food-101/meta/test.json", json.dumps({"apple_pie": ["apple_pie/1"]}))
    assert "images/apple_pie: no such folder" in message_of(lambda: sets.Food101(str(tmp_path)), MissingData)


@pytest.mark.parametrize("labels", ["meta.bin", "devkit"])
def test_imagenets_validation_images_may_lie_in_one_folder(labels: str, tmp_path: Path) -> None:
    """As in the archive: images sorted by name match the development kit's labels."""
    wnids = ["n15075141", "n01440764", "n01440764"]
    for i in range(3):
        paint(tmp_path / f"val/ILSVRC2012_val_0000000{i + 1}.JPEG", i)
    if labels == "meta.bin":
        torch.save(({"n01440764": ("tench",)}, wnids), tmp_path / "meta.bin")
    else:
        synsets = np.zeros((3, 1), dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
        for i, wnid in enumerate(["n02119789", "n15075141", "n01440764"]):
            synsets[i, 0] = (i + 1, wnid, "words")
        write_mat(tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat", synsets=synsets)
        write_text(tmp_path / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "2\n3\n3\n")
    images = sets.ImageNet(str(tmp_path))
    assert images.labels() == [999, 0, 0]
    assert [images.class_names[label] for label in images.labels()] == ["toilet paper", "tench", "tench"]
    assert all(encodes(images[i][0], i) for i in range(3))
    paint(tmp_path / "val/ILSVRC2012_val_00000004.JPEG", 4)
    assert "4 images, not 3" in message_of(lambda: sets.ImageNet(str(tmp_path)))


def test_imagenet_images_without_labels_are_missing_data(tmp_path: Path) -> None:
    paint(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", 1)
    message = message_of(lambda: sets.ImageNet(str(tmp_path)), MissingData)
    assert "meta.bin" in message


def test_folder_that_is_not_an_imagenet_class_is_an_error(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    paint(tmp_path / "val/n00000001/a.JPEG", 1)
    assert "'n00000001' is none of the 1000 classes" in message_of(lambda: sets.ImageNet(str(tmp_path)))
