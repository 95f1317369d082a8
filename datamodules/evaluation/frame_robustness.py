"""Video frames with neighbouring frames that look the same to people: ImageNet-Vid-Robust and YTBB-Robust.

From "Do Image Classifiers Generalize Across Time?", arXiv 1906.02168. The rules follow its authors' scoring:
github.com/modestyachts/imagenet-vid-robust-example and github.com/modestyachts/imagenet-testbed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from lightning.pytorch.utilities import rank_zero_info

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Truth
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import entries
from .annotation_files import AGAIN, find, read_json, read_table, whole_number
from .image_files import ImageFiles

MAX_DISTANCE = 10  # frames between an anchor and its neighbours
ANCHORS_TABLE = "ytbb_robustness_test_anchors_full.csv"
NO_CLASS = "none"  # YouTube-BoundingBoxes' class of frames without any of its objects
PROBLEMS = frozenset(
    {
        *("dissimilar", "problematic", "incorrect", "dont know", "deformation"),
        *("background-change", "occlusion-increased", "blur-increase", "bad-anchor"),
    }
)
REVIEW = entries({"key": str, "labels": list[int | str]}, total=True)
REVIEWS = entries({"labels": list[str] | dict[str, str], "annotations": list[REVIEW]}, total=True)


def _neighbouring_frames(
    root: Path,
    anchors: Mapping[str, list[str]],
    accepted: Mapping[str, set[int]],
    class_names: list[str],
    annotations: Sequence[Path],
    in_imagenet: Callable[[], list[list[int]]],
) -> ImageFiles:
    """Return anchor frames and their neighbours, each frame once, sorted by name, which is its path below ``root``."""
    require(bool(anchors), f"{root}: no anchors; get the metadata again")
    names = sorted({*anchors, *(name for frames in anchors.values() for name in frames)})
    for name in names:
        classes = accepted.get(name)
        if not classes or not classes <= {*range(len(class_names))}:
            labels = f"{sorted(classes or ())}, with {len(class_names)} classes"
            raise InputError(f"{root}: {name} has the labels {labels}; get the metadata again")
    row_of = {name: row for row, name in enumerate(names)}
    others = {anchor: [row_of[name] for name in frames if name != anchor] for anchor, frames in anchors.items()}
    neighbours = [(row_of[anchor], rows) for anchor, rows in others.items()]
    truth = Truth(neighbours=neighbours, accepted=[accepted[name] for name in names])
    # labels() can only give one of the accepted labels: the first.
    rows = [(name, min(accepted[name])) for name in names]
    images = ImageFiles(root, rows, range(len(class_names)), annotations, class_names, truth)
    images.in_imagenet = in_imagenet
    return images


def ImageNetVidRobust(root: str) -> ImageFiles:
    """ImageNet-Vid-Robust: ``val/VIDEO/FRAME.JPEG``, ``metadata/{pmsets,labels}.json``, ``misc/``; 30 classes.

    A probe trained on ImageNet needs ``rev_class_idx_map.json`` of github.com/modestyachts/imagenet-testbed too, in
    ``metadata`` or ``misc``.
    """
    metadata = find(Path(root), ("metadata", "imagenet-vid-robust/metadata"), "metadata")
    top = metadata.parent
    index = top / "misc/imagenet_vid_class_index.json"
    sets, labelled = metadata / "pmsets.json", metadata / "labels.json"
    names = _class_names(index)
    anchors, labels = read_json(sets, dict[str, list[str]]), read_json(labelled, dict[str, list[int]])
    accepted = {name: set(classes) for name, classes in labels.items()}
    in_imagenet = partial(_imagenet_labels, top, ("metadata/", "misc/"), range(len(names)))
    return _neighbouring_frames(top, anchors, accepted, names, [index, sets, labelled], in_imagenet)


def _imagenet_labels(folder: Path, places: Sequence[str], classes: Iterable[int]) -> list[list[int]]:
    """Read ImageNet's labels for each class from ``{"0": [404], ...}``; an absent class has none."""
    path = find(folder, [f"{place}rev_class_idx_map.json" for place in places], "classes of ImageNet")
    values = read_json(path, dict[str, list[int]])
    return [values.get(str(number), []) for number in classes]


def _class_names(path: Path) -> list[str]:
    """Read ``{"0": ["n02691156", "airplane"], ...}`` or ``{"0": "airplane", ...}``."""
    values = read_json(path, dict[str, str | tuple[str, str]])
    missing = next((label for label in range(len(values) or 1) if str(label) not in values), None)
    require(missing is None, f"{path}: no class '{missing}'; its keys must be 0 to {len(values) - 1}")
    named = [values[str(label)] for label in range(len(values))]
    return [(name if isinstance(name, str) else name[1]).replace("_", " ") for name in named]


def YTBBRobust(root: str) -> ImageFiles:
    """YTBB-Robust: ``ytbb_videos/VIDEO_MS/frame-NUMBER.jpg``, and the metadata from its authors' testbed.

    An anchor counts if reviewers marked it good; its labels are its video's class and the labels that reviewers added.
    A neighbour counts if it is at most ten frames away and reviewers marked it similar without a problem; it has the
    anchor's labels. "none" is not used as a class: anchors that have only this label are left out.

    ``anchor_labels.json``, ``pmk_labels.json``, ``ytbb_class_index.json`` and
    ``ytbb_robustness_test_anchors_full.csv`` lie beside ``ytbb_videos``, in ``metadata`` or in
    ``ytbb-robust_metadata``.
    """
    videos = find(Path(root), ("ytbb_videos", "ytbb-robust/ytbb_videos"), "folder of frames")
    folders = ("metadata/", "ytbb-robust_metadata/", "")
    metadata = find(videos.parent, [f"{folder}anchor_labels.json" for folder in folders], "metadata").parent
    names = _class_names(metadata / "ytbb_class_index.json")
    kept = [label for label, name in enumerate(names) if name != NO_CLASS]
    label_of = {names[label]: new_label for new_label, label in enumerate(kept)}
    class_of_video = _classes_of_videos(metadata / ANCHORS_TABLE, names)
    good, bad_anchors, pairs = _reviewed(metadata)
    anchors: dict[str, list[str]] = {}
    accepted: dict[str, set[int]] = {}
    without_class = 0
    for anchor, added in good.items():
        if anchor in bad_anchors:
            continue
        folder = anchor.split("/")[0]
        require(folder in class_of_video, f"{metadata}: {folder} is not in {ANCHORS_TABLE}")
        classes = {label_of[name] for name in {class_of_video[folder], *added} if name in label_of}
        if not classes:
            without_class += 1
            continue
        anchors[anchor] = sorted(pairs.get(anchor, ()), key=_frame_number)
        accepted |= dict.fromkeys([anchor, *anchors[anchor]], classes)
    if without_class:
        rank_zero_info(f"{videos}: left out {without_class} anchors without a class")
    files = ("anchor_labels.json", "pmk_labels.json", "ytbb_class_index.json", ANCHORS_TABLE)
    annotations, in_imagenet = [metadata / name for name in files], partial(_imagenet_labels, metadata, ("",), kept)
    return _neighbouring_frames(videos, anchors, accepted, [names[label] for label in kept], annotations, in_imagenet)


def _frame_name(path: str) -> str:
    return "/".join(PurePosixPath(path).parts[-2:])


def _frame_number(name: str) -> int:
    found = whole_number(name.rpartition("-")[2].partition(".")[0])
    if found is None:
        raise InputError(f"{name}: a frame must be named frame-NUMBER.jpg; get the metadata again")
    return found


def _annotations(path: Path) -> dict[str, set[str]]:
    """Read the reviewers' labels of each key; if a key has several reviews, the last one counts."""
    values = read_json(path, REVIEWS)
    with reading(path, "file of lists called labels and annotations", hint=AGAIN):
        return {row["key"]: {values["labels"][label] for label in row["labels"]} for row in values["annotations"]}


def _classes_of_videos(path: Path, names: list[str]) -> dict[str, str]:
    """Read the class name of each ``VIDEO_MS``. The table numbers the last two classes the other way round."""
    swapped = {22: 23, 23: 22}
    found = {}
    for row in read_table(path, {"video": ("ytid",), "time": ("time_ms",), "label": ("label",)}):
        name, number = f"{row['video']}_{row['time']}", whole_number(row["label"])
        label = len(names) if number is None else swapped.get(number, number)
        if label >= len(names):
            problem = f"{name} has the label {row['label'][:40]!r}, but there are {len(names)} classes"
            raise InputError(f"{path}: {problem}; {AGAIN}")
        found[name] = names[label]
    return found


def _reviewed(metadata: Path) -> tuple[dict[str, set[str]], set[str], dict[str, set[str]]]:
    """Read the reviews: labels of good anchors, bad anchors, and the accepted neighbours of each anchor."""
    good = {
        _frame_name(key): labels
        for key, labels in _annotations(metadata / "anchor_labels.json").items()
        if "good" in labels and not labels & {"bad", "unsure"}
    }
    bad_anchors: set[str] = set()
    pairs: dict[str, set[str]] = {}
    for key, labels in _annotations(metadata / "pmk_labels.json").items():
        anchor, _, frame = key.partition(",")
        anchor, frame = _frame_name(anchor), _frame_name(frame)
        if "bad-anchor" in labels:
            bad_anchors.add(anchor)
        alike = "similar" in labels and not labels & PROBLEMS and anchor.split("/")[0] == frame.split("/")[0]
        if alike and 0 < abs(_frame_number(frame) - _frame_number(anchor)) <= MAX_DISTANCE:
            pairs.setdefault(anchor, set()).add(frame)
    return good, bad_anchors, pairs
