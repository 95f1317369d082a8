"""One rank of a step whose images have several captions each, and the loss as a plain loop over images and captions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_clip.batch import CaptionBatch
from lit_clip.losses import Contrastive, Sigmoid, tiled
from lit_clip.module import LitCLIP
from tests.helpers.ranks import CONFIG, PAIRS, _Step, make_batch, make_module, serve

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


def gradients(output: str) -> None:
    """Write each case's largest relative error, of the loss and of a parameter's gradient after a DDP step, as JSON."""
    rank, world, errors = dist.get_rank(), dist.get_world_size(), {}
    for sigmoid in (False, True):
        expected, loss = module_of(sigmoid, None), torch.zeros(())
        if rank == 0:
            loss = loop(expected)
            loss.backward()
        for counts in IMAGES[world]:
            first = sum(counts[:rank])
            for size, tiled.TILE in CASES:
                step = DistributedDataParallel(_Step(module_of(sigmoid, size)))
                value = step(batch_of(slice(first, first + counts[rank])))
                value.backward()
                mean = value.detach().clone()
                dist.all_reduce(mean)
                found = [abs(float(mean / world - loss))]
                ours = step.module.module.model
                for name, parameter in expected.model.named_parameters() if rank == 0 else ():
                    gradient = ours.get_parameter(name).grad
                    assert gradient is not None, name
                    assert parameter.grad is not None, name
                    found.append(float((gradient - parameter.grad).norm() / parameter.grad.norm()))
                errors[f"{'sigmoid' if sigmoid else 'softmax'} {counts} {size}"] = max(found)
    if rank == 0:
        Path(output).write_text(json.dumps(errors), encoding="utf-8")


if __name__ == "__main__":
    serve(globals())
