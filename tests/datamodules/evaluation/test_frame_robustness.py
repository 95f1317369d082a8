"""ImageNet-Vid-Robust and YTBB-Robust."""

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.evaluation import ImageNetVidRobust, YTBBRobust
from lit_clip.evaluation.data import MissingData
from tests.helpers.coloured_sets import message_of
from tests.helpers.videos import Colour, write_table


def paint_frame(path: Path, colour: Colour = (1, 2, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_imagenet_vid_robust_has_anchors_neighbours_and_accepted_classes(tmp_path: Path) -> None:
    top = tmp_path / "imagenet-vid-robust"
    first, second = "val/ILSVRC2015_val_00000000", "val/ILSVRC2015_val_00000001"
    names = [f"{first}/{number:06}.JPEG" for number in (3, 4, 5)] + [f"{second}/000010.JPEG"]
    for i, name in enumerate([*names, f"{first}/000099.JPEG"]):
        paint_frame(top / name, (i, 0, 0))
    write_json(top / "metadata/pmsets.json", {names[3]: [], names[1]: [names[2], names[0], names[1]]})
    write_json(top / "metadata/labels.json", {names[0]: [1], names[1]: [1, 0], names[2]: [1], names[3]: [2]})
    classes = {"0": ["n02691156", "airplane"], "1": ["n02419796", "giant_panda"], "2": ["n02131653", "bear"]}
    write_json(top / "misc/imagenet_vid_class_index.json", classes)
    frames = ImageNetVidRobust(str(tmp_path))
    assert [frames.key(i) for i in range(len(frames))] == names  # each once, and only those of an anchor
    assert frames.class_names == ["airplane", "giant panda", "bear"]
    assert frames.neighbours() == [(3, []), (1, [2, 0])]
    assert frames.accepted() == [{1}, {0, 1}, {1}, {2}]
    assert frames.labels() == [1, 0, 1, 2]
    assert frames[2][0].size == (4, 4)
    copy = pickle.loads(pickle.dumps(ImageNetVidRobust(str(top))))
    assert (copy.neighbours(), copy.stamp()) == (frames.neighbours(), frames.stamp())
    write_json(top / "metadata/rev_class_idx_map.json", {"0": [404], "1": [388], "2": [294, 295]})
    assert frames.imagenet_classes() == [[404], [388], [294, 295]]
    write_json(top / "metadata/labels.json", {names[0]: [1], names[1]: [3], names[2]: [1], names[3]: [2]})
    assert names[1] in message_of(lambda: ImageNetVidRobust(str(top)))
    write_json(top / "metadata/labels.json", [])
    assert "labels.json" in message_of(lambda: ImageNetVidRobust(str(top)))
    (top / "metadata/pmsets.json").unlink()
    assert "pmsets.json" in message_of(lambda: ImageNetVidRobust(str(top)), MissingData)


def test_ytbb_robust_keeps_good_anchors_and_similar_neighbours(tmp_path: Path) -> None:
    metadata = tmp_path / "ytbb-robust/metadata"
    names = {str(i): f"thing {i}" for i in range(24)} | {"0": "person", "22": "none", "23": "car"}
    write_json(metadata / "ytbb_class_index.json", names)
    anchors = ["good", "bad", "unsure", *names.values()]

    def anchor_review(key: str, *labels: str) -> dict[str, Any]:
        return {"key": key, "labels": [anchors.index(label) for label in labels], "notes": ""}

    frames = [
        anchor_review("/data/aa_1000/frame-15.jpg", "good", "person"),
        anchor_review("bb_2000/frame-30.jpg", "good", "unsure"),
        anchor_review("cc_0/frame-20.jpg", "good"),
        anchor_review("dd_0/frame-20.jpg", "good"),
        anchor_review("ee_0/frame-20.jpg", "good"),
    ]
    write_json(metadata / "anchor_labels.json", {"labels": anchors, "annotations": frames})
    verdicts = ["similar", "dissimilar", "correct", "bad-anchor", "occlusion-increased"]

    def pair_review(anchor: str, frame: str, *labels: str) -> dict[str, Any]:
        return {"key": f"{anchor},{frame}", "labels": [verdicts.index(label) for label in labels]}

    def near(number: int) -> str:
        return f"aa_1000/frame-{number}.jpg"

    pairs = [
        pair_review(near(15), near(20), "similar", "correct"),
        pair_review(near(15), near(5), "similar"),
        pair_review(near(15), near(16), "similar", "occlusion-increased"),
        pair_review(near(15), near(14), "dissimilar"),
        pair_review(near(15), near(26), "similar"),  # too far
        pair_review(near(15), near(13), "similar"),
        pair_review(near(15), near(13), "dissimilar"),  # the last review counts
        pair_review("dd_0/frame-20.jpg", "dd_0/frame-21.jpg", "bad-anchor"),
    ]
    write_json(metadata / "pmk_labels.json", {"labels": verdicts, "annotations": pairs})
    # The table numbers car as 22 and none as 23.
    videos = [["aa", 1000, 22], ["bb", 2000, 1], ["cc", 0, 2], ["dd", 0, 3], ["ee", 0, 23]]
    write_table(metadata / "ytbb_robustness_test_anchors_full.csv", "ytid,time_ms,label", videos)
    for name in (near(15), near(20), near(5), "cc_0/frame-20.jpg"):
        paint_frame(tmp_path / "ytbb-robust/ytbb_videos" / name)
    robust = YTBBRobust(str(tmp_path))
    assert [robust.key(i) for i in range(len(robust))] == [near(15), near(20), near(5), "cc_0/frame-20.jpg"]
    assert len(robust.class_names) == 23
    assert "none" not in robust.class_names
    car = robust.class_names.index("car")
    assert robust.accepted() == [{0, car}, {0, car}, {0, car}, {2}]
    assert robust.neighbours() == [(0, [2, 1]), (3, [])]  # sorted by time
    assert pickle.loads(pickle.dumps(robust)).accepted() == robust.accepted()
    assert "rev_class_idx_map.json" in message_of(robust.imagenet_classes, MissingData)
    write_json(metadata / "rev_class_idx_map.json", {"2": [404, 895], "23": [436]})  # numbers with the class "none"
    labels = dict(zip(robust.class_names, robust.imagenet_classes(), strict=True))
    assert {name: own for name, own in labels.items() if own} == {"thing 2": [404, 895], "car": [436]}
    (metadata / "pmk_labels.json").unlink()
    assert "pmk_labels.json" in message_of(lambda: YTBBRobust(str(tmp_path)), MissingData)
