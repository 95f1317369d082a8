"""Decoding frames of real videos."""

import sys
from pathlib import Path

import pytest

from datamodules.evaluation.video_frames import read_frames, times_of_frames
from tests.helpers.coloured_sets import message_of
from tests.helpers.videos import frame_colours, nearest_frame, write_video

FORMATS = {  # file name: options of the encoder
    "mpeg4.mp4": {},
    "mpeg4.avi": {},
    "bidirectional.avi": {"max_b_frames": 2},
    "h264.mp4": {"codec": "libx264"},
    "vp8.webm": {"codec": "libvpx"},
    "raw.h264": {"codec": "libx264"},  # has no timestamps
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
    assert (times_of_frames(path) is None) == (name == "raw.h264")


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


def test_without_pyav_the_error_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", frame_colours(2))
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install av" in message_of(lambda: read_frames(path, "centre"))
