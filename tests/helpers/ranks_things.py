"""One rank of a step whose images are of a few things, and the loss as a plain loop over things, images and texts."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datamodules import Captions, ImageOptions
from datamodules.loading.bad_samples import Skipped
from datamodules.pairs.batches import Collate
from datamodules.pairs.stored_features import PairSample
from lit_clip.batch import CaptionBatch
from lit_clip.losses import Contrastive, Loss, WeightedContrastive
from lit_clip.module import LitCLIP
from tests.helpers.ranks import PAIRS, FewIds, _Step, make_batch, make_module, serve

THINGS = [[0, 1, 2, 3], [4, 5, 6], [7]]  # the images of each
WEIGHTS = (0.5, 3.0, 1.25)  # of each thing
COUNTS = {1: [(8,)], 2: [(5, 3), (8, 0)], 4: [(3, 2, 2, 1), (2, 0, 5, 1)]}  # pairs of each rank
SIZES = (None, 2, 3)  # of micro-batches
LOSSES: dict[str, type[Loss]] = {"plain": Contrastive, "weighted": WeightedContrastive}


def table_of(folder: Path) -> str:
    """Write a table with a row for each thing, which lists its images."""
    rows = [
        {"image": [f"{image}.png" for image in images], "caption": f"thing {thing}", "weight": WEIGHTS[thing]}
        for thing, images in enumerate(THINGS)
    ]
    (folder / "things.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "things.jsonl")


def batch_of(table: str, rows: slice) -> CaptionBatch:
    """Return pairs with the groups, keys and weights of the table's source, and with pixels and tokens made here."""
    source: Any = Captions(table, table, images=ImageOptions("all"))._source(table, "train")
    texts = [source.text(row, None) for row in range(len(source))][rows]
    made = make_batch(slice(0, PAIRS))
    tokens = made.tokens.clone()
    tokens[6, :2] = tokens[6, :2] % 47 + 1  # no text is another thing's, or the same as another of its thing
    if not texts:
        return CaptionBatch(made.images[rows], torch.zeros(0, 1, dtype=torch.long), [])
    weights = torch.tensor([WEIGHTS[int(text.caption.split()[1])] for text in texts], dtype=torch.float64)
    keys, captions, groups = ([getattr(text, name) for text in texts] for name in ("key", "caption", "group"))
    return CaptionBatch(made.images[rows], tokens[rows], keys, captions, groups, extra={"weight": weights})


def loop(module: LitCLIP, table: str, weighted: bool) -> Tensor:
    """Return the loss: each image is right for each text of its thing, and each text for each image."""
    model: Any = module.model
    batch, scale = batch_of(table, slice(0, PAIRS)), model.logit_scale.exp()
    images = [model.encode_image(model.normalize(image[None]), normalize=True)[0] for image in batch.images]
    texts = [model.encode_text(tokens[None], normalize=True)[0] for tokens in batch.tokens]
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for thing, own in enumerate(THINGS):
        weight = WEIGHTS[thing] if weighted else 1.0
        for i in own:
            weights += weight
            for query, candidates in ((images[i], texts), (texts[i], images)):
                logits = [scale * (query @ candidate) for candidate in candidates]
                every = torch.stack(logits).exp().sum().log()
                total = total + weight * (every - torch.stack([logits[j] for j in own]).sum() / len(own)) / 2
    return total / weights


def gradients(output: str, table: str) -> None:
    """Write each case's largest relative error, of the loss and of a parameter's gradient after a DDP step, as JSON."""
    errors: dict[str, float] = {}
    for name, kind in LOSSES.items():
        expected, loss = make_module(loss=kind("positives")), torch.zeros(())
        if dist.get_rank() == 0:
            loss = loop(expected, table, weighted=name == "weighted")
            loss.backward()
        errors |= errors_of(name, kind, expected, loss, COUNTS, partial(batch_of, table))
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(errors), encoding="utf-8")


def errors_of(
    name: str,
    kind: type[Loss],
    expected: LitCLIP,
    loss: Tensor,
    splits: dict[int, list[tuple[int, ...]]],
    batch: Callable[[slice], CaptionBatch],
) -> dict[str, float]:
    """Return the largest error of the loss and the gradients for each division of the pairs and size of micro-batch."""
    rank, world, errors = dist.get_rank(), dist.get_world_size(), {}
    for counts in splits[world]:
        first = sum(counts[:rank])
        for size in SIZES:
            step = DistributedDataParallel(_Step(make_module(loss=kind("positives"), micro_batch_size=size)))
            value = step(batch(slice(first, first + counts[rank])))
            value.backward()
            mean = value.detach().clone()
            dist.all_reduce(mean)
            found = [abs(float(mean / world - loss))]
            ours = step.module.module.model
            for parameter, wanted in expected.model.named_parameters() if rank == 0 else ():
                gradient = ours.get_parameter(parameter).grad
                assert gradient is not None, parameter
                assert wanted.grad is not None, parameter
                found.append(float((gradient - wanted.grad).norm() / wanted.grad.norm()))
            errors[f"{name} {counts} {size}"] = max(found)
    return errors


MEANS = [4, 1, 3, 2, 1, 2]  # images of the things whose features are averaged
DIVIDED = {1: [(6,)], 2: [(4, 2), (6, 0)], 4: [(2, 1, 2, 1), (3, 0, 2, 1)]}  # things of each rank


def images_of_things() -> list[Tensor]:
    """Return the images of each thing, uint8 ``[K, 3, H, W]``."""
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(0, 256, (sum(MEANS), 3, 32, 32), dtype=torch.uint8, generator=generator).split(MEANS))


def batch_of_means(things: slice) -> CaptionBatch:
    """Collate things with all of their images."""
    numbers = range(len(MEANS))[things]
    images = images_of_things()
    samples: list[PairSample | Skipped] = [
        PairSample(images[n][0], f"thing {n}", f"{n}", "", "", {}, None, list(images[n][1:])) for n in numbers
    ]
    return Collate(FewIds(16), (3, 32, 32))(samples)


def mean_loop(module: LitCLIP) -> Tensor:
    """Return the loss between the texts and the directions of the means of the images' unit features, one by one."""
    model: Any = module.model
    means, texts = [], []
    for number, images in enumerate(images_of_things()):
        total = torch.zeros(16, dtype=torch.float64)
        for image in images:
            feature = model.encode_image(model.normalize(image[None]))[0]
            total = total + feature / feature.norm() / len(images)
        means.append(total / total.norm())
        texts.append(model.encode_text(FewIds(16)([f"thing {number}"]), normalize=True)[0])
    loss = torch.zeros((), dtype=torch.float64)
    for queries, candidates in ((means, texts), (texts, means)):
        for number, query in enumerate(queries):
            logits = torch.stack([model.logit_scale.exp() * (query @ candidate) for candidate in candidates])
            loss = loss + (logits.exp().sum().log() - logits[number]) / (2 * len(queries))
    return loss


def means(output: str) -> None:
    """Write what :func:`gradients` does for things whose images' features are averaged."""
    expected, loss = make_module(loss=Contrastive("positives")), torch.zeros(())
    if dist.get_rank() == 0:
        loss = mean_loop(expected)
        loss.backward()
    errors = errors_of("means", Contrastive, expected, loss, DIVIDED, batch_of_means)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(errors), encoding="utf-8")


if __name__ == "__main__":
    serve(globals())
