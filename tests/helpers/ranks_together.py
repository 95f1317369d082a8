"""One rank of a step with several captions an image or several images a thing, and the losses as plain loops."""

import dataclasses
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
from datamodules.pairs.batches import Collate
from datamodules.pairs.source import Pair
from lit_clip.batch import CaptionBatch
from lit_clip.errors import BadSample
from lit_clip.losses import Contrastive, Loss, Sigmoid, WeightedContrastive, tiled
from lit_clip.module import LitCLIP
from tests.helpers.ranks import CONFIG, PAIRS, FewIds, _Step, make_batch, make_module, serve

CAPTIONS = (3, 1, 7, 2, 5, 1, 4, 6)  # of each image
IMAGES = {1: [(8,)], 2: [(5, 3), (8, 0)], 4: [(3, 2, 2, 1), (2, 0, 5, 1)]}  # of each rank
CASES = ((None, (64, 64)), (2, (2, 3)), (5, (2, 3)), (100, (2, 3)))  # sizes of micro-batches, and of the loss's tiles


def batch_of(images: slice) -> CaptionBatch:
    """Return some images of one fixed batch of 8, each with all of its captions."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 49, (sum(CAPTIONS), 16), generator=generator)
    tokens[torch.arange(len(tokens)), torch.randint(3, 16, (len(tokens),), generator=generator)] = 49  # end of text
    image_of = torch.arange(PAIRS).repeat_interleave(torch.tensor(CAPTIONS))
    wanted = (image_of >= images.start) & (image_of < images.stop)
    of_rank = image_of[wanted] - images.start
    names = [str(image) for image in image_of[wanted].tolist()]
    pixels = make_batch(slice(0, PAIRS)).images[images]
    if not len(pixels):  # all of its images were skipped
        return CaptionBatch(pixels, torch.zeros(0, 1, dtype=torch.long), [], skipped=[("0", "broken image")])
    return CaptionBatch(pixels, tokens[wanted], names, [f"{n} of {name}" for n, name in enumerate(names)])._replace(
        image_of=of_rank
    )


def module_of(sigmoid: bool, size: int | None) -> LitCLIP:
    config = dataclasses.replace(CONFIG, logit_bias=sigmoid)
    loss = (Sigmoid if sigmoid else Contrastive)("positives")
    module = make_module(architecture=config, micro_batch_size=size, loss=loss)
    if module.model.logit_bias is not None:
        module.model.logit_bias.data.fill_(-2)
    return module


def loop(module: LitCLIP) -> Tensor:
    """Return the loss of all images and captions, one image and one caption at a time."""
    model: Any = module.model
    batch, scale = batch_of(slice(0, PAIRS)), model.logit_scale.exp()
    images = [model.encode_image(model.normalize(image[None]), normalize=True)[0] for image in batch.images]
    texts = [model.encode_text(tokens[None], normalize=True)[0] for tokens in batch.tokens]
    stops = torch.tensor(CAPTIONS).cumsum(0).tolist()
    own = [texts[stop - count : stop] for stop, count in zip(stops, CAPTIONS, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(images):
        if model.logit_bias is not None:
            for j, captions in enumerate(own):
                for caption in captions:
                    logit = scale * (image @ caption) + model.logit_bias
                    total = total - len(own[i]) * torch.sigmoid(logit if i == j else -logit).log()
            continue
        of_image = sum((scale * (image @ caption)).exp() for captions in own for caption in captions)
        right = sum(scale * (image @ caption) for caption in own[i]) / len(own[i])
        total = total + len(own[i]) * (torch.as_tensor(of_image).log() - right) / 2
        for caption in own[i]:
            logits = [(scale * (other @ caption), len(own[j])) for j, other in enumerate(images)]
            of_caption = sum(times * logit.exp() for logit, times in logits)
            total = total + (torch.as_tensor(of_caption).log() - scale * (image @ caption)) / 2
    return total / len(texts)


def error_of_step(module: LitCLIP, batch: CaptionBatch, expected: LitCLIP, loss: Tensor) -> float:
    """Return the largest relative error of the loss, and of a parameter's gradient, after a DDP step."""
    step = DistributedDataParallel(_Step(module))
    value = step(batch)
    value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    found = [abs(float(mean / dist.get_world_size() - loss))]
    for name, parameter in expected.model.named_parameters() if dist.get_rank() == 0 else ():
        gradient = module.model.get_parameter(name).grad
        assert gradient is not None, name
        assert parameter.grad is not None, name
        found.append(float((gradient - parameter.grad).norm() / parameter.grad.norm()))
    return max(found)


def value_of(loop: Callable[[], Tensor]) -> Tensor:
    """Return the loss of a plain loop, after its backward pass; zero on other ranks than the first."""
    if dist.get_rank():
        return torch.zeros(())
    loss = loop()
    loss.backward()
    return loss.detach()


def write(output: str, errors: dict[str, float]) -> None:
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(errors), encoding="utf-8")


def captions(output: str) -> None:
    """Write the error of each case with several captions an image, as JSON."""
    rank, errors = dist.get_rank(), {}
    for sigmoid in (False, True):
        expected = module_of(sigmoid, None)
        loss = value_of(partial(loop, expected))
        for counts in IMAGES[dist.get_world_size()]:
            first = sum(counts[:rank])
            for size, tiled.TILE in CASES:
                batch = batch_of(slice(first, first + counts[rank]))
                name = f"{'sigmoid' if sigmoid else 'softmax'} {counts} {size}"
                errors[name] = error_of_step(module_of(sigmoid, size), batch, expected, loss)
    write(output, errors)


# Several images of a thing are right for its texts.

THINGS = [[0, 1, 2, 3], [4, 5, 6], [7]]  # the images of each
WEIGHTS = (0.5, 3.0, 1.25)  # of each thing
THING_COUNTS = {1: [(8,)], 2: [(5, 3), (8, 0)], 4: [(3, 2, 2, 1), (2, 0, 5, 1)]}  # pairs of each rank
THING_SIZES = (None, 2, 3)  # of micro-batches
THING_LOSSES: dict[str, type[Loss]] = {"plain": Contrastive, "weighted": WeightedContrastive}


def table_of(folder: Path) -> str:
    """Write a table with a row for each thing, which lists its images."""
    rows = [
        {"image": [f"{image}.png" for image in images], "caption": f"thing {thing}", "weight": WEIGHTS[thing]}
        for thing, images in enumerate(THINGS)
    ]
    (folder / "things.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "things.jsonl")


def batch_of_things(table: str, rows: slice) -> CaptionBatch:
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


def loop_of_things(module: LitCLIP, table: str, weighted: bool) -> Tensor:
    """Return the loss: each image is right for each text of its thing, and each text for each image."""
    model: Any = module.model
    batch, scale = batch_of_things(table, slice(0, PAIRS)), model.logit_scale.exp()
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


def things(output: str, table: str) -> None:
    """Write the error of each case with several images a thing, as JSON."""
    rank, errors = dist.get_rank(), {}
    for name, kind in THING_LOSSES.items():
        expected = make_module(loss=kind("positives"))
        loss = value_of(partial(loop_of_things, expected, table, weighted=name == "weighted"))
        for counts in THING_COUNTS[dist.get_world_size()]:
            first = sum(counts[:rank])
            for size in THING_SIZES:
                module = make_module(loss=kind("positives"), micro_batch_size=size)
                batch = batch_of_things(table, slice(first, first + counts[rank]))
                errors[f"{name} {counts} {size}"] = error_of_step(module, batch, expected, loss)
    write(output, errors)


# A thing's images are one: the mean of their unit features.

MEANS = [4, 1, 3, 2, 1, 2]  # images of each thing
MEAN_COUNTS = {1: [(6,)], 2: [(4, 2), (6, 0), (1, 5)], 4: [(2, 1, 2, 1), (3, 0, 2, 1)]}  # things of each rank


def images_of_things() -> list[Tensor]:
    """Return the images of each thing, uint8 ``[K, 3, H, W]``."""
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(0, 256, (sum(MEANS), 3, 32, 32), dtype=torch.uint8, generator=generator).split(MEANS))


def batch_of_means(rows: slice) -> CaptionBatch:
    """Collate things with all of their images."""
    images = images_of_things()
    samples: list[Pair | BadSample] = [
        Pair(images[n][0], f"thing {n}", f"{n}", "", "", {}, None, list(images[n][1:])) for n in range(len(MEANS))[rows]
    ]
    return Collate(FewIds(16), (3, 32, 32))(samples)


def loop_of_means(module: LitCLIP) -> Tensor:
    """Return the loss between the texts and the directions of the means of the images' unit features, one by one."""
    model: Any = module.model
    directions, texts = [], []
    for number, images in enumerate(images_of_things()):
        total = torch.zeros(16, dtype=torch.float64)
        for image in images:
            feature = model.encode_image(model.normalize(image[None]))[0]
            total = total + feature / feature.norm() / len(images)
        directions.append(total / total.norm())
        texts.append(model.encode_text(FewIds(16)([f"thing {number}"]), normalize=True)[0])
    loss = torch.zeros((), dtype=torch.float64)
    for queries, candidates in ((directions, texts), (texts, directions)):
        for number, query in enumerate(queries):
            logits = torch.stack([model.logit_scale.exp() * (query @ candidate) for candidate in candidates])
            loss = loss + (logits.exp().sum().log() - logits[number]) / (2 * len(queries))
    return loss


def means(output: str) -> None:
    """Write the error of each case with things whose images' features are averaged, as JSON."""
    rank, errors = dist.get_rank(), {}
    expected = make_module(loss=Contrastive("positives"))
    loss = value_of(partial(loop_of_means, expected))
    for counts in MEAN_COUNTS[dist.get_world_size()]:
        first = sum(counts[:rank])
        for size in THING_SIZES:
            module = make_module(loss=Contrastive("positives"), micro_batch_size=size)
            batch = batch_of_means(slice(first, first + counts[rank]))
            errors[f"{counts} {size}"] = error_of_step(module, batch, expected, loss)
    write(output, errors)


if __name__ == "__main__":
    serve(globals())
