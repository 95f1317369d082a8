"""Find a user's image files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lit_clip.embedding.feature_files import Identity
from lit_clip.errors import InputError, require, similar_file
from lit_clip.tools.console import stderr
from lit_clip.tools.images import SUFFIXES, OnError, image_for_model, image_names, or_skip


@dataclass(frozen=True)
class ImageFile:
    """An image on disk."""

    key: str  # its name in results, unique and stable
    path: Path
    size: int = 0  # of the file, bytes
    modified: int = 0  # when the file was last written, nanoseconds

    @property
    def identity(self) -> Identity:
        """Changes with the file's content, as far as ``make`` and ``rsync`` could detect it."""
        return self.key, self.size, self.modified


class FileRows(list[ImageFile]):
    """Image files as :class:`lit_clip.embedding.reading.ImageRows`."""

    def key_and_images(self, row: int) -> tuple[str, list[Image.Image]]:
        path = self[row].path
        return str(path), [image_for_model(path)]


def image_file(key: str, path: Path) -> ImageFile:
    """Return a file in its present state."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a dangling link or no path; reading it will report that
        return ImageFile(key, path)
    return ImageFile(key, path, status.st_size, status.st_mtime_ns)


def identities_of(keys: Sequence[str], root: Path | None) -> list[Identity]:
    """Return identities of images from their keys; with ``root``, keys are paths from there."""
    return [(key, 0, 0) if root is None else image_file(key, root / key).identity for key in keys]


def images_in(folder: Path, on_error: OnError = "error") -> list[ImageFile]:
    """List the non-hidden images in a folder and below, sorted by their path in the folder, which is the key.

    Links are followed, except to a folder that the link is in. ``skip`` leaves out folders that cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder{similar_file(folder)}")
    found: list[str] = []
    unreadable: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(folder), frozenset())]
    while waiting:  # os.walk recurses, and ends at some depth
        path, above = waiting.pop()
        try:
            status, entries = os.stat(path), list(os.scandir(path))
        except OSError as error:
            unreadable.append(f"{path}: cannot be read ({error.strerror})")
            continue
        here = status.st_dev, status.st_ino
        for entry in entries if here not in above else ():
            if entry.name.startswith("."):  # editors and macOS leave hidden copies
                continue
            if os.path.isdir(entry.path):
                waiting.append((entry.path, above | {here}))
            else:
                found.append(entry.path)
    if unreadable:
        require(on_error == "skip", or_skip(unreadable[0], "--on_error skip to leave the folder out"))
        stderr().print(f"folders left out because they cannot be read: {len(unreadable)}; the first: {unreadable[0]}")
    images = [image_file(path.relative_to(folder).as_posix(), path) for path in map(Path, image_names(found))]
    require(bool(images), f"{folder}: no images in this folder or below ({', '.join(sorted(SUFFIXES))})")
    return sorted(images, key=lambda file: file.key)


def find_images(paths: Sequence[str], on_error: OnError = "error") -> list[ImageFile]:
    """List the named files and the images below the named folders, each once; the key is the path as typed."""
    require(len(paths) > 0, "no images: name files or folders of images, before the options")
    found: dict[str, ImageFile] = {}  # by absolute path: a file may be named twice
    for path in map(Path, paths):
        if path.is_dir():
            inside = images_in(path, on_error)
            files = [image_file((path / file.key).as_posix(), path / file.key) for file in inside]
        else:
            if not path.exists():
                raise InputError(f"{path}: no such file or folder{similar_file(path)}")
            require(path.is_file(), f"{path}: neither a file nor a folder")  # opening a pipe would wait for a writer
            files = [image_file(path.as_posix(), path)]
        for file in files:
            found.setdefault(os.path.abspath(file.key), file)
    return sorted(found.values(), key=lambda file: file.key)
