"""Other images of ImageNet's classes: ImageNetV2, -A, -R, -Sketch, and ObjectNet."""

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import Image

from datamodules.evaluation.image_files import ImageFiles, in_class_folders, subfolders
from datamodules.evaluation.indexes import read_json, read_text
from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import imagenet_class_names

BORDER = 2  # pixels; the red one is 1 wide, and its makers' own loader takes off 2 (abarbu/objectnet-template-pytorch)


@lru_cache(maxsize=1)
def imagenet_wnids() -> tuple[str, ...]:
    """WordNet's numbers of ImageNet's 1,000 classes in label order, from the list in timm, which is not imported."""
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise InputError("the list of ImageNet's classes comes with timm, which is not installed: pip install timm")
    return tuple(read_text(Path(package.origin).parent / "data/_info/imagenet_synsets.txt").split())


class ImageNetV2(ImageFiles):
    """ImageNetV2: 10 new images of each class, in folders called 0 to 999, which are the classes' numbers.

    Sorted as names they would be 0, 1, 10, 100, ..., and nearly every image labelled wrongly.

    Args:
        root: ``imagenetv2-matched-frequency-format-val``, say.

    Raises:
        MissingData: no such folder.
        InputError: other folders than those, or one without images.
    """

    def __init__(self, root: str) -> None:
        wanted = [str(label) for label in range(1000)]
        if wrong := sorted(set(subfolders(Path(root))) ^ set(wanted)):
            raise InputError(f"{root}: its folders are not 0 to 999 ({len(wrong)} differ: {', '.join(wrong[:3])})")
        files, labels = in_class_folders(Path(root), wanted)
        super().__init__(Path(root), files, labels, imagenet_class_names())


class ImageNetFolders(ImageFiles):
    """Images of some of ImageNet's classes, in folders named by WordNet's numbers; scored among those classes only.

    ImageNet-A, -R and -Sketch come so.

    Args:
        root: the folder.
        classes: how many there must be.

    Attributes:
        wnids: the classes, in ImageNet's order.
        imagenet_classes: their labels there.
        class_names: the paper's names of them.

    Raises:
        MissingData: no such folder.
        InputError: a folder that is no class of ImageNet, another number of them, or one without images.
    """

    def __init__(self, root: str, classes: int | None = None) -> None:
        folders = subfolders(Path(root))
        number = {wnid: label for label, wnid in enumerate(imagenet_wnids())}
        if unknown := sorted(set(folders) - number.keys()):
            raise InputError(f"{root}: {unknown[0]} is no class of ImageNet; folders are called n01440764, ...")
        if classes is not None and len(folders) != classes:
            raise InputError(f"{root}: {len(folders)} folders of classes instead of {classes}; get the set again")
        self.wnids = sorted(folders, key=number.__getitem__)
        files, labels = in_class_folders(Path(root), self.wnids)
        names = imagenet_class_names()
        self.imagenet_classes = [number[wnid] for wnid in self.wnids]
        super().__init__(Path(root), files, labels, [names[label] for label in self.imagenet_classes])


class ObjectNet(ImageFiles):
    """ObjectNet: everyday objects in unusual places, of the 113 of its classes that ImageNet has too.

    Which these are, and what ObjectNet calls them, its own ``mappings`` say. Classes are in the order of their folders'
    names, as in CLIP_benchmark. The red line around each image, which marks it as not to be trained on, is cut off.

    Args:
        root: ``objectnet-1.0``, with ``images`` and ``mappings``.

    Attributes:
        class_names: ObjectNet's own, in small letters.

    Raises:
        MissingData: no such folder, or none of its files.
        InputError: mappings that do not fit each other, or a class without images.
    """

    def __init__(self, root: str) -> None:
        folder, mappings = Path(root), Path(root) / "mappings"
        label_of = read_json(mappings / "folder_to_objectnet_label.json")
        in_imagenet = read_json(mappings / "objectnet_to_imagenet_1k.json")
        if not isinstance(label_of, dict) or not isinstance(in_imagenet, dict):
            raise InputError(f"{mappings}: not the mappings of ObjectNet 1.0; get them again")
        overlap = sorted(name for name, label in label_of.items() if label in in_imagenet)
        if len(overlap) != len(in_imagenet):
            what = f"{len(overlap)} folders for the {len(in_imagenet)} classes that are in ImageNet"
            raise InputError(f"{mappings / 'folder_to_objectnet_label.json'}: {what}; get the mappings again")
        files, labels = in_class_folders(folder / "images", overlap)
        super().__init__(folder / "images", files, labels, [label_of[name].lower() for name in overlap])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().__getitem__(index)
        width, height = image.size
        return image.crop((BORDER, BORDER, width - BORDER, height - BORDER)), label
