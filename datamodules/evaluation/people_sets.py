"""Sets of people: FairFace, with groups to compare accuracy over, and CelebA's identities."""

import re
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from datamodules.evaluation.annotation_files import find, read_lines, read_table, read_words
from datamodules.evaluation.image_files import ImageFiles, TrainValTest
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Grouped

Attribute = Literal["race", "gender", "age"]
FAIRFACE: dict[str, list[str]] = {  # as the tables write them
    "race": ["White", "Black", "Indian", "East Asian", "Southeast Asian", "Middle Eastern", "Latino_Hispanic"],
    "gender": ["Male", "Female"],
    "age": ["0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"],
}


class FairFace(ImageFiles, Grouped):
    """FairFace: ``fairface_label_val.csv`` and ``val/1.jpg``; one attribute is the class, all three are groups.

    ``race`` has 7 classes, ``gender`` 2 and ``age`` 9; ``val`` is the usual test split.
    """

    def __init__(self, root: str, attribute: Attribute = "race", split: Literal["train", "val"] = "val") -> None:
        require(attribute in FAIRFACE, f"attribute: must be one of {', '.join(FAIRFACE)}, not {attribute!r}")
        table = find(Path(root), (f"fairface_label_{split}.csv",), f"fairface_label_{split}.csv")
        folders = ("", "fairface-img-margin125-trainval/", "fairface-img-margin025-trainval/")
        images = find(Path(root), [f"{folder}{split}" for folder in folders], "images").parent
        rows = read_table(table, {"file": ("file",), **{name: (name,) for name in get_args(Attribute)}})
        for row in rows:
            for name, values in FAIRFACE.items():
                require(
                    row[name] in values, f"{table}: {row['file']}: {name} is {row[name]!r}, not {', '.join(values)}"
                )
        labels = [FAIRFACE[attribute].index(row[attribute]) for row in rows]
        super().__init__(images, [row["file"] for row in rows], labels, list(FAIRFACE[attribute]), [table])
        self._groups = {name: [row[name] for row in rows] for name in FAIRFACE}

    def groups(self) -> dict[str, list[str]]:
        return {name: list(values) for name, values in self._groups.items()}


def CelebAIdentities(
    root: str, names: str = "identity_names.txt", identities: int = 100, split: TrainValTest | None = None
) -> ImageFiles:
    """CelebA's people by name: ``identity_CelebA.txt``, ``list_eval_partition.txt``, ``img_align_celeba`` and names.

    CelebA only numbers the people. Their names come from a file of the user's with a number and a name on each line
    (``2880 Some Body`` or ``2880,Some_Body``). Classes are the ``identities`` named people with the most images, ties
    going to the smaller number; all other images are left out. The paper does not say which people it used.

    Args:
        root: the folder of these files.
        names: the file of names, below ``root``.
        identities: number of classes; the paper has 100, 1,000 and 2,000.
        split: the partition; None: all, since no person is in two partitions.
    """
    top = Path(root)
    identity = find(top, ("identity_CelebA.txt",), "identity_CelebA.txt")
    annotations = [identity, find(top, (names,), "file of the people's names")]
    person_of, name_of = dict(read_words(identity, 2)), _names_of_people(annotations[1])
    images = [name for name, person in person_of.items() if person in name_of]
    if split is not None:
        partition = str(get_args(TrainValTest).index(split))
        annotations.append(find(top, ("list_eval_partition.txt",), "list_eval_partition.txt"))
        partition_of = dict(read_words(annotations[-1], 2))
        images = [name for name in images if partition_of.get(name) == partition]
    counts = Counter(person_of[name] for name in images)
    require(identities > 1, f"identities: must be at least 2, not {identities}")
    require(
        identities <= len(counts),
        f"identities: {identities} is more than the {len(counts)} named people with images; "
        f"lower it, or add names to {top / names}",
    )
    people = sorted(counts, key=lambda person: (-counts[person], int(person)))[:identities]
    label_of = {person: label for label, person in enumerate(people)}
    kept = [name for name in images if person_of[name] in label_of]
    folder = find(top, ("img_align_celeba", "img_celeba"), "folder of images")
    labels = [label_of[person_of[name]] for name in kept]
    return ImageFiles(folder, kept, labels, [name_of[person] for person in people], annotations)


def _names_of_people(path: Path) -> dict[str, str]:
    names = {}
    for line in read_lines(path):
        match = re.fullmatch(r"([0-9]{1,18})[\s,;:]+(.+)", line)
        if match:
            names[match[1]] = match[2].strip().strip('"').replace("_", " ")
        elif names:  # the first line may be a header
            raise InputError(f"{path}: {line!r} is not a number and a name; fix the line")
    return names
