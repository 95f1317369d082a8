"""Train the heads of two encoders alone, on features that are computed once.

The features are the image's ``[I, W]`` and the caption's ``[T, W]`` of :class:`PairFeatures`.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lit_clip.batch import CaptionBatch
from lit_clip.evaluation.before_after import PairFeatures, gather_pairs
from lit_clip.losses.contrastive import contrastive_loss, unit
from lit_clip.models.clip import CLIP, MAX_LOGIT_SCALE
from lit_clip.models.external import HuggingFaceTextEncoder, TimmImageEncoder
from lit_clip.training.micro_batches import encode_images, encode_texts
from lit_clip.training.schedules import WarmupCosine

BATCH = 1024
RATE = 3e-3
DECAY = 0.1
DROPOUT = 0.5
WARMUP = 20
EPOCHS, FEWEST_STEPS = 6, 120
Heads = dict[str, nn.Module]


def heads_of(model: CLIP) -> Heads | None:
    """Return the image and text projections by their names in the model; None unless there are two heads."""
    visual, text = model.visual, model.text_encoder
    if not isinstance(visual, TimmImageEncoder) or not isinstance(text, HuggingFaceTextEncoder):
        return None
    names = {module: name for name, module in model.named_modules()}
    heads = {names[head]: head for head in (visual.head, text.proj)}
    trained = all(any(p.requires_grad for p in head.parameters()) for head in heads.values())
    return heads if trained else None


def features_before_heads(
    model: CLIP, batches: Iterable[CaptionBatch], heads: Heads, texts: bool = True
) -> PairFeatures:
    """Encode this rank's batches up to the heads, each image once, and return all ranks' pairs.

    The model is in evaluation mode; the batches are on its device. Without ``texts`` their features are zeros.
    """
    known: dict[str, Tensor] = {}

    def encode(batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        rows = range(batch.pairs) if batch.image_of is None else batch.image_of.tolist()
        new = {key: row for row, key in zip(rows, batch.keys, strict=True) if key not in known}
        if new:
            found = encode_images(model, batch.images[list(new.values())], normalize=False)
            known.update(zip(new, found.float().unbind(), strict=True))
        image = torch.stack([known[key] for key in batch.keys])
        if not texts:
            return image, image.new_zeros(len(batch.tokens), widths[1])
        text = encode_texts(model, batch.tokens, batch.lengths, batch.stored_texts, normalize=False)
        return image, text.float()

    widths = [next(head.parameters()).shape[-1] for head in heads.values()]
    image, text = (torch.zeros(0, width, device=model.device) for width in widths)
    with ExitStack() as hooks:
        for head in heads.values():
            hooks.enter_context(head.register_forward_hook(lambda _, inputs, __: inputs[0]))
        return gather_pairs(encode, batches, model.tokenizer, (image, text))


def train_heads(
    model: CLIP, heads: Heads, features: PairFeatures, more: Sequence[Tensor] = (), seed: int = 0
) -> dict[str, Tensor]:
    """Train copies of the heads for some seconds; return their weights and the temperature's, by the model's names.

    Pairs with the same image or caption are positives of each other. ``more`` are other versions of all images, of
    which each step draws one for each pair. The global random states stay as they are.
    """
    image_head, text_head = copies = [deepcopy(head).float().train() for head in heads.values()]
    scale = nn.Parameter(model.logit_scale.detach().float().clone())
    weights = [weight for head in copies for weight in head.parameters()]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": DECAY}, {"params": [scale], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.98))
    pairs, device, generator = len(features.pairs.image), scale.device, torch.Generator().manual_seed(seed)
    batch = min(BATCH, pairs)
    steps = max(FEWEST_STEPS, EPOCHS * -(-pairs // batch))
    schedule = WarmupCosine(optimizer, warmup_steps=WARMUP, total_steps=steps)

    def dropped(x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=generator) > DROPOUT).to(device) / (1 - DROPOUT)

    image_VI = torch.stack([features.image, *more])
    rows = torch.zeros(0, dtype=torch.long)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(steps):
            rows = rows if len(rows) >= batch else torch.randperm(pairs, generator=generator)
            image_B, text_B = (column[rows[:batch].to(device)] for column in features.pairs[:2])
            rows = rows[batch:]
            version_B = torch.randint(len(image_VI), (batch,), generator=generator).to(device)
            image = unit(image_head(dropped(image_VI[version_B, image_B])))
            text = unit(text_head(dropped(features.text[text_B])))
            same = (image_B[:, None] == image_B) | (text_B[:, None] == text_B)
            loss = contrastive_loss(image, text, image, text, scale.exp(), same_BN=same, duplicates="positives")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            scale.data.clamp_(0, MAX_LOGIT_SCALE)
    named = zip(heads, copies, strict=True)
    found = {f"{name}.{key}": value for name, head in named for key, value in head.state_dict().items()}
    return {**found, "logit_scale": scale.detach()}
