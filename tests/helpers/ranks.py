"""Functions that one rank of a distributed test runs, in its own process, started by the ``ranks`` fixture."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Sigmoid, Sum, tiled
from lit_clip.losses.contrastive import Duplicates, contrastive_loss, sigmoid_loss
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.finetuning import Freeze
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.module import LitCLIP
from lit_clip.training.activation_checkpointing import checkpoint_encoders
from lit_clip.training.teacher import Distillation
from tests.helpers import own_encoders

CONFIG = CLIPConfig(
    embed_dim=16,
    image=VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
    text=TextTransformerConfig(context_length=16, vocab_size=50, width=64, layers=2, heads=1),
)
PAIRS = 8
DUPLICATES = ((0, 5), (1, 7), (2, 6))


class FewIds(CLIPTokenizer):
    """Ids of a vocabulary of 50, which a rank without pairs needs for a caption whose features are discarded."""

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        return super().__call__(texts).clamp(max=49)


def make_module(checkpointed: bool = False, **options: Any) -> LitCLIP:
    """Return the same float64 model on every rank, without a logger; ``options`` are LitCLIP's."""
    torch.manual_seed(0)
    module = LitCLIP(**{"architecture": CONFIG, **options}).double()
    module.model.normalize = lambda images: images.double() / 255  # the real one ends in float32
    module.model._tokenizer = FewIds(16)
    module.log = lambda *_, **__: None  # there is no trainer
    if checkpointed:
        checkpoint_encoders(module.model)
    return module


def make_batch(rows: slice) -> CaptionBatch:
    """Return some rows of one fixed batch of 8 pairs, with the duplicates listed in ``DUPLICATES``."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49, (PAIRS, 16), generator=generator)
    tokens[torch.arange(PAIRS), torch.randint(3, 16, (PAIRS,), generator=generator)] = 49  # end of text
    tokens[6] = tokens[2]  # the same caption
    captions = [f"image {chr(ord('a') + i)}" for i in range(PAIRS)]
    keys = ["0", "1", "2", "3", "4", "0", "6", "7"]  # the same image twice
    groups = ["", "shoe", "", "", "", "", "", "shoe"]
    weights = torch.tensor([0.5, 3.0, 0.0, 1.0, 0.25, 2.0, 0.0, 1.5])
    others = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    extra = {"importance": torch.arange(1.0, PAIRS + 1), "weight": weights, "other_image": others}
    extra["title"] = tokens.roll(3, dims=0)
    extra = {name: value[rows] for name, value in extra.items()}
    return CaptionBatch(images[rows], tokens[rows], keys[rows], captions[rows], groups[rows], extra=extra)


class _Step(torch.nn.Module):
    """``training_step`` as ``forward``, as Lightning wraps a module for DDP."""

    def __init__(self, module: LitCLIP) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: CaptionBatch) -> torch.Tensor:
        return self.module.training_step(batch, 0)


COUNTS = {1: (8,), 2: (5, 3), 3: (3, 4, 1), 4: (3, 2, 2, 1)}  # pairs of each rank, uneven as a last batch may be


class Case(NamedTuple):
    """Settings for one computation of the gradient of the whole batch."""

    sigmoid: bool
    parts: int
    tile: tuple[int, int]
    frozen: str | None
    duplicates: Duplicates = "negatives"

    def module(self) -> LitCLIP:
        config = dataclasses.replace(CONFIG, logit_bias=self.sigmoid)
        most = max(COUNTS[distributed.rank_and_world()[1]])
        module = make_module(
            architecture=config,
            freeze=Freeze(**{self.frozen: "all"}) if self.frozen else None,
            micro_batch_size=-(-most // self.parts) if self.parts > 1 else None,
            loss=(Sigmoid if self.sigmoid else Contrastive)(self.duplicates),
        )
        if module.model.logit_bias is not None:
            module.model.logit_bias.data.fill_(-2)  # at -10 the negatives have almost no gradient
        return module


CASES = [
    *(
        Case(sigmoid, parts, tile, frozen)
        for sigmoid in (False, True)
        for parts in (1, 3)
        for tile in ((64, 64), (2, 3))
        for frozen in (None, "image", "text")
    ),
    *(
        Case(sigmoid, 1, (2, 3), None, duplicates)
        for sigmoid in (False, True)
        for duplicates in ("positives", "ignored")
    ),
]


@cache
def dense_gradients(case: Case) -> dict[str, torch.Tensor | None]:
    """Return the gradients of one process with the whole batch: the loss as defined, and plain autograd."""
    module, batch = case.module(), make_batch(slice(0, PAIRS))
    model, (image, text) = module.model, module(batch)
    same = torch.eye(PAIRS, dtype=torch.bool)
    for i, j in DUPLICATES:
        same[i, j] = same[j, i] = True
    if model.logit_bias is None:
        loss = contrastive_loss(image, text, image, text, model.logit_scale.exp(), 0, same, case.duplicates)
    else:
        loss = sigmoid_loss(image, text, model.logit_scale.exp(), model.logit_bias, 0, same, case.duplicates)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients() -> dict[str, float]:
    """Return every case's largest relative error of a parameter's gradient after a DDP step over uneven ranks.

    Compared with one process that has the whole batch.
    """
    rank, world = distributed.rank_and_world()
    ranks, errors = distributed.RankCounts(rank, COUNTS[world]), {}
    for case in CASES:
        tiled.TILE = case.tile
        step = DistributedDataParallel(_Step(case.module()))
        step(make_batch(ranks.mine)).backward()
        whole = dense_gradients(case._replace(parts=1, tile=(64, 64))) if rank == 0 else {}
        for name, expected in whole.items():
            ours = step.module.module.model.get_parameter(name).grad
            if expected is None:
                assert ours is None, f"{case}: {name} is frozen"
                continue
            assert ours is not None, f"{case}: {name} has no gradient"
            assert expected.norm() > 0, f"{case}: {name} has a zero gradient"
            error = float((ours - expected).norm() / expected.norm())
            errors[str(case)] = max(error, errors.get(str(case), 0.0))
    return errors


def synchronisations() -> None:
    """Check that DDP sums each gradient over the ranks once a step, for any number of micro-batches."""
    rank, world = distributed.rank_and_world()
    for parts in (1, 3):
        module = Case(False, parts, (64, 64), None).module()
        step, summed = DistributedDataParallel(_Step(module)), []

        def count(summed: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            summed.append(bucket.buffer().numel())
            return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

        step.register_comm_hook(summed, count)
        step(make_batch(distributed.RankCounts(rank, COUNTS[world]).mine)).backward()
        assert sum(summed) == sum(parameter.numel() for parameter in module.parameters()), (parts, summed)


def uneven_gather() -> None:
    """Check that all ranks, which have 0, 1, 2, ... rows, get all rows in rank order."""
    rank, world = distributed.rank_and_world()
    rows = torch.full((rank, 3), float(rank))
    expected = torch.cat([torch.full((r, 3), float(r)) for r in range(world)])
    assert torch.equal(distributed.gather_uneven(rows), expected)
    assert distributed.gather_objects([f"{rank}"] * rank) == [f"{r}" for r in range(world) for _ in range(r)]
    assert distributed.sum_over_ranks(torch.tensor(rank + 1.0), torch.device("cpu")).item() == world * (world + 1) / 2


def summed_rows() -> None:
    """Check that the gradient of gathered rows is the sum of all ranks' gradients, for even and uneven ranks."""
    rank, world = distributed.rank_and_world()
    for counts in ((2,) * world, tuple(range(1, world + 1))):
        ranks = distributed.RankCounts(rank, counts)
        rows = torch.full((counts[rank], 3), float(rank), dtype=torch.float64, requires_grad=True)
        weight = torch.arange(3.0 * ranks.total, dtype=torch.float64).reshape(-1, 3)
        (distributed.gather(rows, ranks) * weight * (rank + 1)).sum().backward()
        assert torch.equal(rows.grad, world * (world + 1) / 2 * weight[ranks.mine])


def finetuned_module(options: str) -> LitCLIP:
    """Return :func:`make_module` with LitCLIP's arguments as JSON, after ``setup``.

    ``teacher`` and ``weight`` stand for a distillation beside the default loss.
    """
    assert own_encoders  # a mapping that names them finds them only if they are imported
    arguments = json.loads(options)
    if "teacher" in arguments:
        terms = [Contrastive(), Distillation(arguments.pop("teacher"))]
        arguments["loss"] = Sum(terms, [1.0, arguments.pop("weight")])
    module = make_module(**arguments)
    module.setup("fit")
    return module


def finetune_gradients(output: str, options: str) -> None:
    """Write the gradients of a DDP step of :func:`finetuned_module`; None for frozen parameters."""
    rank, world = distributed.rank_and_world()
    step = DistributedDataParallel(_Step(finetuned_module(options)))
    size = PAIRS // world
    for _ in range(2):  # DDP reports unused parameters in the second step
        step.zero_grad()
        step(make_batch(slice(rank * size, (rank + 1) * size))).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in step.module.module.model.named_parameters()}, output)


def long_work() -> None:
    """Let rank 0 work for longer than any collective would wait, and then fail."""
    rank = distributed.rank_and_world()[0]
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))

    def work() -> str:
        assert rank == 0
        time.sleep(3)
        return "done"

    def fail() -> None:
        raise InputError("no space")

    assert distributed.on_first_rank(work) == ("done" if rank == 0 else None)
    message = "no space" if rank == 0 else "rank 0 has failed; see its error"
    with pytest.raises(InputError, match=message):
        distributed.on_first_rank(fail)
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=1))


def serve(functions: dict[str, Any]) -> None:
    """Run the function named on the command line as one rank of a process group; write what the first one returns."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=os.environ["RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    found = functions[sys.argv[1]](*sys.argv[2:])
    if dist.get_rank() == 0:
        Path(os.environ["RESULT"]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    distributed.exit_process()


if __name__ == "__main__":
    serve(globals())
