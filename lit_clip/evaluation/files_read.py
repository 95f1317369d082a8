"""List the files a set was read from, for ``results.json``: sets with the same name can have different files."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_clip.evaluation.data import ImageSet
from lit_clip.tools.hashing import hex_digest

MOST_LISTED = 20


def files_read(sets: Sequence[ImageSet], root: Path) -> dict[str, Any]:
    """Return the ``annotations`` and ``images`` of a split's folds, each file once, relative to ``root``.

    Both are lists of ``path`` and ``bytes``, or for more than 20 files their number and a hash of their sorted names.
    """
    prefix = os.path.join(os.fspath(root), "")  # text, since there can be a million paths
    annotations = {os.fspath(path) for images in sets for path in images.annotation_paths}
    images = {os.fspath(path) for images in sets for path in images.image_paths()}
    return {"annotations": _described(annotations, prefix), "images": _described(images - annotations, prefix)}


def _described(paths: Iterable[str], prefix: str) -> list[dict[str, Any]] | dict[str, Any]:
    named = sorted((path.removeprefix(prefix), path) for path in paths)
    if len(named) > MOST_LISTED:
        return {"files": len(named), "names_hash": hex_digest(name for name, _ in named)}
    return [{"path": name, "bytes": os.path.getsize(path) if os.path.isfile(path) else None} for name, path in named]
