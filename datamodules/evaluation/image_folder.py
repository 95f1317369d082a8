"""A user's folder of images, one subfolder for each class."""

from pathlib import Path
from typing import Literal

from datamodules.evaluation.image_files import LabelledFiles, images_below
from datamodules.loading.bad_samples import is_unicode
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


class ImageFolderClasses(LabelledFiles):
    """A folder with one subfolder of images for each class; labels follow the subfolders' sorted names.

    Args:
        root: the folder.
        class_names: names in that order; ``imagenet``: the paper's 1,000; None: the subfolders' names with
            underscores as spaces.

    Raises:
        MissingData: no such folder.
    """

    def __init__(self, root: str, class_names: ClassNames | None = None) -> None:
        self.root = folder = Path(root)
        if not folder.is_dir():
            raise MissingData(f"{root}: no such folder of classes")
        with reading(folder, "folder"):
            classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in classes:
            require(is_unicode(path.name), f"{path}: the name of this class is not UTF-8 text; rename the folder")
        if not classes:
            raise InputError(f"{root}: no subfolders; put each class's images into a subfolder of its own")
        default = [path.name.replace("_", " ") for path in classes]
        self.class_names = resolve_names(class_names, default, str(root))
        self.files = []
        for label, path in enumerate(classes):
            images = images_below(path)
            if not images:
                raise InputError(f"{path}: no images of this class ({', '.join(sorted(SUFFIXES))})")
            self.files += [(file, label) for file in images]
