"""Measure the memory of an optimiser step of ViT-B-32 with a large batch: encoded at once, and in micro-batches.

    python benchmarks/step_memory.py [--batch 1024] [--micro 64] [--small 64] [--steps 2] [--bf16] [--device cpu]
    python benchmarks/step_memory.py --compare    # only gradients: 32 pairs at once and in micro-batches of 8

First a size where both fit, together with open_clip's plain step and the largest relative difference of any parameter's
gradient between ours at once and ours in micro-batches; then the large batch in micro-batches. Each run is a process of
its own that creates the model and AdamW's states and does some steps, the last of which is timed. Memory is the
process's peak in total (Linux's VmHWM, or torch's peak allocation on CUDA).
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import torch
from peers import captions, open_clip_pair
from processes import held, in_a_process
from results import Figure, Result, parser, save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_clip.batch import CaptionBatch
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import decay_groups


def batch_of(pairs: int, device: str, tokenize: Any) -> CaptionBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (pairs, 3, 224, 224), dtype=torch.uint8, generator=generator).to(device)
    tokens = tokenize.trim(tokenize(captions(pairs))).to(device)
    return CaptionBatch(images, tokens, [str(i) for i in range(pairs)])


def measure(library: str, pairs: int, micro: int, steps: int, precision: str, device: str, gradients: str) -> None:
    """Print the peak in bytes and the last step's seconds; ``gradients``: file for the first step's gradients, or -."""
    theirs, model = open_clip_pair("ViT-B-32")
    module: Any = LitCLIP("ViT-B-32", micro_batch_size=micro or None)
    module.model.load_state_dict(model.state_dict())
    module.log = lambda *_, **__: None  # no trainer to log to
    batch = batch_of(pairs, device, model.tokenizer)
    trained = (theirs if library == "open_clip" else module).to(device)
    del theirs, model
    optimizer = torch.optim.AdamW(decay_groups(trained.named_parameters(), 0.2), lr=1e-6, fused=True)

    def loss() -> Tensor:
        if library == "lit-clip":
            return module.training_step(batch, 0)
        import open_clip

        padded = torch.nn.functional.pad(batch.tokens, (0, 77 - batch.tokens.shape[1]))
        return open_clip.ClipLoss()(*trained(module.model.normalize(batch.images), padded))

    seconds, last = 0.0, 0.0
    for step in range(steps):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        if step == 0 and gradients != "-":
            torch.save({name: p.grad for name, p in module.model.named_parameters()}, gradients)
        optimizer.step()
        optimizer.zero_grad()
        last = value.item()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else held("VmHWM")
    json.dump({"peak": peak, "seconds": seconds, "loss": last}, sys.stdout)


def largest_difference(one: str, other: str) -> tuple[float, str]:
    """Return the largest difference of a parameter's gradient, relative to its norm, and the parameter's name.

    The keys' bias is left out: its exact gradient is zero, and what is computed is rounding error.
    """
    ours, theirs = ({name: _without_keys(name, g) for name, g in _load(path).items()} for path in (one, other))
    assert ours.keys() == theirs.keys()
    return max((float((ours[name] - g).norm() / g.norm()), name) for name, g in theirs.items())


def _load(path: str) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def _without_keys(name: str, gradient: Tensor) -> Tensor:
    if not name.endswith("in_proj_bias"):
        return gradient
    queries, _, values = gradient.chunk(3)
    return torch.cat([queries, values])


def as_result(library: str, pairs: int, at_a_time: int, title: str, measured: dict[str, float]) -> Result:
    """Convert one measurement to a result."""
    what = f"a step of {library}, {title}, {pairs:,} pairs, {at_a_time} at a time"
    figures: dict[str, Figure] = {"peak_GiB": measured["peak"] / 2**30}
    figures |= {"seconds": measured["seconds"], "loss": measured["loss"]}
    return Result(f"step_memory/{library}/{pairs}/{at_a_time}", what, figures=figures)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=1024)
    options.add_argument("--micro", type=int, default=64)
    options.add_argument("--small", type=int, default=64, help="a size where the plain step fits too; 0: skip it")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--compare", action="store_true", help="--small 32 --steps 1, without the large batch")
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--measure", nargs=7, metavar="WORD", help="(used by itself)")
    arguments = options.parse_args()
    if arguments.measure:
        library, pairs, micro, steps, *rest = arguments.measure
        measure(library, int(pairs), int(micro), int(steps), *rest)
        return
    if arguments.compare:
        arguments.small, arguments.steps = 32, 1
    settings = (arguments.steps, "bf16" if arguments.bf16 else "fp32", arguments.device)
    table = Table("step", "pairs", "at a time", "peak", "time", "loss", title=f"ViT-B-32, {settings[1]} {settings[2]}")

    found: list[Result] = []

    def add(library: str, pairs: int, micro: int, gradients: str = "-") -> None:
        try:
            result = in_a_process(__file__, library, pairs, micro, *settings, gradients)
        except RuntimeError as error:
            table.add_row(library, f"{pairs:,}", f"{micro or pairs}", str(error).splitlines()[-1][:40])
            return
        peak, seconds = f"{result['peak'] / 2**30:.2f} GiB", f"{result['seconds']:.1f} s"
        table.add_row(library, f"{pairs:,}", f"{micro or pairs}", peak, seconds, f"{result['loss']:.5f}")
        found.append(as_result(library, pairs, micro or pairs, str(table.title), result))

    if arguments.small:
        with tempfile.TemporaryDirectory() as folder:
            add("open_clip", arguments.small, 0)
            add("lit-clip", arguments.small, 0, f"{folder}/whole.pt")
            add("lit-clip", arguments.small, max(1, arguments.small // 4), f"{folder}/parts.pt")
            difference, name = largest_difference(f"{folder}/parts.pt", f"{folder}/whole.pt")
        found[-1].figures["largest_difference_of_a_gradient"] = difference
        table.caption = (
            f"largest relative difference of a parameter's gradient, parts against whole: {difference:.1e} ({name}); "
            f"open_clip {version('open-clip-torch')}, torch {torch.__version__}"
        )
    if not arguments.compare:
        add("lit-clip", arguments.batch, arguments.micro)
    Console(width=120).print(table)
    save(arguments.json, *found)


if __name__ == "__main__":
    main()
