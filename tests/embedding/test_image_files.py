"""Images in a folder: every one is found, through links too, and what cannot be read is an error or counted."""

import os
from pathlib import Path

import pytest

from lit_clip.embedding.image_files import find_images, images_in
from lit_clip.errors import InputError


def names(folder: Path) -> list[str]:
    return [file.key for file in images_in(folder)]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (folder / "a.png", folder / "sub" / "b.png", elsewhere / "c.png", elsewhere / "deep" / "d.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)
    (elsewhere / "deep" / "back").symlink_to(folder)
    (folder / "one.png").symlink_to(elsewhere / "c.png")
    (folder / "self").symlink_to(folder / "self")
    assert names(folder) == ["a.png", "linked/c.png", "linked/deep/d.jpg", "one.png", "sub/b.png"]


def test_folder_that_cannot_be_read_is_an_error_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked\x1b[31m").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    scandir = os.scandir

    def refusing(path: Path) -> object:  # root can read any folder
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="locked.*cannot be read .Permission denied..*--on_error skip"):
        images_in(tmp_path)
    assert len(find_images([str(tmp_path)], "skip")) == 1
    said = capsys.readouterr().err
    assert "cannot be read: 1; the first: " in said
    assert "locked\\x1b[31m" in said.replace("\n", "")
