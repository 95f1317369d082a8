"""Memory and communication of a training step: formulas, measurements, and the paper's models on H100s.

    python benchmarks/scaling.py ranks [--processes 1 2 4] [--pairs 256] [--kinds loss step]
    python benchmarks/scaling.py activations [--models ViT-B-32 ViT-L-14]
    python benchmarks/scaling.py h100 [--utilisation 0.2]

``ranks`` starts gloo processes on this machine that run the loss alone and a whole step under DDP, and compares their
peak memory (Linux's VmHWM) and the bytes they sent (counted by the kernel for each process's TCP connections) with the
formulas. ``activations`` counts the bytes that autograd keeps for one pair. ``h100`` evaluates the formulas for the
paper's runs. docs/evidence/scaling.md explains them.
"""

import argparse
import json
import math
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from processes import forget_peak, held
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.parallel import DistributedDataParallel

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.losses.contrastive import unit
from lit_clip.losses.tiled import PairLayout, default_tile, sharded_contrastive_loss
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig, height_width
from lit_clip.models.flops import measure
from lit_clip.models.layers import TOWERS, tower_blocks
from lit_clip.models.packing import Packing, pack
from lit_clip.models.registry import resolve_architecture
from lit_clip.module import LitCLIP
from lit_clip.training.activation_checkpointing import checkpoint_blocks
from lit_clip.weights.load import create_model

D, MIB = 512, 2**20
WIDTH, LAYERS, IMAGE_TOKENS, TEXT_TOKENS = 256, 4, 65, 32
SMALL = CLIPConfig(
    embed_dim=D,
    image=VisionTransformerConfig(image_size=64, patch_size=8, width=WIDTH, layers=LAYERS, heads=4),
    text=TextTransformerConfig(context_length=TEXT_TOKENS, vocab_size=5000, width=WIDTH, layers=LAYERS, heads=4),
)
BLOCK = 17  # activations that a block keeps per token, in units of its width, with GELU; 21 with QuickGELU
BYTES_SENT = 200  # offset of the field in Linux's struct tcp_info

H100_FLOPS = 989e12  # dense bf16, NVIDIA's figure for the SXM5 card
PAIRS = 400e6 * 32
MODELS = {  # name: micro-batch size and activation checkpointing of the shipped configs
    "RN50": (512, False),
    "RN50x64": (64, True),
    "ViT-B-32": (1024, False),
    "ViT-B-16": (512, False),
    "ViT-L-14": (128, False),
    "ViT-L-14-336": (64, False),
}

# Bytes that a rank sends in a step, from pairs per rank, world size and parameters (docs/evidence/scaling.md).


def sent_by_loss(pairs: int, world: int) -> float:
    """Bytes sent by the softmax loss and its backward pass, by gloo, whose reduce-scatter is an all-reduce."""
    if world == 1:
        return 0
    return 4 * pairs * (world - 1) * (3 * D + 4)


def sent_by_gradients(parameters: int, world: int) -> float:
    """Bytes sent by a ring all-reduce of the gradients."""
    return 4 * parameters * 2 * (world - 1) / world


def kept_by_activations(pairs: int, block: float = BLOCK) -> float:
    """Bytes that autograd keeps for ``SMALL``, in float32."""
    return 4 * pairs * LAYERS * block * WIDTH * (IMAGE_TOKENS + TEXT_TOKENS)


def bytes_sent() -> int:
    """Return the kernel's count of bytes that this process's open TCP connections have sent."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed in the meantime, or not TCP
            continue
        total += struct.unpack_from("Q", info, BYTES_SENT)[0]
    return total


class _Step(nn.Module):
    """Wrap ``training_step`` as ``forward``, like Lightning does for DDP."""

    def __init__(self, module: LitCLIP) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: CaptionBatch) -> Tensor:
        return self.module.training_step(batch, 0)


def a_step_of(kind: str, pairs: int) -> tuple[Callable[[], None], int]:
    """Return a step to repeat, and the number of parameters it trains."""
    torch.manual_seed(0)
    if kind == "step":
        module: Any = LitCLIP(SMALL)
        module.log = lambda *_, **__: None  # no trainer to log to
        trained = _Step(module)
        trained = DistributedDataParallel(trained) if dist.get_world_size() > 1 else trained
        images = torch.randint(0, 256, (pairs, 3, 64, 64), dtype=torch.uint8)
        batch = CaptionBatch(images, torch.randint(1, 4999, (pairs, TEXT_TOKENS)), [str(i) for i in range(pairs)])
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)

        def step() -> None:
            trained(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, sum(p.numel() for p in module.parameters())
    image, text = (unit(torch.randn(pairs, D)).requires_grad_() for _ in range(2))
    scale, plan = torch.tensor(10.0, requires_grad=True), PairLayout(distributed.shards_of(pairs)[0])

    def loss() -> None:
        sharded_contrastive_loss(image, text, scale, plan).loss.backward()
        for tensor in (image, text, scale):
            tensor.grad = None

    return loss, 0


def on_a_rank(kind: str, pairs: int) -> None:
    """Print the bytes sent by one repetition, and the peak memory above that at the start."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=world)
    before = held("VmRSS")
    step, parameters = a_step_of(kind, pairs)
    step()
    base = before if kind == "step" else forget_peak()
    dist.barrier()
    sent = bytes_sent()
    step()
    sent = bytes_sent() - sent
    dist.barrier()
    result = {"sent": sent, "held": held("VmHWM") - base, "parameters": parameters}
    print(json.dumps(result), flush=True)
    distributed.exit_process()


def loss_bytes(batch: int, world: int, embed_dim: int, device: str = "cpu") -> int:
    """Return the bytes of the tiled loss on one rank in float32.

    The images' scaled features and gradient and the texts' gradient (B rows each); with several ranks the gathered
    texts, kept from the forward to the backward pass, and their gradient (N rows each); four numbers for each row and
    column; three tiles. B is ``batch``, the pairs of one rank, and N those of all; the device's type decides the tile.
    """
    total = batch * world
    gathered = 0 if world == 1 else 2 * total
    height, width = default_tile(torch.device(device))
    tile = min(height, batch) * min(width, total)
    return 4 * ((3 * batch + gathered) * embed_dim + 4 * (batch + total) + 3 * tile)


def ranks(kinds: list[str], worlds: list[int], pairs: int) -> Table:
    title = f"{pairs} pairs a rank"
    table = Table("what", "ranks", "sent: formula", "measured", "held: formula", "measured", title=title)
    for kind in kinds:
        for world in worlds:
            results = _run(kind, pairs, world)
            result = {key: max(result[key] for result in results) for key in results[0]}
            sent = sent_by_loss(pairs, world)
            memory = float(loss_bytes(pairs, world, D))
            if kind == "step":
                sent += sent_by_gradients(result["parameters"], world)
                copies = 4 if world == 1 else 5  # weights, gradients, two moments; DDP's buckets
                memory += 4 * copies * result["parameters"] + kept_by_activations(pairs)
            cells = (sent, result["sent"], memory, result["held"])
            table.add_row(kind, str(world), *(f"{value / MIB:.2f} MiB" for value in cells))
    return table


def _run(kind: str, pairs: int, world: int) -> list[dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RENDEZVOUS": f"file://{folder}/rendezvous"}
        environment["MALLOC_TRIM_THRESHOLD_"] = environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # return freed memory
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "rank", kind, str(pairs)],
                env={**environment, "RANK": str(rank), "WORLD_SIZE": str(world)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        return [json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in processes]


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """Record the storages that autograd keeps inside the block, and their bytes, without the weights."""
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address could be reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


class Kept(NamedTuple):
    """Bytes that autograd keeps for one pair.

    Attributes:
        plain: without activation checkpointing.
        checkpointed: with activation checkpointing of the blocks.
        block: of the largest block, kept while it is recomputed.
    """

    plain: float
    checkpointed: float
    block: float


def kept_by_a_pair(name: str, half: bool) -> Kept:
    """Count with fake tensors, as the difference of two pairs and one: what does not grow with pairs cancels out."""
    with FakeTensorMode(allow_non_fake_inputs=True), patch("lit_clip.models.transformer.pack", _really_packed):
        return _kept_by_a_pair(name, half)


def _really_packed(*arguments: Any) -> Packing:
    """Pack with real tensors: the packing depends on lengths, which fake tensors do not have."""
    with unset_fake_temporarily():
        return pack(*arguments)


def _kept_by_a_pair(name: str, half: bool) -> Kept:
    model = create_model(f"{name}-quickgelu")
    blocks = [block for tower in TOWERS for block in tower_blocks(model, tower)]
    whole, of_blocks = _second_of_two(model, blocks, half)
    checkpoint_blocks(blocks)
    return Kept(whole, _second_of_two(model, [], half)[0], max(of_blocks))


def _second_of_two(model: CLIP, blocks: list[nn.Module], half: bool) -> tuple[float, list[float]]:
    totals: list[list[float]] = []
    for pairs in (1, 2):
        images = torch.zeros(pairs, 3, *height_width(model.preprocessing.image_size))
        tokens, lengths = torch.zeros(pairs, model.context_length, dtype=torch.long), [model.context_length] * pairs
        with counting(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
            marks: list[float] = []

            def mark(*_: object, kept: dict[int, int] = kept, marks: list[float] = marks) -> None:
                marks.append(sum(kept.values()))

            hooks = [block.register_forward_pre_hook(mark) for block in blocks]
            hooks += [block.register_forward_hook(mark) for block in blocks]
            features = model.encode_image(images, normalize=True), model.encode_text(tokens, True, lengths)
            mark()
        del features
        for hook in hooks:
            hook.remove()
        totals.append([marks[-1], *(end - start for start, end in zip(marks[:-1:2], marks[1:-1:2], strict=True))])
    whole, *of_blocks = (two - one for one, two in zip(*totals, strict=True))
    return whole, of_blocks


def activations(names: list[str]) -> Table:
    title = "MiB that a pair leaves for the backward pass"
    table = Table("model", "precision", "all", "checkpointed", "largest block", title=title)
    for name in names:
        for half in (False, True):
            cells = (f"{value / MIB:.1f}" for value in kept_by_a_pair(name, half))
            table.add_row(name, "bf16-mixed" if half else "fp32", *cells)
    return table


def h100(utilisation: float) -> Table:
    """Compute days and GiB of the paper's runs with the settings of configs/pretrain_*.yaml."""
    title = f"{utilisation:.0%} of 989 TFLOP/s"
    table = Table("model", "GPUs", "pairs a GPU", "passes", "days", "GiB a GPU", title=title)
    for name, (micro, checkpointed) in MODELS.items():
        size = measure(resolve_architecture(f"{name}-quickgelu"))
        full, half = (kept_by_a_pair(name, half) for half in (False, True))
        parameters, forward, embed_dim = size.parameters or 0, size.image_flops or 0, size.embed_dim or 0
        forward += size.text_flops or 0
        pairs = PAIRS / 32 if name == "ViT-L-14-336" else PAIRS
        # On CUDA autocast keeps residual sums in float32, two per block; on CPU, where this counts, it does not.
        residual = full.checkpointed - half.checkpointed
        a_pair = full.checkpointed + half.block if checkpointed else half.plain + 2 * residual
        for gpus in (8, 64, 256):
            batch = 32_768 // gpus
            parts = math.ceil(batch / micro)
            passes = 3 + checkpointed + (parts - 1) / parts
            days = passes * forward * pairs / (gpus * H100_FLOPS * utilisation) / 86_400
            states = (4 + 4 + 8 + 4 + 2) * parameters  # weights, gradients, moments, DDP's buckets, bf16 copies
            memory = states + min(micro, batch) * a_pair + loss_bytes(batch, gpus, embed_dim, "cuda")
            memory += batch * 3 * int(size.image_size or 0) ** 2  # uint8 images
            table.add_row(name, str(gpus), str(batch), f"{passes:.3g}", f"{days:.1f}", f"{memory / 2**30:.1f}")
    return table


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("ranks")
    measured.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    measured.add_argument("--pairs", type=int, default=256)
    measured.add_argument("--kinds", nargs="+", default=["loss", "step"])
    commands.add_parser("activations").add_argument("--models", nargs="+", default=list(MODELS))
    commands.add_parser("h100").add_argument("--utilisation", type=float, default=0.2)
    rank = commands.add_parser("rank", help="(used by itself)")
    rank.add_argument("kind")
    rank.add_argument("pairs", type=int)
    arguments = options.parse_args()
    if arguments.command == "rank":
        on_a_rank(arguments.kind, arguments.pairs)
        return
    if arguments.command == "ranks":
        table = ranks(arguments.kinds, arguments.processes, arguments.pairs)
    elif arguments.command == "activations":
        table = activations(arguments.models)
    else:
        table = h100(arguments.utilisation)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
