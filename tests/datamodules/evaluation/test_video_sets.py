"""UCF101, Kinetics700 and RareAct."""

import json
import pickle
from pathlib import Path

import pytest

from datamodules.evaluation import UCF101, Kinetics700, RareAct
from datamodules.evaluation.image_files import ImageFiles
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from tests.conftest import ROOT
from tests.helpers.coloured_sets import message_of
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


def test_paper_prompts_of_ucf101_are_in_label_order() -> None:
    path = ROOT / "lit_clip/evaluation/paper_prompts.json"
    prompts = json.loads(path.read_text(encoding="utf-8"))["sets"]["UCF101"]["classes"]
    words = [prompts.index(name) for name in ("Archery", "Hammer Throw", "Hammering", "Jump Rope", "Jumping Jack")]
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
    assert pickle.loads(pickle.dumps(clips)).labels() == [2, 1, 2]
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
    assert clips.annotations() == {
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
    images = ImageFiles(videos.root, videos.files, videos.labels(), videos.class_names)
    with pytest.raises(InputError, match="not an image"):
        images.check()  # what the videos inherit
    videos.check()
    assert len(videos.images(0)) > 0
