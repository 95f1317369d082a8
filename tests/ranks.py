"""What one rank of a distributed test does; started by the ``ranks`` fixture as a process of its own."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lit_clip import collectives
from lit_clip.batch import CaptionBatch
from lit_clip.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.module import LitCLIP

CONFIG = CLIPConfig(
    embed_dim=16,
    image=VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
    text=TextTransformerConfig(context_length=16, vocab_size=50, width=64, layers=2, heads=1),
)
PAIRS = 8


def make_module() -> LitCLIP:
    """The same float64 model on every rank, without a logger."""
    torch.manual_seed(0)
    module = LitCLIP(CONFIG).double()
    module.model.normalize = lambda images: images.double() / 255  # the real one ends in float32
    module.log = lambda *_, **__: None  # there is no trainer
    return module


def make_batch(rows: slice) -> CaptionBatch:
    """Some rows of one fixed batch of 8 pairs."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49, (PAIRS, 16), generator=generator)
    tokens[torch.arange(PAIRS), torch.randint(3, 16, (PAIRS,), generator=generator)] = 49  # end of text
    captions = [f"picture {chr(ord('a') + i)}" for i in range(PAIRS)]
    return CaptionBatch(images[rows], tokens[rows], [str(i) for i in range(PAIRS)][rows], captions[rows])


class _Step(torch.nn.Module):
    """``training_step`` as ``forward``, which is what Lightning hands to DDP."""

    def __init__(self, module: LitCLIP) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: CaptionBatch) -> torch.Tensor:
        return self.module.training_step(batch, 0)


def gradients(output: str) -> None:
    """The gradients of one DDP step over all ranks' pairs, written by rank 0."""
    rank, world = collectives.rank_and_world()
    step = DistributedDataParallel(_Step(make_module()))
    size = PAIRS // world
    step(make_batch(slice(rank * size, (rank + 1) * size))).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in step.module.module.model.named_parameters()}, output)


def uneven_gather() -> None:
    """Ranks with 0, 1, 2, ... rows; everyone gets all in rank order."""
    rank, world = collectives.rank_and_world()
    rows = torch.full((rank, 3), float(rank))
    expected = torch.cat([torch.full((r, 3), float(r)) for r in range(world)])
    assert torch.equal(collectives.gather_uneven(rows), expected)
    assert collectives.gather_objects([f"{rank}"] * rank) == [f"{r}" for r in range(world) for _ in range(r)]
    assert collectives.sum_over_ranks(torch.tensor(rank + 1.0), torch.device("cpu")).item() == world * (world + 1) / 2


def finetuned_module(options: str) -> LitCLIP:
    """Like :func:`make_module` with LitCLIP's arguments as JSON."""
    torch.manual_seed(0)
    module = LitCLIP(**{"architecture": CONFIG, **json.loads(options)}).double()
    module.model.normalize = lambda images: images.double() / 255
    module.log = lambda *_, **__: None
    module.setup("fit")
    return module


def finetune_gradients(output: str, options: str) -> None:
    """The gradients of one DDP step of a module with options, and which parameters it trains; written by rank 0."""
    rank, world = collectives.rank_and_world()
    step = DistributedDataParallel(_Step(finetuned_module(options)))
    size = PAIRS // world
    for _ in range(2):  # DDP complains of unused parameters at the second step
        step.zero_grad()
        step(make_batch(slice(rank * size, (rank + 1) * size))).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in step.module.module.model.named_parameters()}, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=os.environ["RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.barrier()
    collectives.leave()
