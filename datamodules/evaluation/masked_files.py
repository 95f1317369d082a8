"""Images and masks in separate files: Pascal VOC, Pascal Context, ADE20K, COCO-Stuff, Cityscapes, and others."""

import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Masked
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.images import stored_image
from lit_clip.tools.text_files import read_yaml
from .annotation_files import read_lines
from .image_files import UnlabelledFiles, refuse_no_folder

CLASSES = Path(__file__).with_name("segmentation_classes.yaml")
HIGHEST = 2**16  # values of a mask, exclusive
UNKNOWN = -2


@lru_cache(maxsize=1)
def _known_classes() -> dict[str, list[str]]:
    return read_yaml(CLASSES)


class MaskedFiles(UnlabelledFiles, Masked):
    """Images in one folder and their one-channel masks in another; the names differ only in suffix.

    Args:
        root: the folder of the set.
        images: folder of the images below it.
        masks: folder of the masks below it; both may have subfolders.
        classes: a list of ``segmentation_classes.yaml`` (``voc``, ``context``, ``ade20k``, ``coco_stuff``,
            ``cityscapes``), or the class names in label order, each once.
        background: names of a class that stands before them; None: there is none. A pixel is background where one of
            its names has the highest cosine.
        first: value of the first class in the masks, which the others follow.
        values: or each class's value.
        ignored: values of pixels that do not count, none of them a class's; None: 255, unless a class has it. Any other
            value is an error.
        image_suffix: end of an image's name.
        mask_suffix: end of a mask's name.
        listed: file below ``root`` with the names to use, without suffixes; None: those of all masks.
        short_side: pixels that an image's short side is resized to; None: twice the model's image size.
    """

    def __init__(
        self,
        root: str,
        images: str,
        masks: str,
        classes: str | list[str],
        background: list[str] | None = None,
        first: int = 0,
        values: list[int] | None = None,
        ignored: list[int] | None = None,
        image_suffix: str = ".jpg",
        mask_suffix: str = ".png",
        listed: str | None = None,
        short_side: int | None = None,
    ) -> None:
        names = _known_classes().get(classes) if isinstance(classes, str) else classes
        if not names:
            raise InputError(f"classes: {classes!r} must be a list of names or one of {', '.join(_known_classes())}")
        self.synonyms = [*([background] if background else []), *([name] for name in names)]
        self.class_names = [*(["background"] if background else []), *names]
        for given in (self.class_names, [name for group in self.synonyms for name in group]):
            twice = [repr(name) for name, count in Counter(map(str.casefold, given)).items() if count > 1]
            require(not twice, f"classes, background: {', '.join(twice)} is named more than once; name each once")
        self._short_side = short_side
        self._values = list(range(first, first + len(self.synonyms))) if values is None else values
        self._ignored = list({255}.difference(self._values)) if ignored is None else ignored
        _check_values(self._values, self._ignored, self.class_names)
        top, self._masks = Path(root), Path(root) / masks
        refuse_no_folder(top / images)
        refuse_no_folder(self._masks)
        stems = read_lines(top / listed) if listed else _stems(self._masks, mask_suffix)
        require(bool(stems), f"{self._masks}: no masks that end in {mask_suffix}; get the set again")
        self._files = [self._masks / f"{stem}{mask_suffix}" for stem in stems]
        lists = [top / listed] if listed else []
        super().__init__(top / images, [f"{stem}{image_suffix}" for stem in stems], [*lists, *self._files])

    def mask(self, index: int) -> np.ndarray:
        path = self._files[index]
        stored = np.asarray(stored_image(path))
        whole = stored.ndim == 2 and np.issubdtype(stored.dtype, np.integer)
        require(whole, f"{path}: a mask must have one channel of whole numbers")
        require(
            int(stored.min()) >= 0 and int(stored.max()) < HIGHEST, f"{path}: values must be from 0 to {HIGHEST - 1}"
        )
        label_of = np.full(HIGHEST, UNKNOWN, dtype=np.int16)
        label_of[self._ignored] = -1
        label_of[self._values] = np.arange(len(self._values))
        labels_HW = label_of[stored]
        if (labels_HW == UNKNOWN).any():
            value = int(stored[labels_HW == UNKNOWN][0])
            raise InputError(f"{path}: the value {value} is no class's; correct first or values, or add it to ignored")
        return labels_HW

    def short_side(self, image_size: int) -> int:
        return super().short_side(image_size) if self._short_side is None else self._short_side

    def truth_stamp(self) -> str:
        stamp = stamp_of_files(path for path in self._files if os.path.isfile(path))
        return hex_digest([stamp, self._values, self._ignored])


def _check_values(values: list[int], ignored: list[int], names: list[str]) -> None:
    if not len(set(values)) == len(values) == len(names):
        raise InputError(f"values: {len(set(values))} for {len(names)} classes; give each class one of its own")
    for option, given in (("first or values", values), ("ignored", ignored)):
        outside = [value for value in given if not 0 <= value < HIGHEST]
        require(not outside, f"{option}: {outside[:1]} must be between 0 and {HIGHEST - 1}")
    for value, name in zip(values, names, strict=True):
        require(value not in ignored, f"ignored: {value} is the value of the class {name!r}; correct one of both")


def _stems(folder: Path, suffix: str) -> list[str]:
    """List the files below a folder that end in ``suffix``: their sorted paths, without the suffix."""
    paths = (Path(top, name).relative_to(folder) for top, _, names in os.walk(folder) for name in names)
    return sorted(path.as_posix().removesuffix(suffix) for path in paths if path.name.endswith(suffix))
