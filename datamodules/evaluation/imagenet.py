"""ImageNet's 1,000 classes: which folder is which label, and the validation images of its archive."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from datamodules.evaluation.image_files import ImageFiles, images_in, subfolders
from datamodules.evaluation.imagenet_variants import imagenet_wnids
from datamodules.evaluation.indexes import read_text
from datamodules.evaluation.torchvision_sets import labels_of, read_mat
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.zero_shot import imagenet_class_names

DEVKIT = "ILSVRC2012_devkit_t12"


class ImageNet(ImageFiles):
    """ImageNet 2012, as torchvision unpacks it or as its validation archive does.

    Either ``root/SPLIT/n01440764/*.JPEG``, or all validation images in ``root/val`` itself; then ``root`` also has
    torchvision's ``meta.bin`` or the unpacked ``ILSVRC2012_devkit_t12``, which have the labels. Of folders of classes
    some may be left out.

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
            names = subfolders(folder)
            numbers = labels_of(names, wnids, folder)
            images = [images_in(folder / name) for name in names]
            files = [f"{name}/{file}" for name, some in zip(names, images, strict=True) for file in some]
            labels = [label for label, some in zip(numbers, images, strict=True) for _ in some]
        super().__init__(folder, files, labels, imagenet_class_names())


def _validation_wnids(root: Path, wnids: Sequence[str]) -> list[str]:
    """The class of each validation image, in the order of their names."""
    if (root / "meta.bin").is_file():
        return _of_meta(root / "meta.bin")
    data = root / DEVKIT / "data"
    if not data.is_dir():
        raise MissingData(
            f"{root}: neither folders of classes in val nor meta.bin nor {DEVKIT}, so there are no labels"
        )
    table = read_mat(data / "meta.mat", "synsets")[0]
    try:
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except (ValueError, IndexError) as error:
        raise InputError(f"{data / 'meta.mat'}: not the list of ImageNet's classes ({error}); get it again") from error
    path = data / "ILSVRC2012_validation_ground_truth.txt"
    words = read_text(path).split()
    wrong = next((word for word in words if not word.isdigit() or wnid_of.get(int(word)) not in wnids), None)
    if wrong is not None:
        raise InputError(f"{path}: {wrong!r} is no class of meta.mat; get the file again")
    return [wnid_of[int(word)] for word in words]


def _of_meta(path: Path) -> list[str]:
    import torch

    try:
        _, wnids = torch.load(path, weights_only=True)
        return [str(wnid) for wnid in wnids]
    except Exception as error:  # a broken pickle fails with whatever its bytes happen to say
        what = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path}: not what torchvision writes ({what}); remove it and have it written again"
        ) from error
