"""ImageNet in all its layouts and other languages; ImageNetV2's companions -A, -R and -Sketch, and ObjectNet."""

import os
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from PIL import Image, ImageOps

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import LabelledImages, MissingData, PartOf
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.own_files import installed_file
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import convert, entries
from .annotation_files import AGAIN, find, read_json, read_mat, read_table, read_text, refuse_missing, whole_number
from .image_files import TEXTS, ImageFiles, KnownLabels, images_in, in_class_folders, labels_of, subfolders
from .webdataset import TarImages, TarSample, scan_tar

ImageNetSplit = Literal["train", "val"]
DEVKIT = "ILSVRC2012_devkit_t12"
KAGGLE = "ILSVRC/Data/CLS-LOC"
SOLUTION = "LOC_val_solution.csv"  # Kaggle's labels of the validation images
FOLDERS = {"train": ("train",), "val": ("val", "validation")}
TARS = {"train": "imagenet1k-train-*.tar", "val": "imagenet1k-validation-*.tar"}  # of timm/imagenet-1k-wds
WNID = re.compile(r"(n\d{8})_")
INFO = entries({"splits": dict[str, entries({"filenames": list[str]}, total=True)]}, total=True)
BORDER = 2  # pixels; the red line is 1 wide, but its authors' loader cuts off 2 (abarbu/objectnet-template-pytorch)


def ImageNet(root: str, split: ImageNetSplit = "val") -> LabelledImages:
    """ImageNet 2012, in the layout of torchvision, of its archives, of Kaggle or of timm.

    One of ``root/train/n01440764/*.JPEG`` and ``root/val/...`` (or ``root/validation/...``), where class folders may be
    missing; the same below Kaggle's ``ILSVRC/Data/CLS-LOC``; or the tar files of ``timm/imagenet-1k-wds`` in ``root``.
    All validation images may lie in their folder itself. Then the labels come from torchvision's ``meta.bin``, from the
    unpacked ``ILSVRC2012_devkit_t12`` or from Kaggle's ``LOC_val_solution.csv`` in ``root``.
    """
    top = Path(root)
    folders = [f"{place}{name}" for place in ("", f"{KAGGLE}/") for name in FOLDERS[split]]
    tars = sorted(top.glob(TARS[split]))
    if tars and not any((top / folder).is_dir() for folder in folders):
        return _ImageNetTars(tars)
    folder = find(top, folders, f"folder of images, and no {TARS[split]},")
    wnids, names = imagenet_wnids(), imagenet_class_names()
    if split == "val" and not any(entry.is_dir() and entry.name[0] == "n" for entry in os.scandir(folder)):
        files = images_in(folder)
        truth, annotations = _validation_wnids(top, files, wnids)
        whole = len(truth) == len(files)
        require(whole, f"{folder}: {len(files)} images, not {len(truth)}; unpack the archive again")
        return ImageFiles(folder, list(zip(files, truth, strict=True)), wnids, annotations, names)
    return ImageFiles(folder, in_class_folders(folder, subfolders(folder)), wnids, names=names)


def _validation_wnids(root: Path, files: Sequence[str], wnids: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Read the class of each validation image, in the order of image names, and return the files read."""
    data, binary = root / DEVKIT / "data", root / "meta.bin"
    if binary.is_file():
        import torch

        with reading(binary, "file of torchvision's", hint="remove it and let torchvision write it again"):
            _, found = torch.load(binary, weights_only=True)
            return [str(wnid) for wnid in found], [binary]
    if data.is_dir():
        meta, truth = data / "meta.mat", data / "ILSVRC2012_validation_ground_truth.txt"
        return _wnids_in_devkit(meta, truth, wnids), [meta, truth]
    if (root / SOLUTION).is_file():
        return _wnids_in_solution(root / SOLUTION, files), [root / SOLUTION]
    raise MissingData(f"{root}: no labels: neither class folders in val, nor meta.bin, nor {DEVKIT}, nor {SOLUTION}")


def _wnids_in_devkit(meta: Path, path: Path, wnids: Sequence[str]) -> list[str]:
    table = read_mat(meta, "synsets")[0]
    with reading(meta, "list of ImageNet's classes", hint=AGAIN):
        wnid_of: dict[int | None, str] = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    words = read_text(path).split()
    for word in words:
        require(wnid_of.get(whole_number(word)) in wnids, f"{path}: {word!r} is not a class of meta.mat; {AGAIN}")
    return [wnid_of[whole_number(word)] for word in words]


def _wnids_in_solution(path: Path, files: Sequence[str]) -> list[str]:
    """Read Kaggle's ``ILSVRC2012_val_00000001,n01751748 111 108 230 366``: image, class and box, in any order."""
    rows = read_table(path, {"image": ("imageid",), "boxes": ("predictionstring",)})
    wnid_of = {row["image"]: row["boxes"].partition(" ")[0] for row in rows}
    for file in files:
        require(Path(file).stem in wnid_of, f"{path}: {file} is not in it; get both again")
    return [wnid_of[Path(file).stem] for file in files]


class _ImageNetTars(TarImages, KnownLabels):
    """The tar files of ``timm/imagenet-1k-wds``; each sample is a ``.jpg`` with its label in a ``.cls``.

    Images have the names and the order that they have in class folders.
    """

    def __init__(self, tars: list[Path]) -> None:
        self.tars, self.class_names = tars, imagenet_class_names()
        info = tars[0].with_name("_info.json")
        self.annotation_paths = [info] if info.is_file() else []
        for path in self.annotation_paths:
            refuse_missing(*_listed_beside(path, tars[0]))
        labelled = sorted((_tar_key(each), each) for path in tars for each in scan_tar(path, "cls"))
        self.samples = [sample for _, sample in labelled]
        self._keys = [key for (key, _), _ in labelled]
        self._labels = [label for (_, label), _ in labelled]

    def key(self, index: int) -> str:
        return self._keys[index]

    def stamp(self) -> str:
        return stamp_of_files(self.tars)


def _tar_key(sample: TarSample) -> tuple[str, int]:
    """Return an image's path in class folders, and its label."""
    wnids = imagenet_wnids()
    label = whole_number((sample.target or b"").decode("ascii", "replace").strip())
    if not sample.size or label is None or label >= len(wnids):
        raise InputError(f"{sample.where}: needs an image and a .cls with a label below {len(wnids)}; {AGAIN}")
    wnid, name = wnids[label], sample.name.rpartition("/")[2]
    said = WNID.match(name)
    other = f"its name is of {said[1] if said else ''}, but its label {label} is {wnid}"
    require(said is None or said[1] == wnid, f"{sample.where}: {other}; {AGAIN}")
    return f"{wnid}/{name}.JPEG", label


def _listed_beside(info: Path, tar: Path) -> list[Path]:
    """Return the files of the split that contains ``tar``."""
    for split in read_json(info, INFO)["splits"].values():
        if tar.name in split["filenames"]:
            return [info.with_name(name) for name in split["filenames"]]
    raise InputError(f"{info}: {tar.name} is in none of its splits; {AGAIN}")


@lru_cache(maxsize=1)
def imagenet_wnids() -> tuple[str, ...]:
    """Read the WordNet ids of ImageNet's 1,000 classes, in label order, from timm's list without importing timm."""
    return tuple(_timms("imagenet_synsets.txt").split())


def _labels_of_words(classes: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return ImageNet's labels for each class from its WordNet words, such as ``cock``, by timm's list."""
    lines = _timms("imagenet_synset_to_lemma.txt").splitlines()
    words = dict(line.split("\t", maxsplit=1) for line in lines if line)
    known: dict[str, list[int]] = {}
    for label, wnid in enumerate(imagenet_wnids()):
        known.setdefault(words[wnid], []).append(label)
    for name in (name for several in classes for name in several):
        one = len(known.get(name, ())) == 1
        require(one, f"objectnet_to_imagenet_1k.json: {name!r} does not name one class of ImageNet")
    return [[known[words][0] for words in several] for several in classes]


def _timms(name: str) -> str:
    return read_text(installed_file("timm", "timm", f"data/_info/{name}"))


def ImageNetFolders(root: str, classes: int | None = None) -> ImageFiles:
    """Images of some of ImageNet's classes, in folders named by WordNet id; only those classes compete.

    This is the layout of ImageNet-A, -R and -Sketch. Labels follow ImageNet's order, and names are the paper's.

    Args:
        root: the folder.
        classes: the number of classes to expect; None: any.
    """
    folders = subfolders(Path(root))
    numbers = sorted(labels_of(folders, imagenet_wnids(), Path(root)))
    if classes is not None and len(folders) != classes:
        raise InputError(f"{root}: {len(folders)} class folders instead of {classes}; get the set again")
    wnids, names = [imagenet_wnids()[number] for number in numbers], imagenet_class_names()
    rows = in_class_folders(Path(root), wnids)
    images = ImageFiles(Path(root), rows, wnids, names=[names[number] for number in numbers])
    images.in_imagenet = partial(list, [[number] for number in numbers])
    return images


class ObjectNet(ImageFiles):
    """ObjectNet: everyday objects in unusual places, restricted to the 113 classes that are also in ImageNet.

    ObjectNet's ``mappings`` list these classes and their names. Labels follow the sorted folder names, as in
    CLIP_benchmark; class names are ObjectNet's own in lower case. The red line around each image, which marks it as
    not to be trained on, is cut off. ``root`` is ``objectnet-1.0``, with ``images`` and ``mappings``.
    """

    def __init__(self, root: str) -> None:
        folder, mappings = Path(root), Path(root) / "mappings"
        names = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
        label_of, in_imagenet = (read_json(mappings / name, dict[str, str]) for name in names)
        overlap = sorted(name for name, label in label_of.items() if label in in_imagenet)
        if len(overlap) != len(in_imagenet):
            problem = f"{len(overlap)} folders for the {len(in_imagenet)} classes that are in ImageNet"
            raise InputError(f"{mappings / names[0]}: {problem}; get the mappings again")
        rows, own_names = in_class_folders(folder / "images", overlap), [label_of[name].lower() for name in overlap]
        super().__init__(folder / "images", rows, overlap, [mappings / name for name in names], own_names)
        self.in_imagenet = partial(_labels_of_words, [in_imagenet[label_of[name]].split("; ") for name in overlap])

    def image(self, index: int) -> Image.Image:
        return ImageOps.crop(super().image(index), BORDER)


class _TranslatedImageNet(KnownLabels, PartOf):
    """ImageNet, or some of its classes (labels, ascending), with other class names; it shares ImageNet's features."""

    def __init__(
        self, whole: LabelledImages, classes: Sequence[int], class_names: list[str], templates: list[str]
    ) -> None:
        self.whole, self.annotation_paths = whole, whole.annotation_paths
        self.class_names, self.templates = class_names, templates
        label_of, labels = {label: number for number, label in enumerate(classes)}, whole.labels()
        self.rows = [row for row, label in enumerate(labels) if label in label_of]
        self._labels = [label_of[labels[row]] for row in self.rows]

    def image_paths(self) -> Sequence[Path]:
        return self.whole.image_paths()

    def image(self, index: int) -> Image.Image:
        return self.whole.images(self.rows[index])[0]

    def check(self) -> None:
        self.whole.check()

    def key(self, index: int) -> str:
        return self.whole.key(self.rows[index])

    def stamp(self) -> str:
        return hex_digest([self.whole.stamp(), self.rows])


def _package_file(name: str) -> Path:
    return installed_file("clip_benchmark", "clip-benchmark", f"datasets/{name}")


def _entry(path: Path, language: str, kind: Any) -> Any:
    content = read_json(path, dict[str, Any])
    require(language in content, f"{path}: no {language!r}; it has {', '.join(content) or 'no languages'}")
    with naming(path):
        return convert(content[language], kind, language)


def TranslatedImageNet(root: str, language: str, split: ImageNetSplit = "val") -> _TranslatedImageNet:
    """ImageNet with CLIP_benchmark's translated class names and prompt templates, from the installed package.

    The language is ``ar``, ``cn``, ``it`` or ``jp``; ``root`` is the folder of :func:`ImageNet`.
    """
    files = [_package_file(f"{language}_{part}.json") for part in ("classnames", "zeroshot_classification_templates")]
    names, templates = (_entry(path, "imagenet1k", TEXTS) for path in files)
    templates = [text.replace("{c}", "{}") for text in templates]
    return _TranslatedImageNet(ImageNet(root, split), range(len(names)), names, templates)


def BabelImageNet(
    root: str, language: str, names: str | None = None, prompts: str | None = None, split: ImageNetSplit = "val"
) -> _TranslatedImageNet:
    """Babel-ImageNet: the classes of ImageNet that have a name in a language, scored among themselves.

    Without prompt templates in the language, the prompt is the name, as in the authors' ``label`` prompts.

    Args:
        root: the folder of :func:`ImageNet`.
        language: its code as in the files, such as ``DE``.
        names: the authors' ``babel_imagenet.json``: language -> labels and names; None: ``clip-benchmark``'s.
        prompts: the authors' ``nllb_dist13b_prompts.json``: language -> templates; None: ``clip-benchmark``'s.
        split: of ImageNet.
    """
    path = Path(names) if names else _package_file("babel_imagenet.json")
    classes, own_names = _entry(path, language, tuple[list[Annotated[int, Meta(ge=0, lt=1000)]], TEXTS])
    known = classes == sorted(set(classes)) and len(classes) == len(own_names)
    require(known, f"{path}: {language}: must be ascending labels, and as many names; {AGAIN}")
    file = Path(prompts) if prompts else _package_file("nllb_dist13b_prompts.json")
    templates = read_json(file, dict[str, TEXTS]).get(language, ["{}"])
    return _TranslatedImageNet(ImageNet(root, split), classes, own_names, templates)
