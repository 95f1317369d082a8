"""Write indices for faiss."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lit_clip.approximate.approximate_index import BUILDING, CONNECTIVITY, ROWS, in_view
from lit_clip.errors import require
from lit_clip.tools.atomic import not_written, replacing
from lit_clip.tools.console import progress


def write_faiss(path: Path, features: Sequence[np.ndarray], exact: bool) -> None:
    """Write float32 rows ``[N, D]`` as faiss's ``IndexFlatIP`` if ``exact``, otherwise as ``IndexHNSWFlat``."""
    require(find_spec("faiss") is not None, f"--output {path}: needs faiss: pip install faiss-cpu")
    import faiss

    width = features[0].shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if not exact:
        index = faiss.IndexHNSWFlat(width, CONNECTIVITY, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = BUILDING, in_view(sum(map(len, features)))
    with progress("index", sum(map(len, features))) as advance:
        for rows in (each[start : start + ROWS] for each in features for start in range(0, len(each), ROWS)):
            index.add(np.ascontiguousarray(rows))
            advance(len(rows))
    with replacing(path) as draft:
        try:
            faiss.write_index(index, str(draft))
        except RuntimeError as error:  # of a full disk
            raise not_written(path, error) from error
