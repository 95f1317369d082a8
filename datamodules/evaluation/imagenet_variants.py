"""Test sets that share ImageNet's classes: ImageNetV2, ImageNet-A, -R and -Sketch, and ObjectNet."""

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import Image

from datamodules.evaluation.annotation_files import read_json, read_text
from datamodules.evaluation.image_files import ImageFiles, in_class_folders, subfolders
from lit_clip.errors import InputError
from lit_clip.evaluation.data import SomeOfImageNet
from lit_clip.evaluation.zero_shot import imagenet_class_names

BORDER = 2  # pixels; the red line is 1 wide, but its authors' loader cuts off 2 (abarbu/objectnet-template-pytorch)


@lru_cache(maxsize=1)
def imagenet_wnids() -> tuple[str, ...]:
    """Read the WordNet ids of ImageNet's 1,000 classes, in label order, from timm's list without importing timm."""
    return tuple(_timms("imagenet_synsets.txt").split())


def _imagenet_words() -> list[str]:
    """Read WordNet's words for ImageNet's 1,000 classes, such as ``cock``, in label order, likewise."""
    lines = _timms("imagenet_synset_to_lemma.txt").splitlines()
    words = dict(line.split("\t", maxsplit=1) for line in lines if line)
    return [words[wnid] for wnid in imagenet_wnids()]


def _timms(name: str) -> str:
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise InputError("the list of ImageNet's classes comes with timm, which is not installed; pip install timm")
    return read_text(Path(package.origin).parent / "data/_info" / name)


def ImageNetV2(root: str) -> ImageFiles:
    """ImageNetV2: 10 new images of each class, in folders named 0 to 999 by label.

    A loader that sorts folder names as text (0, 1, 10, 100, ...) would label nearly every image wrongly.
    """
    wanted = [str(label) for label in range(1000)]
    if wrong := sorted(set(subfolders(Path(root))) ^ set(wanted)):
        raise InputError(f"{root}: its folders are not 0 to 999 ({len(wrong)} differ: {', '.join(wrong[:3])})")
    return ImageFiles(Path(root), *in_class_folders(Path(root), wanted), imagenet_class_names())


class ImageNetFolders(ImageFiles, SomeOfImageNet):
    """Images of some of ImageNet's classes, in folders named by WordNet id, scored among those classes only.

    This is the layout of ImageNet-A, -R and -Sketch. Labels follow ImageNet's order, and names are the paper's.

    Args:
        root: the folder.
        classes: the number of classes to expect; None: any.
    """

    def __init__(self, root: str, classes: int | None = None) -> None:
        folders = subfolders(Path(root))
        number = {wnid: label for label, wnid in enumerate(imagenet_wnids())}
        if unknown := sorted(set(folders) - number.keys()):
            raise InputError(f"{root}: {unknown[0]} is not a class of ImageNet; folders must be named n01440764, ...")
        if classes is not None and len(folders) != classes:
            raise InputError(f"{root}: {len(folders)} class folders instead of {classes}; get the set again")
        self.wnids = sorted(folders, key=number.__getitem__)
        files, labels = in_class_folders(Path(root), self.wnids)
        names = imagenet_class_names()
        self._numbers = [number[wnid] for wnid in self.wnids]
        super().__init__(Path(root), files, labels, [names[label] for label in self._numbers])

    def imagenet_classes(self) -> list[list[int]]:
        return [[label] for label in self._numbers]


class ObjectNet(ImageFiles, SomeOfImageNet):
    """ObjectNet: everyday objects in unusual places, restricted to the 113 classes that ImageNet has too.

    ObjectNet's ``mappings`` list these classes and their names. Labels follow the sorted folder names, as in
    CLIP_benchmark; class names are ObjectNet's own in lower case. The red line around each image, which marks it as
    not to be trained on, is cut off. ``root`` is ``objectnet-1.0``, with ``images`` and ``mappings``.
    """

    def __init__(self, root: str) -> None:
        folder, mappings = Path(root), Path(root) / "mappings"
        names = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
        label_of, in_imagenet = (read_json(mappings / name) for name in names)
        mappings_of_names = isinstance(label_of, dict) and all(isinstance(name, str) for name in label_of.values())
        if not mappings_of_names or not isinstance(in_imagenet, dict):
            raise InputError(f"{mappings}: not the mappings of ObjectNet 1.0; get them again")
        overlap = sorted(name for name, label in label_of.items() if label in in_imagenet)
        if len(overlap) != len(in_imagenet):
            problem = f"{len(overlap)} folders for the {len(in_imagenet)} classes that are in ImageNet"
            raise InputError(f"{mappings / 'folder_to_objectnet_label.json'}: {problem}; get the mappings again")
        files, labels = in_class_folders(folder / "images", overlap)
        words, annotations = [label_of[name].lower() for name in overlap], [mappings / name for name in names]
        super().__init__(folder / "images", files, labels, words, annotations)
        self._words = [str(in_imagenet[label_of[name]]).split("; ") for name in overlap]

    def imagenet_classes(self) -> list[list[int]]:
        known: dict[str, list[int]] = {}
        for label, words in enumerate(_imagenet_words()):
            known.setdefault(words, []).append(label)
        wrong = [words for several in self._words for words in several if len(known.get(words, ())) != 1]
        if wrong:
            raise InputError(f"objectnet_to_imagenet_1k.json: {wrong[0]!r} does not name one class of ImageNet")
        return [[known[words][0] for words in several] for several in self._words]

    def image(self, index: int) -> Image.Image:
        image = super().image(index)
        width, height = image.size
        return image.crop((BORDER, BORDER, width - BORDER, height - BORDER))
