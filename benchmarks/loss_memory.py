"""Measure memory and time of the loss alone, forward and backward: open_clip's ClipLoss and SigLipLoss, and ours.

    python benchmarks/loss_memory.py [--batch 16384] [--dim 512] [--rounds 3] [--ours-only] [--device cpu]

Each measurement runs in its own process; ours and theirs alternate. Memory is the peak (Linux's VmHWM, or torch's peak
allocation on CUDA) minus that right before the call: the features' gradients and what the loss needs. All in float32.
"""

import json
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from processes import forget_peak, held, in_a_process
from results import Figure, Result, compared, parser, save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_clip.distributed import RankCounts
from lit_clip.losses.contrastive import unit
from lit_clip.losses.tiled import PairLayout, sharded_contrastive_loss, sharded_sigmoid_loss

KINDS = ("softmax", "sigmoid")


def loss_of(library: str, kind: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if library == "lit-clip":
        plan = PairLayout(RankCounts(0, (len(image),)))
        if kind == "softmax":
            return sharded_contrastive_loss(image, text, scale, plan).loss
        return sharded_sigmoid_loss(image, text, scale, bias, plan).loss
    import open_clip

    theirs: Any = open_clip.ClipLoss() if kind == "softmax" else open_clip.loss.SigLipLoss()
    return theirs(image, text, scale) if kind == "softmax" else theirs(image, text, scale, bias)


def measure(library: str, kind: str, batch: int, dim: int, device: str) -> None:
    """Print the peak in bytes, the seconds and the loss."""
    generator = torch.Generator().manual_seed(0)
    image, text = (unit(torch.randn(batch, dim, generator=generator)).to(device).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (14.3, -10.0))
    small = [x[:64].detach().requires_grad_() for x in (image, text)]
    loss_of(library, kind, small[0], small[1], scale, bias).backward()  # warms up one-time imports and setup
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = forget_peak()
    start = time.perf_counter()
    loss = loss_of(library, kind, image, text, scale, bias)
    loss.backward()
    value = loss.item()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else held("VmHWM")
    json.dump({"peak": peak - before, "seconds": seconds, "loss": value}, sys.stdout)


def compared_rounds(
    kind: str, title: str, theirs: list[dict[str, float]], ours: list[dict[str, float]]
) -> list[Result]:
    """Compare peak and time over the rounds of open_clip and lit-clip."""
    rounds = list(zip(theirs, ours, strict=True))
    peaks = [(a["peak"] / 1e6, b["peak"] / 1e6) for a, b in rounds]
    seconds = [(a["seconds"], b["seconds"]) for a, b in rounds]
    values: dict[str, Figure] = {"peers_loss": theirs[0]["loss"], "our_loss": ours[0]["loss"]}
    return [
        compared(f"loss_memory/{kind}/peak", f"peak memory of the {kind} loss, {title}", peaks, "MB", figures=values),
        compared(f"loss_memory/{kind}/time", f"time of the {kind} loss, {title}", seconds),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=16384)
    options.add_argument("--dim", type=int, default=512)
    options.add_argument("--rounds", type=int, default=3, help="medians are printed")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--ours-only", action="store_true", help="for sizes where open_clip's loss does not fit")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--measure", nargs=5, metavar="WORD", help="(used by itself)")
    arguments = options.parse_args()
    if arguments.measure:
        library, kind, batch, dim, device = arguments.measure
        measure(library, kind, int(batch), int(dim), device)
        return
    libraries = ["lit-clip"] if arguments.ours_only else ["open_clip", "lit-clip"]
    title = f"{arguments.batch:,} pairs of {arguments.dim}, {arguments.device}, torch {torch.__version__}"
    table = Table("loss", "library", "peak", "time", "value", title=title)
    found: list[Result] = []
    for kind in arguments.kinds:
        size = (arguments.batch, arguments.dim, arguments.device)
        results: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
        for _ in range(arguments.rounds):
            for library in libraries:
                results[library].append(in_a_process(__file__, library, kind, *size))
        for library, rounds in results.items():
            peak, seconds, loss = (statistics.median(r[key] for r in rounds) for key in ("peak", "seconds", "loss"))
            name = library if library == "lit-clip" else f"{library} {version('open-clip-torch')}"
            table.add_row(kind, name, f"{peak / 1e6:,.0f} MB", f"{seconds:.1f} s", f"{loss:.5f}")
        if not arguments.ours_only:
            found += compared_rounds(kind, title.partition(", torch")[0], *results.values())
    Console(width=120).print(table)
    save(arguments.json, *found)


if __name__ == "__main__":
    main()
