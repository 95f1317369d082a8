"""The training of `lit-clip fit` in plain PyTorch, without Lightning: the same losses and the same weights.

    python plain_step.py captions.csv start.ckpt 20

The table has the columns `image` (paths) and `caption`; the run begins with the weights of `start.ckpt`.
"""

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import lit_clip

BATCH, RATE, WARMUP, SEED = 16, 1e-3, 5, 0


def batches(rows: int) -> Iterator[np.ndarray]:
    """Yield the rows of each step: a permutation for each epoch, without the incomplete batch at its end."""
    epoch = 0
    while True:
        order = np.arange(rows)
        np.random.default_rng((SEED, epoch)).shuffle(order)
        yield from order[: rows - rows % BATCH].reshape(-1, BATCH)
        epoch += 1


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return the loss of features `[B, D]` of images and their captions (figure 3 of the paper)."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # [B, B]
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train(
    table: Path, start: Path, steps: int, dtype: torch.dtype = torch.float32
) -> tuple[lit_clip.CLIP, list[float]]:
    """Return the trained model and the loss of each step."""
    model = lit_clip.load_model(start).to(dtype).train()
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = torch.stack([model.preprocess(Image.open(table.parent / row["image"])) for row in rows]).to(dtype)
    tokens = model.tokenize([row["caption"] for row in rows])

    # Gains and biases have no weight decay (section 2.5).
    decays = {name: p.ndim >= 2 and "bias" not in name for name, p in model.named_parameters()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if decays[name]], "weight_decay": 0.2},
        {"params": [p for name, p in model.named_parameters() if not decays[name]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)

    losses = []
    for step, batch in zip(range(steps), batches(len(rows)), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        image = model.encode_image(images[batch])
        text = model.encode_text(tokens[batch])
        loss = contrastive_loss(image, text, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    for number, value in enumerate(train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))[1]):
        print(number, f"{value:.6f}")
