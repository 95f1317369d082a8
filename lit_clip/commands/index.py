"""``lit-clip index``: build an approximate index of feature files."""

import shlex
from pathlib import Path

import numpy as np

from lit_clip.approximate.approximate_index import SUFFIX, add_to_index, check_alike, write_faiss
from lit_clip.embedding.feature_files import check_output, read_features
from lit_clip.errors import require
from lit_clip.tools.atomic import claimed
from lit_clip.tools.console import stderr

CHECKED = 100  # rows that are searched for, to say how many of the nearest are found


def index(features: list[str], *, output: str, exact: bool = False) -> None:
    """Build an index that searches millions of features approximately, or add files to it.

    Args:
        features: files that lit-clip embed wrote, of one model. An index that is there keeps the files that it has, and
            the others' rows are added.
        output: features.usearch, in the folder of the files, which lit-clip search takes in their place; or a .faiss
            file, an IndexHNSWFlat of the rows in the order given.
        exact: make the .faiss file an IndexFlatIP, which compares all rows.
    """
    path, paths = Path(output), [Path(each) for each in features]
    check_output(path, (SUFFIX, ".faiss"))
    require(bool(paths), "no features; type the files that lit-clip embed wrote")
    if path.suffix == ".faiss":
        with claimed(path):
            tables = [read_features(each) for each in paths]
            check_alike(paths, tables)
            write_faiss(path, [table.features for table in tables], exact)
        stderr().print(f"{path}: {sum(len(table.keys) for table in tables)} rows")
        return
    require(not exact, f"--exact: is for a .faiss file; lit-clip search {features[0]} is exact without an index")
    built = add_to_index(path, paths)
    some = np.linspace(0, len(built) - 1, CHECKED).astype(np.int64)
    recall = f"recall@10 of {CHECKED} of them: {built.recall(built.rows(some), 10):.3f}"
    stderr().print(f"{path}: {len(built):,} rows of {len(built.files)} files; {recall}")
    model = built.tables[0].metadata.get("model", "MODEL")
    stderr().print(f"search them: {shlex.join(['lit-clip', 'search', str(path), 'TEXT', '--model', model])}")
