"""Measure memory and time of retrieval metrics with many captions per image, by lit_clip and by open_clip.

    python benchmarks/retrieval.py

Each runs in its own process; the peak is the process's largest resident memory (Linux's VmHWM), including interpreter
and features. Features come in batches, as in validation: random image features, and caption features near them. The
ranks of some queries are checked by brute force in float64 over all candidates. open_clip's metric supports one caption
per image and stores all similarities, so both are compared on fewer pairs.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from results import Result, compared, parser, save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_clip.losses.contrastive import unit
from lit_clip.retrieval.metrics import pair_scores, retrieval_ranks, whole_set_loss
from lit_clip.retrieval.retrieval_set import Joined, RetrievalSet, retrieval_metrics, token_hashes

D = 512
BATCH = 1000  # pairs
CHECKED = 100  # queries of each direction


def batches(images: int, captions: int) -> Iterator[tuple[Tensor, Tensor, range]]:
    """Yield unit features ``[B, D]`` of a batch's images and captions, and the captions' indices.

    Caption j belongs to image ``j * images // captions``.
    """
    for start in range(0, captions, BATCH):
        rows = range(start, min(start + BATCH, captions))
        image_of = torch.tensor([j * images // captions for j in rows])
        distinct, place = image_of.unique(return_inverse=True)
        noise = torch.Generator().manual_seed(start)
        texts = torch.randn(len(rows), D, generator=noise)
        image = torch.stack([torch.randn(D, generator=noise.manual_seed(2**40 + i)) for i in distinct.tolist()])[place]
        yield unit(image), unit(image + 5.5 * texts), rows


def peak_memory() -> float:
    """Return the peak resident memory in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:"))


def brute_force(query_QD: Tensor, right_QC: list[list[int]], candidate_CD: Tensor) -> list[int]:
    """Return, for each query, how many wrong candidates score at least as high as the best right one."""
    ranks = []
    for query, right in zip(query_QD.double(), right_QC, strict=True):
        scores = torch.cat([part.double() @ query for part in candidate_CD.split(2**14)])
        ahead = scores >= scores[right].max()
        ahead[right] = False
        ranks.append(int(ahead.sum()))
    return ranks


def check(joined: Joined, images: int, captions: int, ranks: tuple[Tensor, Tensor]) -> None:
    """Check the ranks of some evenly spread queries by brute force."""
    image_of = [j * images // captions for j in range(captions)]
    captions_of: dict[int, list[int]] = {}
    for caption, image in enumerate(image_of):
        captions_of.setdefault(image, []).append(caption)
    some_images = [i * images // CHECKED for i in range(CHECKED)]
    some_captions = [i * captions // CHECKED for i in range(CHECKED)]
    expected = (
        brute_force(joined.image[some_images], [captions_of[i] for i in some_images], joined.text),
        brute_force(joined.text[some_captions], [[image_of[j]] for j in some_captions], joined.image),
    )
    found = ranks[0][some_images].tolist(), ranks[1][some_captions].tolist()
    for name, ours, theirs in zip(("images", "captions"), found, expected, strict=True):
        differing = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        if differing:
            raise RuntimeError(f"{len(differing)} of {CHECKED} {name}: (found, brute force) {differing[:5]}")


def measure_ours(images: int, captions: int) -> dict[str, Any]:
    pairs = RetrievalSet()
    for image, text, rows in batches(images, captions):
        keys = [f"{j * images // captions}.jpg" for j in rows]
        pairs.add(image, text, keys, token_hashes(torch.tensor(rows)[:, None], 1, 0))
    start = time.perf_counter()
    joined = pairs.join(torch.zeros(0, D))
    assert joined is not None
    score = pair_scores(joined.image, joined.text, joined.own_pairs)
    ranks = retrieval_ranks(joined.image, joined.text, joined.own_pairs, score)
    metrics = retrieval_metrics(ranks, joined.all_pairs)
    seconds = time.perf_counter() - start
    loss = whole_set_loss(joined.image, joined.text, joined.own_pairs, score, torch.tensor(100.0))
    loss_seconds, peak = time.perf_counter() - start - seconds, peak_memory()
    check(joined, images, captions, (ranks.image, ranks.pair))
    return {"peak": peak, "seconds": seconds, "loss_seconds": loss_seconds, "loss": loss, **metrics}


def measure_theirs(images: int, captions: int) -> dict[str, Any]:
    from open_clip_train.train import get_clip_metrics

    parts = [(image, text) for image, text, _ in batches(images, captions)]
    image, text = (torch.cat(side) for side in zip(*parts, strict=True))
    del parts
    start = time.perf_counter()
    metrics = get_clip_metrics(image, text, torch.tensor(100.0))
    seconds = time.perf_counter() - start
    recall = {name.replace("_R@", "_recall@"): float(value) for name, value in metrics.items()}
    return {"peak": peak_memory(), "seconds": seconds, **recall}


def in_a_process(library: str, images: int, captions: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--measure", library, "--images", str(images), "--captions", str(captions)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def results_of(found: list[dict[str, Any]], pairs: int, large: str) -> list[Result]:
    """Convert the three runs: theirs and ours on the same pairs, and ours on the large size."""
    theirs, ours, most = found
    title = f"retrieval metrics of {pairs:,} x {pairs:,}"
    return [
        compared("retrieval/time", title, [(theirs["seconds"], ours["seconds"])]),
        compared("retrieval/peak", f"peak memory of {title}", [(theirs["peak"], ours["peak"])], "GiB"),
        Result("retrieval/large", f"retrieval metrics of {large}", ours=most["seconds"], figures={"GiB": most["peak"]}),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=100_000)
    options.add_argument("--captions", type=int, default=500_000)
    options.add_argument("--peer_pairs", type=int, default=8_000, help="for the comparison with open_clip")
    options.add_argument("--measure", choices=["ours", "theirs"], help="(used by itself)")
    arguments = options.parse_args()
    if arguments.measure:
        torch.manual_seed(0)
        measure = measure_ours if arguments.measure == "ours" else measure_theirs
        json.dump(measure(arguments.images, arguments.captions), sys.stdout)
        return
    columns = ("seconds", "seconds of val/loss", "peak", "image to text R@1", "median", "text to image R@1", "median")
    table = Table("", "images", "captions", *columns, title=f"Retrieval, D = {D}, float32, torch {torch.__version__}")
    theirs, pairs = f"open_clip {version('open-clip-torch')}", arguments.peer_pairs
    runs = [("theirs", pairs, pairs), ("ours", pairs, pairs), ("ours", arguments.images, arguments.captions)]
    found: list[dict[str, Any]] = []
    for library, images, captions in runs:
        result = in_a_process(library, images, captions)
        found.append(result)
        loss_seconds = f"{result['loss_seconds']:.1f}" if "loss_seconds" in result else "-"
        numbers = [f"{result['seconds']:.1f}", loss_seconds, f"{result['peak']:.2f} GiB"]
        for direction in ("image_to_text", "text_to_image"):
            numbers += [f"{result[f'{direction}_recall@1']:.4f}", f"{result[f'{direction}_median_rank']:.0f}"]
        table.add_row(theirs if library == "theirs" else "lit-clip", f"{images:,}", f"{captions:,}", *numbers)
    Console(width=160).print(table)
    save(arguments.json, *results_of(found, pairs, f"{arguments.images:,} x {arguments.captions:,}"))


if __name__ == "__main__":
    main()
