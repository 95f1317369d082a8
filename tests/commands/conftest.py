"""The demo that tests of its page and of its limits ask."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_clip import load_model
from lit_clip.embedding.index import INDEX
from lit_clip.heads import head_from_images, save_head
from tests.helpers.demo import running, skip_without_starlette


@pytest.fixture(scope="session")
def served(
    drawings: tuple[Path, Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Path]]:
    """The port of a running demo, and the folder of its images."""
    skip_without_starlette()
    folder = tmp_path_factory.mktemp("demo") / "photos"
    shutil.copytree(drawings[1], folder)
    (folder / "notes.txt").write_text("a secret")
    files, classes = [str(path) for path in sorted(drawings[1].iterdir())[:6]], ["one", "two", "three"]
    head = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_head(head_from_images(load_model(drawings[0]), files, [0, 1, 2] * 2, classes), head)
    options = ["--images", str(folder), "--head", str(head)]
    with running(drawings[0], folder.parent, *options) as (port, lines):
        assert any(f"{INDEX}: 64 of 64 images are new" in line for line in lines)
        yield port, folder
    assert [path.name for path in folder.parent.glob("*")] == ["photos"]
    assert (folder / INDEX).is_file()
