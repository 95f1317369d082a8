"""Compare an approximate index with exact search: speed of one query and of 100 at once, and recall@10.

    python benchmarks/approximate_search.py --rows 1000000 --folder runs/rows

Rows are a mixture of 1,000 directions with noise of a falling spectrum, or with ``--real`` those of a file, drawn with
replacement and with noise (cosine 0.97 with the original); queries are drawn likewise. Both sides use all cores, in
turn, and exact search has its rows in memory if they take at most half of it. With ``--folder`` files that are there
are used again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from results import Result, compared, pair_parser, save
from rich.console import Console

from lit_clip.approximate import ApproximateIndex, add_to_index, open_index
from lit_clip.embedding.feature_files import write_features
from lit_clip.embedding.index import nearest
from lit_clip.tools.workers import usable_cores

D, K, QUERIES = 512, 10, 100
CLUSTERS, NOISE = 1000, 0.25
AT_ONCE = 50_000  # rows made
IN_A_FILE = 1_000_000

Make = Callable[[int, int], np.ndarray]  # rows and a seed -> unit rows [N, D]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def source(real: str | None) -> Make:
    """Return what makes rows: of a mixture, or of somebody's features ``[M, <= D]``, repeated."""
    fixed = np.random.default_rng(7)
    if real:
        features = np.load(real)
        turn = np.linalg.qr(fixed.standard_normal((D, features.shape[1])))[0].T.astype(np.float32)
        spectrum = np.full(D, NOISE / D**0.5, dtype=np.float32)
        centres, turned = features @ turn, np.eye(D, dtype=np.float32)
    else:
        centres = unit(fixed.standard_normal((CLUSTERS, D)).astype(np.float32))
        spectrum = np.arange(1, D + 1, dtype=np.float32) ** -0.5
        spectrum /= np.linalg.norm(spectrum)
        turned = np.linalg.qr(fixed.standard_normal((D, D)))[0].astype(np.float32)

    def make(rows: int, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        centre = centres[random.integers(0, len(centres), rows)]
        return unit(centre + (random.standard_normal((rows, D)).astype(np.float32) * spectrum) @ turned)

    return make


def build(folder: Path, rows: int, make: Make) -> tuple[ApproximateIndex, float]:
    """Return an index of rows, and the seconds that it took to build; 0 if it was there."""
    path = folder / "rows.usearch"
    if path.exists():
        return open_index(path), 0.0
    files = [rows_file(folder, start, min(rows, start + IN_A_FILE), make) for start in range(0, rows, IN_A_FILE)]
    start = time.perf_counter()
    return add_to_index(path, files), time.perf_counter() - start


def rows_file(folder: Path, first: int, end: int, make: Make) -> Path:
    """Return a file of rows ``first`` to ``end``, which is written if it is not there."""
    path = folder / f"rows_{first}.npy"
    if not path.exists():
        made = np.concatenate([make(min(AT_ONCE, end - start), start) for start in range(first, end, AT_ONCE)])
        write_features(path, list(map(str, range(first, end))), made, {"model": "none", "model_sha256": "none"})
    return path


def seconds(search: Callable[[np.ndarray, int], object], queries: np.ndarray) -> float:
    start = time.perf_counter()
    search(queries, K)
    return time.perf_counter() - start


def measure(index: ApproximateIndex, queries: np.ndarray, pairs: int) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return pairs (exact, approximate) of seconds a query, for one query and for all at once."""
    tables = [table.features for table in index.tables]
    if sum(table.nbytes for table in tables) <= psutil.virtual_memory().total / 2:
        tables = [np.concatenate(tables)]

    def exact(queries: np.ndarray, k: int) -> object:
        return [nearest(table, queries, k) for table in tables]

    one, batch = [], []
    seconds(index.nearest, queries)  # reads what it needs from the disk
    for pair in range(pairs):
        each = [seconds(index.nearest, queries[row : row + 1]) for row in range(len(queries))]
        one.append((seconds(exact, queries[pair : pair + 1]), float(np.mean(each))))
        batch.append((seconds(exact, queries) / len(queries), seconds(index.nearest, queries) / len(queries)))
    return [("one", one), ("batch", batch)]


def main() -> None:
    options = pair_parser(__doc__)
    options.add_argument("--rows", type=int, default=20_000)
    options.add_argument("--real", metavar="NPY", help="features to draw rows from, in place of the mixture")
    options.add_argument("--folder", help="where files are kept; those that are there are used again")
    arguments = options.parse_args()
    torch.set_num_threads(usable_cores())
    make = source(arguments.real)
    with TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        index, building = build(folder, arguments.rows, make)
        start = time.perf_counter()
        index = open_index(folder / "rows.usearch")
        opening = time.perf_counter() - start
        queries = make(QUERIES, 10**9)
        size = (folder / "rows.usearch").stat().st_size / len(index)
        figures = {"recall": index.recall(queries, K), "building_seconds": building, "opening_seconds": opening}
        figures |= {"bytes_per_row": size, "rows": float(len(index))}
        found: list[Result] = []
        for name, pairs in measure(index, queries, arguments.pairs):
            title = f"nearest {K} of {len(index):,} rows, {'one query' if name == 'one' else f'{QUERIES} at once'}"
            found.append(compared(f"approximate_search/{name}", title, pairs, peer="exact search", figures=figures))
    console = Console(width=160)
    for result in found:
        console.print(
            f"{result.title}: exact {1e3 * (result.peers or 0):.2f} ms, ours {1e3 * (result.ours or 0):.2f} ms"
        )
        console.print(f"  times faster {result.ratio}")
    console.print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    save(arguments.json, *found)


if __name__ == "__main__":
    main()
