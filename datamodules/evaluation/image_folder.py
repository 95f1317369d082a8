"""A user's folder of images, one subfolder for each class."""

from pathlib import Path
from typing import Literal

from datamodules.evaluation.image_files import ImageFiles
from datamodules.loading.bad_samples import is_unicode
from datamodules.pairs.folder import walk_images
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.tools.images import SUFFIXES
from lit_clip.tools.reading import reading

ClassNames = list[str] | Literal["imagenet"]


def resolve_names(names: ClassNames | None, default: list[str], where: str) -> list[str]:
    """Return the class names that a user gave, or ``default``."""
    if names is None:
        return default
    names = imagenet_class_names() if names == "imagenet" else list(names)
    if len(names) != len(default):
        raise InputError(
            f"class_names: {len(names)} names for the {len(default)} classes of {where} "
            f"({', '.join(default[:3])}, ...); labels would get the wrong names"
        )
    return names


class ImageFolderClasses(ImageFiles):
    """A folder with one subfolder of images for each class; labels follow the subfolders' sorted names.

    Args:
        root: the folder.
        class_names: names in that order; ``imagenet``: the paper's 1,000; None: the subfolders' names with
            underscores as spaces.
    """

    def __init__(self, root: str, class_names: ClassNames | None = None) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise MissingData(f"{root}: no such folder of classes")
        with reading(folder, "folder"):
            classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for name in classes:
            require(is_unicode(name), f"{folder / name}: the name of this class is not UTF-8 text; rename the folder")
        if not classes:
            raise InputError(f"{root}: no subfolders; put each class's images into a subfolder of its own")
        names = resolve_names(class_names, [name.replace("_", " ") for name in classes], str(root))
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            images = sorted(folder / name / image for image, _ in walk_images(folder / name))
            if not images:
                raise InputError(f"{folder / name}: no images of this class ({', '.join(sorted(SUFFIXES))})")
            files += images
            labels += [label] * len(images)
        super().__init__(folder, files, labels, names)

    def where(self, index: int) -> str:
        return f"class folder {self.files[index].parent.name}"
