"""UCF101, Kinetics700, RareAct, ImageNet-Vid-Robust and YTBB-Robust, and frames of real videos."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from datamodules.evaluation import UCF101, ImageNetVidRobust, Kinetics700, RareAct, YTBBRobust
from datamodules.evaluation.image_files import ImageFiles
from datamodules.evaluation.video_sets import read_frames
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from tests.conftest import ROOT
from tests.helpers.coloured_sets import colour, colour_of, message_of, write_files
from tests.helpers.videos import frame_colours, nearest_frame, write_table, write_video

CLASSES = ["Archery", "Hammering", "HammerThrow", "JumpingJack", "JumpRope"]  # in the order of classInd.txt


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    """One training and one test clip per class, swapped in the third fold."""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i + 1} {name}\r\n" for i, name in enumerate(CLASSES)))
    for fold in (1, 2, 3):
        train, test = ("g01", "g02") if fold < 3 else ("g02", "g01")
        clips = [f"{name}/v_{name}_{{}}_c01.avi" for name in CLASSES]
        (lists / f"trainlist0{fold}.txt").write_text(
            "".join(f"{clip.format(train)} {i + 1}\n" for i, clip in enumerate(clips))
        )
        (lists / f"testlist0{fold}.txt").write_text("".join(f"{clip.format(test)}\n" for clip in clips))
    for i, name in enumerate(CLASSES):
        for group in ("g01", "g02"):
            base = 40 * i + 20 * (group == "g02")
            write_video(tmp_path / f"UCF-101/{name}/v_{name}_{group}_c01.avi", frame_colours(5, base))
    return tmp_path


def test_ucf101_has_the_papers_class_order_and_three_folds(ucf101: Path) -> None:
    train, test = UCF101(str(ucf101), "train"), UCF101(str(ucf101), "test", fold=1)
    assert test.class_names == ["Archery", "Hammer Throw", "Hammering", "Jump Rope", "Jumping Jack"]
    assert test.labels() == train.labels() == [0, 2, 1, 4, 3]
    assert test.key(1) == "Hammering/v_Hammering_g02_c01.avi"
    assert train.key(1) == "Hammering/v_Hammering_g01_c01.avi"
    third = UCF101(str(ucf101), "test", fold=3)
    assert [third.key(i) for i in range(5)] == [train.key(i) for i in range(5)]
    assert third.stamp() == train.stamp() != test.stamp()
    assert "fold" in message_of(lambda: UCF101(str(ucf101), "test", fold=0))


def test_root_may_be_relative(ucf101: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = UCF101(str(ucf101), "test")
    monkeypatch.chdir(ucf101.parent)
    videos = UCF101(ucf101.name, "test")
    assert [videos.key(i) for i in range(5)] == [whole.key(i) for i in range(5)]
    assert videos.images(0)[0].tobytes() == whole.images(0)[0].tobytes()
    prompts = json.loads((ROOT / "lit_clip/evaluation/paper_prompts.json").read_text(encoding="utf-8"))["sets"]
    words = [prompts["UCF101"]["classes"].index(name) for name in whole.class_names]
    assert words == sorted(words)


def test_frames_option_selects_the_centre_or_all_frames(ucf101: Path) -> None:
    centre, everything = UCF101(str(ucf101), "test"), UCF101(str(ucf101), "test", frames="all")
    expected = frame_colours(5, 40 * 2 + 20)
    assert [nearest_frame(image, expected) for image in centre.images(2)] == [2]
    assert [nearest_frame(image, expected) for image in everything.images(2)] == [0, 1, 2, 3, 4]
    image, label = everything[2]
    assert (nearest_frame(image, expected), label) == (2, 1)
    assert centre.stamp() != everything.stamp()
    copy = pickle.loads(pickle.dumps(everything))
    assert len(copy.images(2)) == 5
    assert copy.stamp() == everything.stamp()
    assert "middle" in message_of(lambda: UCF101(str(ucf101), "test", frames="middle"))  # pyright: ignore


def test_ucf101_counts_missing_videos_and_names_missing_lists(ucf101: Path, tmp_path: Path) -> None:
    (ucf101 / "UCF-101/Archery/v_Archery_g02_c01.avi").unlink()
    left = UCF101(str(ucf101), "test")
    assert (len(left), left.absent) == (4, 1)
    (ucf101 / "ucfTrainTestlist/testlist02.txt").write_text("Fencing/v_Fencing_g01_c01.avi\n")
    assert "Fencing" in message_of(lambda: UCF101(str(ucf101), "test", fold=2))
    (ucf101 / "ucfTrainTestlist/testlist02.txt").unlink()
    assert "testlist02.txt" in message_of(lambda: UCF101(str(ucf101), "test", fold=2), MissingData)
    assert str(tmp_path / "nowhere") in message_of(lambda: UCF101(str(tmp_path / "nowhere"), "test"), MissingData)


def test_kinetics_finds_clips_by_name_and_counts_missing_ones(tmp_path: Path) -> None:
    header = "label,youtube_id,time_start,time_end,split"
    rows = [
        ["yoga", "-0abc_DEF12", 10, 20, "val"],
        ["acting in play", "gonegonegon", 1, 11, "val"],
        ["acting in play", "xy", 3, 13, "val"],
        ["yoga", "plainplain0", 3, 13, "val"],
    ]
    write_table(tmp_path / "annotations/val.csv", header, rows)
    write_table(tmp_path / "annotations/train.csv", header, [["abseiling", "other", 3, 13, "train"]])
    write_video(tmp_path / "val/yoga/-0abc_DEF12_000010_000020.mp4", frame_colours(3))
    write_video(tmp_path / "val/acting_in_play/xy_000003_000013.mp4", frame_colours(3))  # torchvision's folder name
    write_video(tmp_path / "val/yoga/plainplain0.mkv", frame_colours(3))
    clips = Kinetics700(str(tmp_path), "val")
    assert clips.class_names == ["abseiling", "acting in play", "yoga"]
    assert clips.labels() == [2, 1, 2]
    assert [clips.key(i) for i in range(3)] == [
        "val/yoga/-0abc_DEF12_000010_000020.mp4",
        "val/acting_in_play/xy_000003_000013.mp4",
        "val/yoga/plainplain0.mkv",
    ]
    assert clips.absent == 1
    assert nearest_frame(clips[1][0], frame_colours(3)) == 1
    assert "train" in message_of(lambda: Kinetics700(str(tmp_path), "train"), MissingData)
    write_table(tmp_path / "annotations/val.csv", "name,youtube_id", [["yoga", "xy"]])
    assert "name, youtube_id" in message_of(lambda: Kinetics700(str(tmp_path), "val"))


def test_kinetics_table_without_times_finds_clips_by_id(tmp_path: Path) -> None:
    write_table(tmp_path / "val.csv", "youtube_id,label", [["b", "yoga"], ["a", "archery"]])
    write_video(tmp_path / "val/a_000001_000011.mp4", frame_colours(3))
    write_video(tmp_path / "val/yoga/b_000001_000011.mp4", frame_colours(3))
    clips = Kinetics700(str(tmp_path), "val")
    assert (clips.labels(), clips.key(1)) == ([1, 0], "val/a_000001_000011.mp4")
    for file in tmp_path.rglob("*.mp4"):
        file.unlink()
    assert "none of the 2 videos" in message_of(lambda: Kinetics700(str(tmp_path), "val"), MissingData)


def test_rareact_rows_are_spans_with_verb_noun_and_code(tmp_path: Path) -> None:
    rows = [
        [0, "one", 0, 1, 1, "cut", "phone", 1],
        [1, "one", 1, 2, 0, "cut", "laptop", 3],
        [2, "two", 0, 1, 2, "drink", "egg", 0],
        [3, "gone", 0, 1, 2, "drink", "egg", 1],
        [4, "one", 0, 1, 0, "cut", "laptop", 2],
    ]
    write_table(tmp_path / "rareact.csv", "id,video_id,start,end,class_id,verb,noun,annotation", rows)
    write_video(tmp_path / "rareact/one.mp4", frame_colours(20))
    write_video(tmp_path / "rareact/two.mp4", frame_colours(10, 30))
    clips = RareAct(str(tmp_path))
    assert clips.class_names == ["cut laptop", "cut phone", "drink egg"]
    assert clips.labels() == [1, 0, 2, 0]
    assert clips.truth.annotations == {
        "verb": ["cut", "cut", "drink"],
        "noun": ["laptop", "phone", "egg"],
        "annotation": [1, 3, 0, 2],
        "video": ["one", "one", "two", "one"],
    }
    assert [nearest_frame(image, frame_colours(20)) for image in clips.images(1)] == list(range(10, 20))
    assert len(RareAct(str(tmp_path), frames="centre").images(1)) == 1
    assert clips.key(1) == "rareact/one.mp4:1-2"
    assert clips.absent == 1
    stamp = clips.stamp()
    assert pickle.loads(pickle.dumps(clips)).stamp() == stamp
    rows[1][2] = 0.5
    write_table(tmp_path / "rareact.csv", "id,video_id,start,end,class_id,verb,noun,annotation", rows)
    assert RareAct(str(tmp_path)).stamp() != stamp
    rows[0][6] = "pizza"
    rows[0][4] = 0
    write_table(tmp_path / "rareact.csv", "id,video_id,start,end,class_id,verb,noun,annotation", rows)
    assert "cut pizza" in message_of(lambda: RareAct(str(tmp_path)))
    assert "rareact.csv" in message_of(lambda: RareAct(str(tmp_path / "rareact")), MissingData)


def test_videos_are_not_judged_as_image_files_before_training(ucf101: Path) -> None:
    videos = UCF101(str(ucf101), "test")
    images = ImageFiles(videos.root, [(file, 0) for file in videos.files], [0])
    with pytest.raises(InputError, match="not an image"):
        images.check()  # what the videos inherit
    videos.check()
    assert len(videos.images(0)) > 0


FORMATS = {  # file name: options of the encoder
    "mpeg4.mp4": {},
    "mpeg4.avi": {},
    "bidirectional.avi": {"max_b_frames": 2},
    "h264.mp4": {"codec": "libx264"},
    "vp8.webm": {"codec": "libvpx"},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("number", [1, 2, 13, 24])
def test_centre_frame_is_the_middle_one(name: str, number: int, tmp_path: Path) -> None:
    frames = frame_colours(number)
    path = write_video(tmp_path / name, frames, **FORMATS[name])
    (image,) = read_frames(path, "centre")
    assert nearest_frame(image, frames) == number // 2
    assert image.size == (32, 32)
    assert image.mode == "RGB"


@pytest.mark.parametrize("name", FORMATS)
def test_all_frames_come_in_display_order(name: str, tmp_path: Path) -> None:
    frames = frame_colours(13)
    path = write_video(tmp_path / name, frames, **FORMATS[name])
    assert [nearest_frame(image, frames) for image in read_frames(path, "all")] == list(range(13))


@pytest.mark.parametrize("name", ["mpeg4.mp4", "bidirectional.avi", "vp8.webm"])
def test_span_selects_frames_by_seconds(name: str, tmp_path: Path) -> None:
    frames = frame_colours(24)
    path = write_video(tmp_path / name, frames, **FORMATS[name])
    assert [nearest_frame(image, frames) for image in read_frames(path, "all", (1.0, 1.5))] == [10, 11, 12, 13, 14]
    assert [nearest_frame(image, frames) for image in read_frames(path, "centre", (1.0, 1.5))] == [12]
    assert "from 60 to 70 s" in message_of(lambda: read_frames(path, "all", (60.0, 70.0)))


def test_broken_empty_and_missing_videos_are_errors_naming_the_file(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", frame_colours(5)).read_bytes()
    for name, content in {"empty.mp4": b"", "junk.avi": b"no video" * 99, "cut.mp4": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in message_of(lambda name=name: read_frames(tmp_path / name, "centre"))
    assert "gone.mp4" in message_of(lambda: read_frames(tmp_path / "gone.mp4", "all"))
    for number in (1, 5):
        raw = write_video(tmp_path / "raw.h264", frame_colours(number), codec="libx264")
        assert "raw.h264: frames without timestamps" in message_of(lambda raw=raw: read_frames(raw, "centre"))


def test_without_pyav_the_error_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", frame_colours(2))
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install av" in message_of(lambda: read_frames(path, "centre"))


def test_imagenet_vid_robust_has_anchors_neighbours_and_accepted_classes(tmp_path: Path) -> None:
    top = tmp_path / "imagenet-vid-robust"
    first, second = "val/ILSVRC2015_val_00000000", "val/ILSVRC2015_val_00000001"
    names = [f"{first}/{number:06}.JPEG" for number in (3, 4, 5)] + [f"{second}/000010.JPEG"]
    labels = {names[0]: [1], names[1]: [1, 0], names[2]: [1], names[3]: [2]}
    classes = {"0": ["n02691156", "airplane"], "1": ["n02419796", "giant_panda"], "2": ["n02131653", "bear"]}
    files = {name: number for number, name in enumerate([*names, f"{first}/000099.JPEG"])}
    files |= {"metadata/pmsets.json": {names[3]: [], names[1]: [names[2], names[0], names[1]]}}
    write_files(top, {**files, "metadata/labels.json": labels, "misc/imagenet_vid_class_index.json": classes})
    frames = ImageNetVidRobust(str(tmp_path))
    assert [frames.key(i) for i in range(len(frames))] == names  # each once, and only those of an anchor
    assert frames.class_names == ["airplane", "giant panda", "bear"]
    assert frames.truth.neighbours == [(3, []), (1, [2, 0])]
    assert frames.truth.accepted == [{1}, {0, 1}, {1}, {2}]
    assert frames.labels() == [1, 0, 1, 2]
    assert colour_of(frames, 2) == colour(2)
    copy = pickle.loads(pickle.dumps(ImageNetVidRobust(str(top))))
    assert (copy.truth.neighbours, copy.stamp()) == (frames.truth.neighbours, frames.stamp())
    write_files(top, {"metadata/rev_class_idx_map.json": {"0": [404], "1": [388], "2": [294, 295]}})
    assert frames.in_imagenet is not None
    assert frames.in_imagenet() == [[404], [388], [294, 295]]
    for changed, words in (({**labels, names[1]: [3]}, names[1]), ([], "labels.json")):
        write_files(top, {"metadata/labels.json": changed})
        assert words in message_of(lambda: ImageNetVidRobust(str(top)))
    (top / "metadata/pmsets.json").unlink()
    assert "pmsets.json" in message_of(lambda: ImageNetVidRobust(str(top)), MissingData)


def test_ytbb_robust_keeps_good_anchors_and_similar_neighbours(tmp_path: Path) -> None:
    metadata = tmp_path / "ytbb-robust/metadata"
    names = {str(i): f"thing {i}" for i in range(24)} | {"0": "person", "22": "none", "23": "car"}
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
    files: dict[str, Any] = {"anchor_labels.json": {"labels": anchors, "annotations": frames}}
    files |= {"pmk_labels.json": {"labels": verdicts, "annotations": pairs}, "ytbb_class_index.json": names}
    write_files(metadata, files)
    # The table numbers car as 22 and none as 23.
    videos = [["aa", 1000, 22], ["bb", 2000, 1], ["cc", 0, 2], ["dd", 0, 3], ["ee", 0, 23]]
    write_table(metadata / "ytbb_robustness_test_anchors_full.csv", "ytid,time_ms,label", videos)
    frames_kept = dict.fromkeys((near(15), near(20), near(5), "cc_0/frame-20.jpg"), 1)
    write_files(tmp_path / "ytbb-robust/ytbb_videos", frames_kept)
    robust = YTBBRobust(str(tmp_path))
    assert [robust.key(i) for i in range(len(robust))] == [near(15), near(20), near(5), "cc_0/frame-20.jpg"]
    assert len(robust.class_names) == 23
    assert "none" not in robust.class_names
    car = robust.class_names.index("car")
    assert robust.truth.accepted == [{0, car}, {0, car}, {0, car}, {2}]
    assert robust.truth.neighbours == [(0, [2, 1]), (3, [])]  # sorted by time
    assert pickle.loads(pickle.dumps(robust)).truth.accepted == robust.truth.accepted
    assert robust.in_imagenet is not None
    assert "rev_class_idx_map.json" in message_of(robust.in_imagenet, MissingData)
    write_files(metadata, {"rev_class_idx_map.json": {"2": [404, 895], "23": [436]}})  # numbers with the class "none"
    labels = dict(zip(robust.class_names, robust.in_imagenet(), strict=True))
    assert {name: own for name, own in labels.items() if own} == {"thing 2": [404, 895], "car": [436]}
    (metadata / "pmk_labels.json").unlink()
    assert "pmk_labels.json" in message_of(lambda: YTBBRobust(str(tmp_path)), MissingData)
