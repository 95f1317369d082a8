"""The sets that have a miniature: ``miniatures.yaml`` lists them, and this module writes and opens them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datamodules import evaluation as sets
from lit_clip.evaluation.data import LabelledImages
from tests.helpers import miniature_arrays
from tests.helpers.coloured_sets import paint, write_files, write_objectnet
from tests.helpers.miniature_images import Row, Rows

Files = dict[str, Any]


@dataclass
class Miniature:
    """A set and its miniature.

    Attributes:
        make: the set's class.
        names: its class names; of a set with many, some by their label.
        rows: the rows of each split; a set without splits has one called ``all``.
        folder: folder of the images' keys, in which ``{split}`` is replaced, or each split's; None: they are in arrays.
        files: the other files, see :func:`write_files`.
        more: writes further files; it gets the folder and the rows.
        index: a file that lists the set's content, to be corrupted by tests; empty: there is none.
        options: arguments for so few images.
        pixels: the file with the pixels, for a set in arrays.
        torchvision: the name of torchvision's class, if it can read the miniature.
        mistakes: other content of a file, None for none, and words of the error.
        truth: the set's further truth.
        drawn: whether splits are drawn from all images of the folders.
    """

    make: Callable[..., Any]
    names: Sequence[str] | dict[int, str]
    rows: Rows
    folder: str | dict[str, str] | None = ""
    files: Files = field(default_factory=dict)
    more: Callable[[Path, Rows], object] = lambda root, rows: None
    index: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    pixels: str = ""
    torchvision: str = ""
    mistakes: dict[str, tuple[Any, str]] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)
    drawn: bool = False

    def write(self, root: Path) -> Rows:
        """Write the miniature, and return its rows."""
        for split, rows in self.rows.items():
            folder = self.folder[split] if isinstance(self.folder, dict) else self.folder
            for row in rows if folder is not None else ():
                paint(root / f"{folder}".format(split=split) / row.key, row.number)
        write_files(root, self.files)
        self.more(root, self.rows)
        return self.rows


def rows_of(splits: dict[str, str], first: int) -> Rows:
    rows: Rows = {}
    for split, text in splits.items():
        rows[split] = []
        for described in text.split():
            key, label, *number = described.split("=")
            rows[split].append(Row(key, int(label), int(number[0]) if number else first))
            first += 1
    return rows


def write_others(root: Path, rows: Rows) -> None:
    """Write the images of EuroSAT that are in no split."""
    used = {row.key for some in rows.values() for row in some}
    keys = [f"{name}/{name}_{number}.jpg" for name in {key.split("/")[0] for key in used} for number in range(7, 14)]
    write_files(root / "eurosat/2750", {key: 200 for key in keys if key not in used})


VOC_OBJECTS = {  # image: its objects; an asterisk marks difficult ones
    "000005": ["chair*", "chair", "chair*"],
    "000007": ["car", "person*"],
    "000009": ["horse", "person", "person"],
    "000001": ["dog", "tvmonitor*"],
    "000002": ["pottedplant"],
}


def write_annotations(root: Path, rows: Rows) -> None:
    files: Files = {}
    for split, some in rows.items():
        files[f"ImageSets/Main/{split}.txt"] = "".join(f"{Path(row.key).stem}\n" for row in some)
    for image, things in VOC_OBJECTS.items():
        objects = "".join(
            f"<object><name>{thing.rstrip('*')}</name><difficult>{int(thing.endswith('*'))}</difficult>"
            "<part><name>head</name></part><bndbox><xmin>1</xmin></bndbox></object>"
            for thing in things
        )
        text = f"<annotation><folder>VOC2007</folder><filename>{image}.jpg</filename>{objects}</annotation>"
        files[f"Annotations/{image}.xml"] = text
    write_files(root / "VOCdevkit/VOC2007", files)


KITTI_LABELS: list[tuple[list[tuple[str, float]], int]] = [  # an image's objects (kind and distance), and its label
    ([("Car", 7.9), ("Pedestrian", 3.0)], 0),
    ([("Car", 30.0), ("Van", 8.0)], 0),
    ([("Truck", 8.01), ("DontCare", -1000.0)], 1),
    ([("Car", 20.0)], 1),
    ([("Car", 20.5), ("Tram", 5.0)], 2),
    ([("Cyclist", 5.0), ("DontCare", -1000.0)], 3),
]
KITTI_ORDER = np.random.RandomState(5).permutation(36)  # image -> line
KITTI_VIDEOS = [f"2011_09_26_drive_{line // 3:04}_sync" for line in range(36)]


def kitti() -> Rows:
    """36 images of 12 videos; numpy's legacy generator draws one video for ``val`` and one for ``test``."""
    state = np.random.get_state()
    np.random.seed(123)
    test = np.random.choice(sorted(set(KITTI_VIDEOS)), 1, replace=False)[0]
    val = np.random.choice(sorted(set(KITTI_VIDEOS) - {test}), 1, replace=False)[0]
    np.random.set_state(state)
    rows: Rows = {"train": [], "val": [], "test": []}
    for image, line in enumerate(KITTI_ORDER):
        split = {test: "test", val: "val"}.get(KITTI_VIDEOS[line], "train")
        rows[split].append(Row(f"image_2/{image:06}.png", KITTI_LABELS[image % 6][1], image))
    return rows


def write_kitti(root: Path, rows: Rows) -> None:
    videos = "".join(f"2011_09_26 {video} {line:010}\n" for line, video in enumerate(KITTI_VIDEOS))
    order = ",".join(str(line + 1) for line in KITTI_ORDER)
    files = {"mapping/train_mapping.txt": videos, "mapping/train_rand.txt": order}
    for image in range(36):
        objects = KITTI_LABELS[image % 6][0]
        lines = (f"{kind} 0.00 0 -0.20 1 2 3 4 1.89 0.48 1.20 1.84 1.47 {z} 0.01\n" for kind, z in objects)
        files[f"training/label_2/{image:06}.txt"] = "".join(lines)
    write_files(root / "Kitti/raw", files)


def write_signs(root: Path, rows: Rows) -> None:
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    files: Files = {f"GTSRB/Training/{label:05}/GT-{label:05}.csv": header for label in range(43)}
    files["GT-final_test.csv"] = header + "".join(f"{row.key};9;6;1;1;8;5;{row.label}\n" for row in rows["test"])
    write_files(root / "gtsrb", files)


COMPUTED: dict[str, Rows] = {
    "fer2013": miniature_arrays.FACES,
    "gtsrb": rows_of(
        {"train": " ".join(f"{n:05}/0.ppm={n}" for n in range(43)), "test": "0.ppm=14 1.ppm=1 2.ppm=42"}, 1
    ),
    "kitti": kitti(),
}
WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    **{name: each for name, each in vars(miniature_arrays).items() if name.startswith("write_")},
    **{each.__name__: each for each in (write_annotations, write_kitti, write_others, write_signs)},
    "write_objectnet": lambda root, rows: write_objectnet(root),
    "write_stl10_fold": lambda root, rows: miniature_arrays.write_stl10(root, MINIATURES["stl10"].rows),
}


def _miniature(name: str, entry: dict[str, Any]) -> Miniature:
    rows = COMPUTED.get(name) or rows_of(entry["rows"], int(entry.get("folder", "") is not None))
    made = {"make": getattr(sets, entry["make"]), "rows": rows}
    return Miniature(**{**entry, **made, **({"more": WRITERS[entry["more"]]} if "more" in entry else {})})


TABLE = yaml.safe_load(Path(__file__).with_name("miniatures.yaml").read_text(encoding="utf-8"))
MINIATURES = {name: _miniature(name, entry) for name, entry in TABLE.items()}


def open_miniature(miniature: Miniature, root: Path, split: str) -> LabelledImages:
    return miniature.make(str(root), **({} if split == "all" else {"split": split}), **miniature.options)
