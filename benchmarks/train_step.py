"""Time a training step of open_clip and of lit-clip with the same weights, images and captions, alternating.

    python benchmarks/train_step.py [--model ViT-B-32] [--batch 32] [--bf16] [--pairs 5] [--losses 20] [--device cpu]

Both get normalised images. open_clip's step is that of ``open_clip_train``: its model, ClipLoss and AdamW, with all 77
positions of every caption. Ours is that of ``LitCLIP``: trimmed tokens and their lengths as from the data modules, the
tiled loss, and fused AdamW. ``ViT-tiny-8-64`` is a model for 64-pixel images with patches of 8, width 192, and 6 and 4
layers; ``ViT-tiny-16-64`` is smaller.

Besides the ratio it prints the share of the peak: the FLOP/s of the matrix products that a side executes, forward and
backward, divided by those of the fastest plain matrix product in the same precision and run. Needing fewer FLOPs for
the same result improves the ratio, not this share.

``--losses N``: also run N steps in fp32 from the same weights, each side with its own optimiser and arithmetic, and
print the largest relative difference of the losses. Every step has new images and captions.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import open_clip
import torch
from peers import (
    autocast,
    captions,
    compare,
    end_if_emulated,
    length_figures,
    lengths_of,
    open_clip_pair,
    parser,
    save,
)
from results import Result
from torch import Tensor

from callbacks.non_finite import largest_gradient
from lit_clip import CLIP
from lit_clip.distributed import RankCounts
from lit_clip.losses.tiled import PairLayout, sharded_contrastive_loss
from lit_clip.models.config import height_width
from lit_clip.training.optimizers import decay_groups

MODELS = ("ViT-B-32", "ViT-B-16", "RN50", "ViT-tiny-8-64", "ViT-tiny-16-64", "RN-tiny-64")
BATCHES = {"ViT-tiny-8-64": 128, "ViT-tiny-16-64": 128, "RN-tiny-64": 256}
ADAM = {"betas": (0.9, 0.98), "eps": 1e-6}
TINY_RATE = 1e-6  # for timed steps, which all have the same batch: it must not be memorised
RATE = 1e-4  # for compared losses


class Pairs(NamedTuple):
    """Normalised images ``[B, 3, H, W]``, padded tokens ``[B, L]``, trimmed ones, and lengths."""

    images: Tensor
    tokens: Tensor
    trimmed: Tensor
    lengths: list[int]


def pairs_of(model: CLIP, texts: list[str], generator: torch.Generator, device: str) -> Pairs:
    height, width = height_width(model.preprocessing.image_size)
    images, tokens = torch.randn(len(texts), 3, height, width, generator=generator), model.tokenize(texts)
    lengths = lengths_of(model, tokens)
    return Pairs(images.to(device), tokens.to(device), model.tokenizer.trim(tokens).to(device), lengths)


def their_step(model: Any, rate: float, bf16: bool, device: str) -> Callable[[Pairs], Tensor]:
    """Return a step like that of ``open_clip_train.train.train_one_epoch``."""
    groups = decay_groups(model.named_parameters(), 0.2)  # the same as open_clip's
    optimizer = torch.optim.AdamW(groups, lr=rate, **ADAM)
    criterion = open_clip.ClipLoss()

    def step(pairs: Pairs) -> Tensor:
        optimizer.zero_grad()
        with autocast(device, bf16):
            loss = criterion(*model(pairs.images, pairs.tokens))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, torch.log(torch.tensor(100.0)).item())
        return loss.detach()

    return step


def our_step(model: CLIP, rate: float, bf16: bool, device: str) -> Callable[[Pairs], Tensor]:
    """Return a step like that of ``LitCLIP``."""
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), 0.2), lr=rate, **ADAM, fused=True)

    def step(pairs: Pairs) -> Tensor:
        optimizer.zero_grad()
        with autocast(device, bf16):
            image = model.encode_image(pairs.images, normalize=True)
            text = model.encode_text(pairs.trimmed, normalize=True, lengths=pairs.lengths)
            ranks = RankCounts(0, (len(image),))
            loss = sharded_contrastive_loss(image, text, model.logit_scale.exp(), PairLayout(ranks)).loss
        loss.backward()
        finite = largest_gradient(model.parameters()).isfinite()  # lit-clip checks this too
        optimizer.step()
        model.clamp_logit_scale()
        return loss.detach().where(finite, torch.nan)  # an assertion would wait for a GPU

    return step


def timed(options: Namespace) -> Result:
    """Measure the ratio, the shares of the peak, and samples per second."""
    theirs, ours = (model.to(options.device) for model in open_clip_pair(options.model))
    pairs = pairs_of(ours, captions(options.batch), torch.Generator().manual_seed(0), options.device)
    figures = length_figures(pairs.lengths)
    how = (TINY_RATE, options.bf16, options.device)
    their, our = their_step(theirs, *how), our_step(ours, *how)
    precision = "bf16" if options.bf16 else "fp32"
    where = "" if options.device == "cpu" else f", {options.device}"
    result = compare(
        f"training step, {options.model}, batch {options.batch}, {precision}{where}",
        lambda: their(pairs),
        lambda: our(pairs),
        options.pairs,
        name=f"train_step/{options.model}/{precision}" + where.replace(", ", "/"),
        dtype=torch.bfloat16 if options.bf16 else torch.float32,
        device=options.device,
    )
    for side, seconds in (("peers", result.peers), ("our", result.ours)):
        figures[f"{side}_samples_per_second"] = options.batch / (seconds or math.inf)
    result.figures.update(figures)
    return result


def losses(options: Namespace) -> Iterator[tuple[float, float]]:
    """Yield the losses of each step in fp32, theirs and ours."""
    theirs, ours = (model.to(options.device) for model in open_clip_pair(options.model))
    their, our = (make(model, RATE, False, options.device) for make, model in ((their_step, theirs), (our_step, ours)))
    texts, generator = captions(options.losses * options.batch), torch.Generator().manual_seed(0)
    for step in range(options.losses):
        pairs = pairs_of(ours, texts[step :: options.losses], generator, options.device)
        yield their(pairs).item(), our(pairs).item()


def same_losses(options: Namespace) -> Result:
    found = list(losses(options))
    most = max(abs(ours - theirs) / abs(theirs) for theirs, ours in found)
    title = f"losses of {options.losses} steps, {options.model}, batch {options.batch}, fp32"
    (first, _), last = found[0], found[-1]
    print(
        f"{title}: {first:.5f} to {last[0]:.5f} (open_clip) and {last[1]:.5f} (lit-clip), "
        f"largest relative difference {most:.1e}"
    )
    return Result(f"losses/{options.model}", title, figures={"largest_difference": most})


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=MODELS, default="ViT-B-32")
    arguments.add_argument("--batch", type=int, help="pairs; default: 32, or 128 for the small models")
    arguments.add_argument("--bf16", action="store_true", help="autocast on both sides")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--losses", type=int, default=0, metavar="N", help="also compare the losses of N steps")
    options = arguments.parse_args()
    end_if_emulated(options.bf16, options.device)
    options.batch = options.batch or BATCHES.get(options.model, 32)
    found = [timed(options)] if options.pairs else []
    if options.losses:
        found.append(same_losses(options))
    save(options.json, *found)


if __name__ == "__main__":
    main()
