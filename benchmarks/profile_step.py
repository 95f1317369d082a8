"""Profile a training step of open_clip and of lit-clip: torch.profiler's self times by kind of operator.

    python benchmarks/profile_step.py [--model ViT-B-32] [--batch 32] [--bf16] [--steps 3] [--device cpu]

The steps are those of ``train_step.py``. Prints milliseconds per step; on a GPU, those of the device's kernels,
their number, and the share of the time in which the device has none to run.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peers import captions, end_if_emulated, open_clip_pair
from results import Figure, Result, parser, save
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from train_step import BATCHES, MODELS, TINY_RATE, our_step, pairs_of, their_step

# The first pattern that matches an operator's name gives its kind.
KINDS = {
    "matrix products": r"mm$|linear|gemm",
    "attention": r"attention|softmax|fmha|flash",
    "convolutions": r"conv",
    "normalisation": r"norm",
    "activations": r"gelu|sigmoid|silu|relu",
    "optimiser": r"adam|foreach",
    "copies and casts": r"copy|cat|index|gather|scatter|clone|contiguous|pad|fill|zero",
    "sums and products of elements": r"add|mul|sum|div|sub|exp|log|mean",
}


def kind_of(operator: str) -> str:
    """Return one of ``KINDS``, or ``the rest``."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operator)), "the rest")


class Profile(NamedTuple):
    """Of one step.

    Attributes:
        milliseconds: of each kind of operator; on a GPU, of its kernels.
        launches: number of kernels and copies on a GPU; 0 on a CPU.
        idle: share of the time between the first and the last kernel in which a GPU ran none; 0 on a CPU.
    """

    milliseconds: Counter[str]
    launches: float
    idle: float


def profiled(step: Callable[[], object], steps: int, device: str) -> Profile:
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()  # else the last kernels are missing
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        row: Any = event
        own = row.self_device_time_total if device == "cuda" else row.self_cpu_time_total
        found[kind_of(row.key.lower())] += own / steps / 1000  # microseconds
    times: list[Any] = [
        event.time_range for event in profiler.events() or () if str(event.device_type).endswith("CUDA")
    ]
    return Profile(found, len(times) / steps, idle_share([(time.start, time.end) for time in times]))


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Return the share of the time from the first start to the last end in which no span runs; 0 without spans."""
    if not spans:
        return 0.0
    spans = sorted(spans)
    reached, idle = spans[0][0], 0.0
    for start, end in spans:
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle / (reached - spans[0][0])


def table(options: Namespace, theirs: Profile, ours: Profile) -> Table:
    precision = "bf16" if options.bf16 else "fp32"
    result = Table("ms a step", "open_clip", "lit-clip", title=f"{options.model}, batch {options.batch}, {precision}")
    for kind in [*KINDS, "the rest"]:
        result.add_row(kind, *(f"{side.milliseconds[kind]:.0f}" for side in (theirs, ours)))
    result.add_row("all", *(f"{side.milliseconds.total():.0f}" for side in (theirs, ours)))
    if ours.launches:
        result.add_row("launches", *(f"{side.launches:.0f}" for side in (theirs, ours)))
        result.add_row("idle", *(f"{side.idle:.1%}" for side in (theirs, ours)))
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=MODELS, default="ViT-B-32")
    arguments.add_argument("--batch", type=int, help="pairs; default: 32, or 128 for the small models")
    arguments.add_argument("--bf16", action="store_true", help="autocast on both sides")
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = arguments.parse_args()
    end_if_emulated(options.bf16, options.device)
    options.batch = options.batch or BATCHES.get(options.model, 32)
    theirs, ours = (model.to(options.device) for model in open_clip_pair(options.model))
    pairs = pairs_of(ours, captions(options.batch), torch.Generator().manual_seed(0), options.device)
    how = (TINY_RATE, options.bf16, options.device)
    their, our = their_step(theirs, *how), our_step(ours, *how)
    sides = [profiled(lambda step=step: step(pairs), options.steps, options.device) for step in (their, our)]
    Console(width=100).print(table(options, *sides))
    precision = "bf16" if options.bf16 else "fp32"
    figures: dict[str, Figure] = {}
    for who, found in zip(("peers", "our"), sides, strict=True):
        figures.update({f"{who} {kind}": float(ms) for kind, ms in found.milliseconds.items()})
    save(options.json, Result(f"profile/{options.model}/{precision}", "profile of a training step", figures=figures))


if __name__ == "__main__":
    main()
