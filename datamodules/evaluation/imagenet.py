"""ImageNet: its class folders, or the validation images as the archive holds them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from datamodules.evaluation.annotation_files import AGAIN, read_mat, read_text, whole_number
from datamodules.evaluation.image_files import ImageFiles, images_in, in_class_folders, labels_of, subfolders
from datamodules.evaluation.imagenet_variants import imagenet_wnids
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.tools.reading import reading

DEVKIT = "ILSVRC2012_devkit_t12"


class ImageNet(ImageFiles):
    """ImageNet 2012, as torchvision unpacks it or as its validation archive does.

    Either ``root/SPLIT/n01440764/*.JPEG``, where class folders may be missing, or all validation images in ``root/val``
    itself. In the second case the labels come from torchvision's ``meta.bin`` or the unpacked
    ``ILSVRC2012_devkit_t12`` in ``root``.

    Args:
        root: the folder.
        split: ``train``, or ``val``, which the paper tests on.
    """

    def __init__(self, root: str, split: Literal["train", "val"] = "val") -> None:
        folder = Path(root) / split
        if not folder.is_dir():
            raise MissingData(f"{folder}: no such folder")
        wnids = imagenet_wnids()
        if split == "val" and not any(entry.is_dir() and entry.name[0] == "n" for entry in os.scandir(folder)):
            files = images_in(folder)
            truth = _validation_wnids(Path(root), wnids)
            if len(truth) != len(files):
                raise InputError(f"{folder}: {len(files)} images, not {len(truth)}; unpack the archive again")
            labels = labels_of(truth, wnids, Path(root))
        else:
            classes = subfolders(folder)
            label_of = labels_of(classes, wnids, folder)
            files, places = in_class_folders(folder, classes)
            labels = [label_of[place] for place in places]
        super().__init__(folder, files, labels, imagenet_class_names())


def _validation_wnids(root: Path, wnids: Sequence[str]) -> list[str]:
    """Read the class of each validation image, in the order of the images' names."""
    if (root / "meta.bin").is_file():
        return _wnids_in_meta(root / "meta.bin")
    data = root / DEVKIT / "data"
    if not data.is_dir():
        raise MissingData(f"{root}: no labels: neither class folders in val, nor meta.bin, nor {DEVKIT}")
    table = read_mat(data / "meta.mat", "synsets")[0]
    with reading(data / "meta.mat", "list of ImageNet's classes", hint=AGAIN):
        wnid_of: dict[int | None, str] = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    path = data / "ILSVRC2012_validation_ground_truth.txt"
    words = read_text(path).split()
    wrong = next((word for word in words if wnid_of.get(whole_number(word)) not in wnids), None)
    if wrong is not None:
        raise InputError(f"{path}: {wrong!r} is not a class of meta.mat; get the file again")
    return [wnid_of[whole_number(word)] for word in words]


def _wnids_in_meta(path: Path) -> list[str]:
    import torch

    with reading(path, "file of torchvision's", hint="remove it and let torchvision write it again"):
        _, wnids = torch.load(path, weights_only=True)
        return [str(wnid) for wnid in wnids]
