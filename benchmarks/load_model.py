"""Measure the memory for loading a ViT-L-14 with lit_clip.load_model and with open_clip, each in its own process.

    python benchmarks/load_model.py

The peak is the process's largest resident memory (Linux's VmHWM) minus that right before the call, divided by the bytes
of the weights in float32. The weights are random; the files (up to 5 GB at once) are written to a temporary folder.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from processes import forget_peak, held, in_a_process
from results import Result, compared, parser, save
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_clip import create_model, load_model
from lit_clip.models.registry import resolve_architecture

NAME = "ViT-L-14-quickgelu"


def measure(library: str, kind: str, source: str) -> None:
    """Load a source and print the peak, the seconds, and the bytes of the loaded model's weights."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    before, start = forget_peak(), time.perf_counter()
    model = openers()[library, kind](source)
    seconds, peak = time.perf_counter() - start, held("VmHWM") - before
    weights = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    json.dump({"peak": peak / weights, "weights": weights, "seconds": seconds}, sys.stdout)


def openers() -> dict[tuple[str, str], Callable[[str], nn.Module]]:
    """Return the loading function for each library and kind of source."""
    ours: dict[tuple[str, str], Callable[[str], nn.Module]] = {
        ("lit-clip", "file"): lambda source: load_model(source, architecture=NAME),
        ("lit-clip", "archive"): load_model,
        ("lit-clip", "random"): create_model,
    }
    theirs: dict[tuple[str, str], Callable[[str], Any]] = {
        ("open_clip", "file"): lambda source: open_clip.create_model(NAME, pretrained=source),
        ("open_clip", "random"): open_clip.create_model,
    }
    if of_archives := getattr(open_clip, "load_openai_model", None):  # not in open_clip 4
        theirs["open_clip", "archive"] = lambda source: of_archives(source, device="cpu")
    return ours | theirs


def save_safetensors(folder: Path, state: dict[str, Tensor]) -> Path:
    config = {"model_cfg": open_clip.get_model_config(NAME)}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(state, folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


def save_bin(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "weights.bin")
    return folder / "weights.bin"


def save_archive(folder: Path, state: dict[str, Tensor]) -> Path:
    """Save a TorchScript archive in half precision that also holds model sizes, like OpenAI's."""
    root = nn.Module()
    sizes = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    for name, tensor in {**state, **{key: torch.tensor(value) for key, value in sizes.items()}}.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor.half() if tensor.is_floating_point() else tensor)
    torch.jit.save(torch.jit.script(root), str(folder / "archive.pt"))
    return folder / "archive.pt"


def save_checkpoint(folder: Path, state: dict[str, Tensor]) -> Path:
    """Save a checkpoint with both moments of AdamW, like training does."""
    moments = {i: {"exp_avg": value, "exp_avg_sq": value.clone()} for i, value in enumerate(state.values())}
    checkpoint = {
        "state_dict": state,
        "hyper_parameters": {"architecture": resolve_architecture(NAME).to_dict()},
        "optimizer_states": [{"state": {i: {k: v + 0 for k, v in row.items()} for i, row in moments.items()}}],
    }
    torch.save(checkpoint, folder / "last.ckpt")
    return folder / "last.ckpt"


SOURCES: dict[str, tuple[str, Callable[[Path, dict[str, Tensor]], Path]]] = {
    "safetensors, fp32": ("file", save_safetensors),
    ".bin, fp32": ("file", save_bin),
    "OpenAI's archive, fp16": ("archive", save_archive),
    "lit-clip's checkpoint with optimiser states": ("file", save_checkpoint),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--measure", nargs=3, metavar=("LIBRARY", "KIND", "SOURCE"), help="(used by itself)")
    arguments = options.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    libraries = {"lit-clip": "lit-clip", "open_clip": f"open_clip {version('open-clip-torch')}"}
    table = Table(
        "", *libraries.values(), title=f"Peak memory / weights in float32 (seconds), torch {torch.__version__}"
    )

    found: list[Result] = []

    def add(title: str, kind: str, source: Path | str) -> None:
        results = [in_a_process(__file__, library, kind, source) for library in libraries]
        size = f"{results[0]['weights'] / 1e9:.2f} GB"
        table.add_row(f"{title} ({size})", *(f"{r['peak']:.2f} ({r['seconds']:.1f} s)" for r in results))
        ours, theirs = results
        what = f"{title} ({size})"
        unit = "times the weights"
        found.append(
            compared(f"load_model/{title}/peak", f"peak of opening {what}", [(theirs["peak"], ours["peak"])], unit)
        )
        times = [(theirs["seconds"], ours["seconds"])]
        found.append(compared(f"load_model/{title}/time", f"time of opening {what}", times))

    state = create_model(NAME).state_dict()
    for title, (kind, write) in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            add(f"{NAME}, {title}", kind, write(Path(folder), state))
    del state
    for name in ("ViT-L-14", "RN50x64"):
        add(f"{name}, random weights", "random", name)
    Console(width=120).print(table)
    save(arguments.json, *found)


if __name__ == "__main__":
    main()
