"""An index of a folder's images that keeps up with it, and exact search in it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lit_clip.embedding.encode import check_complete, encode, report_skipped
from lit_clip.embedding.feature_files import FeatureParts, FeatureTable, collect
from lit_clip.embedding.image_files import Item
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import stderr
from lit_clip.tools.images import OnError
from lit_clip.weights.fingerprint import fingerprint

INDEX = ".lit-clip-index.npz"


MOST_ROWS = 1_000_000  # that matrix products search; more are left to faiss


CHUNK = 65_536  # rows scored at once


def update_index(
    model: CLIP, items: Sequence[Item], path: Path, *, batch_size: int, num_workers: int, on_error: OnError
) -> FeatureTable:
    """The features of all items, from the index as far as it has them; the index is brought up to date.

    Raises:
        InputError: the index cannot be written, or an image cannot be read.
    """
    require(path.absolute().parent.is_dir(), f"{path}: there is no folder for this --index")
    name = fingerprint(model).model
    old = FeatureTable.load(path, name)
    if old is None and path.exists():
        stderr().print(f"{path} is of another model, or damaged: everything is encoded anew", markup=False)
    known = dict(zip(old.identities, old.features, strict=True)) if old else {}
    keys = {key for key, _, _ in known}
    missing = [item for item in items if item.identity not in known]
    changed = sum(item.key in keys for item in missing)
    gone = len(keys - {item.key for item in items})
    if old is not None and not missing and not gone:
        return old
    note = f"index: {len(items) - len(missing)} images as they were, {len(missing) - changed} new"
    stderr().print(f"{note}, {changed} changed, {gone} gone", markup=False)
    parts = FeatureParts(path, name)
    bad = encode(model, items, parts, known, batch_size=batch_size, num_workers=num_workers, on_error=on_error)
    assert bad is not None  # one process
    table = collect(items, {**known, **parts.read()}, model.config.embed_dim)
    check_complete(items, table, bad)
    table.save(path, name)
    report_skipped(bad, path.with_name(f"{path.name}.skipped.txt"))
    parts.remove()
    return table


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the highest inner products, exactly.

    Args:
        features: float32 ``[N, D]``.
        queries: float32 ``[Q, D]``.
        k: number of rows; N if there are fewer.

    Returns:
        Products float32 and rows int64, each ``[Q, min(k, N)]``, the highest first.

    Raises:
        InputError: more than ``MOST_ROWS`` rows, and no faiss.
    """
    k = min(k, len(features))
    if len(features) > MOST_ROWS:
        return _faiss_nearest(features, queries, k)
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(features), CHUNK):
        block = torch.from_numpy(queries) @ torch.from_numpy(features[start : start + CHUNK]).T  # [Q, chunk]
        scores = torch.cat([scores, block], dim=1)
        here = torch.arange(start, start + block.shape[1]).expand(len(queries), -1)
        scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
        rows = torch.cat([rows, here], dim=1).gather(1, best)
    return scores.numpy(), rows.numpy()


def _faiss_nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            f"{len(features):,} images: more than {MOST_ROWS:,} need faiss: pip install -e '.[search]'"
        ) from error
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features)  # pyright: ignore[reportCallIssue]  # faiss replaces its C++ signatures when it is imported
    return index.search(queries, k)  # pyright: ignore[reportCallIssue]  # likewise
