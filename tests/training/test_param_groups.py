"""Learning rates, weight decay and the resulting loss curve equal open_clip's."""

import copy
import math

import open_clip
import pytest
import torch
from open_clip_train.scheduler import cosine_lr
from torch import Tensor

from lit_clip.losses.contrastive import contrastive_loss
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.training.optimizers import decay_groups
from lit_clip.training.schedules import warmup_cosine

LEARNING_RATE, WEIGHT_DECAY, WARMUP, STEPS = 1e-3, 0.2, 5, 30


def tiny_open_clip() -> open_clip.CLIP:
    return open_clip.CLIP(
        embed_dim=32,
        vision_cfg=open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=64, layers=2, head_width=32),
        text_cfg=open_clip.CLIPTextCfg(context_length=16, vocab_size=499, width=64, heads=2, layers=2),
    )


def tiny_clip() -> CLIP:
    return CLIP(
        CLIPConfig(
            embed_dim=32,
            image=VisionTransformerConfig(image_size=32, patch_size=8, width=64, layers=2, heads=2),
            text=TextTransformerConfig(context_length=16, vocab_size=499, width=64, heads=2, layers=2),
        )
    )


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 7), (1, 2), (10, 5), (3, 10), (2000, 2347)])
def test_every_step_has_open_clips_learning_rate(warmup_steps: int, total_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = cosine_lr(optimizer, 5e-4, warmup_steps, total_steps)
    for step in range(total_steps):
        assert 5e-4 * warmup_cosine(step, warmup_steps, total_steps) == pytest.approx(theirs(step), abs=1e-15)
    assert warmup_cosine(2 * (warmup_steps + total_steps), warmup_steps, total_steps) == 0  # and not up again


def open_clips_groups(model: torch.nn.Module) -> tuple[set[str], set[str]]:
    """Return the names of parameters with and without weight decay by the rule of open_clip_train.main."""
    named = dict(model.named_parameters())
    exempt = {n for n, p in named.items() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n}
    return set(named) - exempt, exempt


def names_in_groups(model: CLIP) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in decay_groups(model.named_parameters(), WEIGHT_DECAY)]


def test_decay_groups_are_open_clips() -> None:
    model = tiny_clip()
    decaying, exempt = names_in_groups(model)
    assert (set(decaying), set(exempt)) == open_clips_groups(model)
    groups = decay_groups(model.named_parameters(), WEIGHT_DECAY)
    assert [group["weight_decay"] for group in groups] == [WEIGHT_DECAY, 0]


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny_clip()
    model.visual.requires_grad_(False)
    decaying, exempt = names_in_groups(model)
    assert sorted(decaying + exempt) == sorted(n for n, _ in model.named_parameters() if not n.startswith("visual."))


def fixed_batches(number: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return random images ``[B, 3, 32, 32]`` and captions ``[B, 16]`` of 3 to 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(number):
        images = torch.randn(size, 3, 32, 32, generator=generator)
        tokens = torch.randint(1, 497, (size, 16), generator=generator)
        for row, length in zip(tokens, torch.randint(3, 17, (size,), generator=generator).tolist(), strict=True):
            row[0], row[length - 1], row[length:] = 497, 498, 0
        batches.append((images, tokens))
    return batches


def train_ours(model: CLIP, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Train as LitCLIP does; return losses and logit scales."""
    optimizer = torch.optim.AdamW(
        decay_groups(model.named_parameters(), WEIGHT_DECAY), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, WARMUP, STEPS))
    losses, scales = [], []
    for step in range(STEPS):
        images, tokens = batches[step % len(batches)]
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        loss = contrastive_loss(image, text, image, text, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.clamp_logit_scale()
        losses.append(loss.item())
        scales.append(model.logit_scale.exp().item())
    return losses, scales


def train_theirs(model: open_clip.CLIP, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Train with open_clip's loss, schedule, parameter groups and clamp (open_clip_train.main and .train)."""
    decaying, exempt = open_clips_groups(model)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in sorted(exempt)], "weight_decay": 0.0},
            {"params": [named[n] for n in sorted(decaying)], "weight_decay": WEIGHT_DECAY},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),  # open_clip_train.params for ViT
        eps=1e-6,
    )
    scheduler, loss_function = cosine_lr(optimizer, LEARNING_RATE, WARMUP, STEPS), open_clip.ClipLoss()
    losses, scales = [], []
    for step in range(STEPS):
        scheduler(step)
        optimizer.zero_grad()
        loss = loss_function(*model(*batches[step % len(batches)]))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        scales.append(model.logit_scale.exp().item())
    return losses, scales


@pytest.mark.parametrize(
    "first_scale", [pytest.param(1 / 0.07, marks=pytest.mark.slow), 120.0]
)  # the second is clamped
def test_thirty_steps_have_open_clips_loss_curve(first_scale: float) -> None:
    torch.manual_seed(0)
    theirs, ours = tiny_open_clip(), tiny_clip()
    with torch.no_grad():
        theirs.logit_scale.fill_(math.log(first_scale))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    batches = fixed_batches(3, size=7)
    our_losses, our_scales = train_ours(ours, batches)
    their_losses, their_scales = train_theirs(theirs, batches)
    assert our_losses == pytest.approx(their_losses, rel=0, abs=1e-4)
    assert our_scales == pytest.approx(their_scales, rel=1e-5)
    assert our_losses[-1] < 0.5 * our_losses[0]  # it has learned, so a wrong step would show
    assert max(our_scales) <= 100 * (1 + 1e-6)
    assert first_scale < 100 or our_scales[0] == pytest.approx(100)
