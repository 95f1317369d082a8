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

    def read(self, row: int) -> tuple[str, list[Image.Image]]:
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
    unreadable: list[OSError] = []
    above: dict[str, frozenset[str]] = {str(folder): frozenset()}
    for path, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        here = above.pop(path) | {os.path.realpath(path)}
        folders[:] = [each for each in folders if os.path.realpath(os.path.join(path, each)) not in here]
        folders[:] = [each for each in folders if not each.startswith(".")]  # editors and macOS leave hidden copies
        above |= {os.path.join(path, each): here for each in folders}
        found += [os.path.join(path, each) for each in names if not each.startswith(".")]
    if unreadable:
        first = f"{unreadable[0].filename}: cannot be read ({unreadable[0].strerror})"
        require(on_error == "skip", or_skip(first, "--on_error skip to leave the folder out"))
        stderr().print(f"folders left out because they cannot be read: {len(unreadable)}; the first: {first}")
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
