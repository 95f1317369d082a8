"""Shared by the benchmarks: the peer's model with our weights, real captions, and alternating timing."""

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from device_speed import matmul_peak, seconds_per_call
from results import Figure, Result, compared, save, shares
from results import pair_parser as parser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamodules.openmoji import read_table
from lit_clip import CLIP, create_model
from lit_clip.cli.lightning import computes_in_bfloat16
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig

__all__ = ["TINY_VIT", "captions", "compare", "counted", "lengths_of", "open_clip_pair", "parser", "save"]

Work = Callable[[], object]

# A typical model for small images; ViT-tiny-16-64 has a quarter of the patches.
TINY_VIT = CLIPConfig(
    embed_dim=192,
    image=VisionTransformerConfig(image_size=64, patch_size=8, width=192, layers=6, heads=3),
    text=TextTransformerConfig(width=192, layers=4, heads=3),
)
NANO_VIT = CLIPConfig(  # to try a script, not to measure
    embed_dim=32,
    image=VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1),
    text=TextTransformerConfig(width=64, layers=2, heads=1),
)
SIZES = {"ViT-tiny-8-64": TINY_VIT, "ViT-nano-16-32": NANO_VIT}


def architecture(name: str) -> CLIPConfig | str:
    """Return the sizes of one of the models that only the benchmarks have, or any other name unchanged."""
    return SIZES.get(name, name)


def open_clip_pair(name: str) -> tuple[Any, CLIP]:
    """Create open_clip's model with random weights, and ours with the same weights, both in training mode."""
    logging.disable(logging.WARNING)  # open_clip warns about random weights, which are intended
    torch.manual_seed(0)
    ours = create_model(architecture(name)).train()
    if name not in open_clip.list_models():
        register(name, ours)
    theirs: Any = open_clip.create_model(name).train()
    state = theirs.state_dict()
    ours.load_state_dict({key: state[key] for key in ours.state_dict()})
    return theirs, ours


def register(name: str, model: CLIP) -> None:
    """Register a model's sizes with open_clip under a name."""
    with tempfile.TemporaryDirectory() as folder:
        write_model_config(Path(folder) / f"{name}.json", model)
        open_clip.add_model_config(folder)


def write_model_config(path: Path, model: CLIP) -> None:
    """Write a model's config as JSON for open_clip's ``add_model_config``."""
    from lit_clip.weights.open_clip import open_clip_model

    path.write_text(json.dumps(open_clip_model(model)), encoding="utf-8")


def captions(count: int) -> list[str]:
    """Make captions from real names, some with tags: 14 tokens on average, from 9 to 27."""
    emoji = read_table()
    return [_caption(emoji[i * len(emoji) // count], i % 5) for i in range(count)]


def _caption(emoji: Any, tags: int) -> str:
    others = [tag for tag in emoji.tags if tag and tag != emoji.name]
    return ", ".join([f"a colour drawing of a {emoji.name}", *others[:tags]]) + "."


def lengths_of(model: CLIP, tokens: torch.Tensor) -> list[int]:
    """Return the number of tokens of each text, as in the data modules' batches."""
    return model.tokenizer.lengths(tokens).tolist()


def length_figures(lengths: list[int]) -> dict[str, Figure]:
    """Print and return the mean and largest caption length."""
    mean = sum(lengths) / len(lengths)
    print(f"{len(lengths)} captions of {mean:.1f} tokens on average, {min(lengths)} to {max(lengths)}")
    return {"mean_tokens": mean, "longest_tokens": max(lengths)}


def counted(work: Work) -> int:
    """Count the FLOPs of the matrix products, convolutions and attention that a call executes, backward included.

    Fused kernels are disabled, since torch's counter does not know them.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def compare(
    title: str,
    theirs: Work,
    ours: Work,
    pairs: int,
    name: str = "",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Result:
    """Run both in turn; print each one's median seconds and the median, least and greatest ratio of a pair.

    Also prints the share of the machine's peak, which is the fastest of the matrix products in ``dtype`` that are timed
    before every pair. Each side's first call is not timed but used to count its FLOPs.
    """
    flops = [counted(work) for work in (theirs, ours)]
    times, peak = [], 0.0
    for _ in range(pairs):
        peak = max(peak, matmul_peak(torch.device(device), dtype))
        times.append(tuple(seconds_per_call(work, torch.device(device)) for work in (theirs, ours)))
    result = compared(name or title, title, times)
    result.figures.update(shares(result, flops, peak))
    print(described(result))
    return result


def described(result: Result) -> str:
    """Format a result as two lines."""
    text = (
        f"{result.title}: {result.peer} {result.peers:.2f} s, lit-clip {result.ours:.2f} s, "
        f"times as fast: {result.ratio}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    figures: Any = result.figures
    return (
        f"{text}\n  of the peak of {figures['peak_gflops']:.0f} GFLOP/s: "
        f"open_clip {figures['peers_share_of_peak']:.1%} ({figures['peers_gflop']:.0f} GFLOP), "
        f"lit-clip {figures['our_share_of_peak']:.1%} ({figures['our_gflop']:.0f} GFLOP)"
    )


def end_if_emulated(bf16: bool, device: str) -> None:
    """Exit successfully if bfloat16 is requested but would be emulated: the times would mean nothing."""
    if bf16 and computes_in_bfloat16(device) is False:
        print("not measured: the processor has no instructions for bfloat16")
        sys.exit()


def autocast(device: str, bf16: bool) -> Any:
    """Return a bfloat16 autocast context, or an empty one."""
    return torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()
