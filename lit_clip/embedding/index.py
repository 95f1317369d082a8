"""An up-to-date index of a folder's images, and exact search in it."""

import os
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.distributed import gather_objects, rank_and_world
from lit_clip.embedding.encode import Encoding, features_of, image_task, report_skipped
from lit_clip.embedding.feature_files import FeatureTable, Identity
from lit_clip.embedding.image_files import FileRows, ImageFile
from lit_clip.embedding.parts import DIGEST, Parts, load_arrays, save_arrays
from lit_clip.embedding.reading import features_of_both_kinds, image_features
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.tools.atomic import claimed, make_folder
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import best_device
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.own_files import default_cache_dir
from lit_clip.tools.reading import reading

INDEX, EXAMPLES = ".lit-clip-index.npz", ".lit-clip-examples.npz"  # beside the images
KEPT_BESIDE = (INDEX, EXAMPLES)
CHUNK = 65_536  # rows scored at once
QUERIES = 256  # rows of which all others are found at once


def update_index(
    model: CLIP, files: Sequence[ImageFile], path: Path, settings: Encoding, both_kinds: bool = False
) -> FeatureTable:
    """Return the features of all images; encode the images that the index lacks, and update it.

    An index in a folder that cannot be written to, and lacks some, is brought up to date in the cache folder.
    With ``both_kinds`` they are those of :func:`lit_clip.embedding.reading.features_of_both_kinds`.
    """
    require(path.absolute().parent.is_dir(), f"--index {path}: there is no such folder")
    name = f"{fingerprint(model).image} {settings.precision}{' both kinds' if both_kinds else ''}"
    wanted = {file.identity for file in files}
    old = load_arrays(path, name, FeatureTable.of)
    if not _complete(old, wanted) and path.name in KEPT_BESIDE and not os.access(path.parent, os.W_OK):
        path = _in_cache(path)
        old = load_arrays(path, name, FeatureTable.of) or old
    if old is not None and _complete(old, wanted):
        return old
    with claimed(path, option=""):
        old = load_arrays(path, name, FeatureTable.of) or old  # another process may have written it meanwhile
        if old is None and path.exists():
            require(
                not _holds_other_arrays(path), f"--index {path}: holds other arrays than an index; name another file"
            )
            stderr().print(f"{path} is of another model or precision, or damaged: everything is encoded again")
        missing = wanted.difference(old.identities if old else ())
        stderr().print(f"index {path}: {len(missing):,} of {len(files):,} images are new or changed")
        kind = features_of_both_kinds if both_kinds else image_features
        task, parts = image_task(model, FileRows(files), [file.identity for file in files], kind), Parts(path, name)
        (table,) = features_of(model, [task], parts, settings, old)  # one process
        save_arrays(path, name, table.arrays())
        keys = [file.key for file in files]
        report_skipped(keys, table.unreadable, path.with_name(f"{path.name}.skipped.txt"))
        parts.remove()
        return table


def _complete(table: FeatureTable | None, wanted: Collection[Identity]) -> bool:
    return table is not None and set(table.identities) == wanted


def _in_cache(path: Path) -> Path:
    place = path.resolve()
    kept = default_cache_dir() / "search" / f"{place.parent.name}-{hex_digest([str(place)])[:20]}.npz"
    make_folder(kept.parent)
    stderr().print(f"{path.parent} cannot be written to: features of its images are kept in {kept}")
    return kept


def _holds_other_arrays(path: Path) -> bool:
    """Return whether an undamaged ``.npz`` file is not an index: a user's own arrays must not be lost."""
    try:
        with reading(path, "index"), zipfile.ZipFile(path) as file:
            return f"{DIGEST}.npy" not in file.namelist()
    except InputError:  # a damaged index is made again
        return False


def combined(image: Tensor, text: Tensor, text_weight: float) -> Tensor:
    """Return a unit vector for each image with its text, ``[N, D]``, from the features of both, ``[N, D]``.

    It ranks by ``text_weight`` (0 to 1) times the text's similarity, plus the rest times the image's.
    """
    return F.normalize((1 - text_weight) * image + text_weight * text, dim=1)


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest products of rows ``[N, D]`` with queries ``[Q, D]``, and their rows: ``[Q, min(k, N)]``."""
    starts = range(0, len(features), CHUNK)
    chunks = (np.require(features[start : start + CHUNK], requirements="W") for start in starts)  # else torch warns
    scores, rows = nearest_in(map(torch.from_numpy, chunks), torch.from_numpy(queries), k)
    return scores.numpy(), rows.numpy()


def nearest_in(chunks: Iterable[Tensor], queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like :func:`nearest`, for rows in ``chunks`` of at most ``CHUNK`` rows on the queries' device."""
    scores, start = queries.new_empty(len(queries), 0), 0
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for chunk in chunks:
        block = queries @ chunk.T  # [Q, chunk]
        scores = torch.cat([scores, block], dim=1)
        here = torch.arange(start, start + len(chunk), device=queries.device).expand(len(queries), -1)
        scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
        rows, start = torch.cat([rows, here], dim=1).gather(1, best), start + len(chunk)
    return scores, rows


def nearest_others(features: np.ndarray, k: int) -> np.ndarray:
    """Return for each row the other rows with the highest products, int32 ``[N, min(k, N - 1)]``; a collective.

    The blocks are the same on any number of ranks, and so is the result.
    """
    rank, world = rank_and_world()
    every, found = torch.from_numpy(features).to(best_device()), []
    for start in range(0, len(features), QUERIES)[rank::world]:
        _, rows = nearest_in(every.split(CHUNK), every[start : start + QUERIES], k + 1)
        own = rows == torch.arange(start, start + len(rows), device=rows.device)[:, None]
        others = rows.gather(1, own.int().argsort(dim=1, stable=True)[:, :-1])  # itself, or else the last, is left out
        found.append((start, others.cpu().numpy().astype(np.int32)))
    return np.concatenate([rows for _, rows in sorted(gather_objects(found), key=lambda part: part[0])])
