"""A small SigLIP, or CLIP, on stored features: residual MLPs behind two frozen encoders; its training and measures."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pairs import Data, Pairs
from torch import Tensor, nn

from lit_clip.losses.contrastive import Duplicates, contrastive_loss, unit
from lit_clip.training.optimizers import PaperAdamW, decay_groups
from lit_clip.training.schedules import warmup_cosine

Start = Literal["siglip", "clip"]
WIDTH = 256
PRETRAINING_BATCH = 32_768  # of the published SigLIPs
SCALE, BIAS = 10.0, -10.0  # Zhai et al. 2023, section 3.2


class Block(nn.Module):
    """Residual MLP with a LayerNorm before it, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def tower(width: int) -> nn.Sequential:
    """Return a tower: stored features ``[B, width]`` -> ``[B, WIDTH]``."""
    entry = [nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, WIDTH)]
    return nn.Sequential(*entry, Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))


class Towers(nn.Module):
    """Two towers, with a SigLIP's scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = tower(1280), tower(384)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.logit_bias = nn.Parameter(torch.tensor(BIAS))


@dataclass(frozen=True)
class Training:
    """How towers are trained.

    Attributes:
        batch: pairs a step.
        pairs: pairs in all, from which the number of steps follows.
        lr: highest learning rate.
        loss: sigmoid or softmax.
        duplicates: how pairs with the same caption count, as in ``lit_clip.losses``.
        negative_weight: factor on the loss of wrong pairs, of the sigmoid loss.
        shift: how the bias is changed before the first step: by log(pretraining batch / batch), or as fits best the
            first pairs of the target.
        logit_rate: factor on the learning rate of scale and bias; 0 keeps them.
        weight_decay: AdamW's.
        warmup: steps.
        frozen: towers that are not trained.
    """

    batch: int = 64
    pairs: int = 8_192
    lr: float = 1e-4
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    duplicates: Duplicates = "negatives"
    negative_weight: float = 1.0
    shift: Literal["", "prior", "fitted"] = ""
    logit_rate: float = 1.0
    weight_decay: float = 0.1
    warmup: int = 0
    frozen: tuple[Literal["image", "text"], ...] = ()


FIRST = {  # how each start is trained
    "siglip": Training(256, 256 * 1400, 1e-3, "sigmoid", "ignored", PRETRAINING_BATCH / 256, "", 30.0, 0.1, 50),
    "clip": Training(256, 256 * 800, 1e-3, "softmax", "ignored", 1.0, "", 30.0, 0.1, 50),
}


def pretrained(start: Start, data: Data, seed: int, pairs: int = 0) -> Towers:
    """Return towers trained on the drawings and photographs that are learned first.

    Args:
        start: the kind of model.
        data: all pairs.
        seed: of the weights and the order.
        pairs: to train on in all; 0: as many as :data:`FIRST` says.
    """
    torch.manual_seed(seed)
    model = Towers()
    if start == "clip":
        nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
    parts = [data.training[name] for name in ("drawings", "photographs")]
    how = FIRST[start]
    return train(model, data, joined(parts), replace(how, pairs=pairs or how.pairs), seed)


def joined(parts: list[Pairs]) -> Pairs:
    """Return the pairs of several sets as one; images and captions are repeated where a set has fewer."""
    versions, captions = (
        max(each.shape[1] for each in kind) for kind in ([p.images for p in parts], [p.captions for p in parts])
    )
    rows = [(torch.arange(versions) % p.images.shape[1], torch.arange(captions) % p.captions.shape[1]) for p in parts]
    return Pairs(
        torch.cat([p.images[:, version] for p, (version, _) in zip(parts, rows, strict=True)]),
        torch.cat([p.captions[:, caption] for p, (_, caption) in zip(parts, rows, strict=True)]),
    )


def sigmoid_sum(logits: Tensor, same: Tensor, how: Training) -> Tensor:
    """Return SigLIP's loss of logits ``[B, B]``, with weighted negatives."""
    own = torch.eye(len(logits), dtype=torch.bool)
    positive = same if how.duplicates == "positives" else own
    negative = ~own if how.duplicates == "negatives" else ~same
    return (F.softplus(-logits)[positive].sum() + how.negative_weight * F.softplus(logits)[negative].sum()) / len(own)


class Batches:
    """Endless batches of pairs, each epoch in another order.

    Args:
        data: the features of texts.
        pairs: to draw from.
        size: pairs in a batch.
        seed: of the order, the versions of images and their captions.
    """

    def __init__(self, data: Data, pairs: Pairs, size: int, seed: int) -> None:
        self.data, self.pairs, self.size = data, pairs, size
        self.random, self.order = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.long)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of images and texts, and bool ``[B, B]``, which captions are the same."""
        while len(self.order) < self.size:
            fresh = torch.randperm(len(self.pairs.images), generator=self.random)
            self.order = torch.cat([self.order, fresh])
        rows, self.order = self.order[: self.size], self.order[self.size :]
        version, caption = (
            torch.randint(options.shape[1], (self.size,), generator=self.random)
            for options in (self.pairs.images, self.pairs.captions)
        )
        captions = self.pairs.captions[rows, caption]
        return self.pairs.images[rows, version], self.data.texts[captions], captions[:, None] == captions


def logits_of(model: Towers, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit features of images and texts."""
    return unit(model.image(images)), unit(model.text(texts))


def train(model: Towers, data: Data, pairs: Pairs, how: Training, seed: int) -> Towers:
    """Train in place, with the paper's AdamW and a cosine."""
    batches, steps = Batches(data, pairs, how.batch, seed), max(1, how.pairs // how.batch)
    if how.shift:
        shift_bias(model, batches, how)
    for name in how.frozen:
        getattr(model, name).requires_grad_(False)
    encoders = nn.ModuleDict({"image": model.image, "text": model.text})
    groups = decay_groups(encoders.named_parameters(), how.weight_decay)
    logit = {"params": [model.logit_scale, model.logit_bias], "weight_decay": 0.0, "lr": how.lr * how.logit_rate}
    optimizer = PaperAdamW([group for group in [*groups, logit] if group["params"]], lr=how.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, how.warmup, steps))
    limit = model.logit_scale.item()
    for _ in range(steps):
        images, texts, same = batches.draw()
        image, text = logits_of(model, images, texts)
        scale = model.logit_scale.exp()
        if how.loss == "sigmoid":
            loss = sigmoid_sum(scale * image @ text.T + model.logit_bias, same, how)
        else:
            loss = contrastive_loss(image, text, image, text, scale, 0, same, how.duplicates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if how.loss == "softmax":
            model.logit_scale.data.clamp_(max=max(math.log(100), limit))
    return model


@torch.no_grad()
def shift_bias(model: Towers, batches: Batches, how: Training) -> None:
    """Change the bias for a batch that is smaller than in pretraining."""
    if how.shift == "prior":
        model.logit_bias.add_(math.log(PRETRAINING_BATCH / how.batch))
        return
    drawn = copy.deepcopy(batches)
    found = [(logits_of(model, images, texts), same) for images, texts, same in (drawn.draw() for _ in range(8))]
    cosines = torch.stack([image @ text.T for (image, text), _ in found]).double()
    same = torch.stack([same for _, same in found])
    bias = model.logit_bias.detach().double().clone()
    for _ in range(50):  # Newton's method for the bias alone
        probabilities = (model.logit_scale.exp() * cosines + bias).sigmoid()
        target = torch.eye(how.batch).expand_as(cosines) if how.duplicates != "positives" else same.double()
        weight = torch.ones_like(cosines)
        if how.duplicates == "ignored":
            weight[same & ~torch.eye(how.batch, dtype=torch.bool)] = 0
        slope = (weight * (probabilities - target)).sum()
        bias -= (slope / (weight * probabilities * (1 - probabilities)).sum()).clamp(-2, 2)
    model.logit_bias.copy_(bias)


@torch.no_grad()
def measure(model: Towers, data: Data) -> dict[str, float]:
    """Return for each test, in %, how many images are closest to their own caption among the test's captions.

    Also the mean cosine of pairs, of others, and between images of the first test, and scale and bias.
    """
    found: dict[str, float] = {}
    for name, pairs in {**data.tests, "trained drawings": data.training["drawings"]}.items():
        captions, own = pairs.captions[:, 0].unique(return_inverse=True)
        image, text = logits_of(model, pairs.images[:, 0], data.texts[captions])
        cosines = image @ text.T
        found[name] = 100 * (cosines.argmax(dim=1) == own).double().mean().item()
        if name == "drawings":
            found["positive"] = cosines.gather(1, own[:, None]).mean().item()
            found["negative"] = cosines.mean().item()
            found["among images"] = (image @ image.T).mean().item()
    return found | {"scale": model.logit_scale.exp().item(), "bias": model.logit_bias.item()}
