"""Try batches and rates on the heads of two encoders, whose features of some of the user's pairs are computed once."""

import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_clip.embedding.precision import Precision, autocast
from lit_clip.errors import BadSample, require
from lit_clip.losses.contrastive import contrastive_loss, unit
from lit_clip.models.clip import CLIP
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.models.finetuning import Freeze, UnlockLast, frozen_names
from lit_clip.models.frozen_prefix import FrozenPrefix, image_features_from, text_features_from, use_frozen_prefix
from lit_clip.models.layers import TOWERS
from lit_clip.retrieval.metrics import PairIndices
from lit_clip.retrieval.retrieval_set import evaluate_pairs
from lit_clip.training.frozen_features import Encoding
from lit_clip.training.schedules import WarmupCosine

FEWEST, MOST_IMAGES = 24, 1_500  # to try settings on; a third of them judges
AT_ONCE = 32  # images or captions that are encoded at once
STEP, SLACK = 64, 1.2  # pairs of a step whose time is measured; of decoding beside encoding, which share the cores


class Speed(NamedTuple):
    """Seconds of one device for some layers that are trained."""

    image: float  # to decode, augment and encode an image through the frozen layers
    text: float  # to encode a caption
    step: float  # of a training step, for each pair


class Sample(NamedTuple):
    """Activations before the heads of N images, and of one caption of each."""

    image: Tensor  # [N, W]
    text: Tensor  # [N, W]
    tokens: Tensor  # int64 [N, L]
    captions: Tensor  # int64 [N], a number for each text

    def part(self, rows: Tensor) -> "Sample":
        """Return some rows."""
        return Sample(*(column[rows] for column in self))


class Trial(NamedTuple):
    """What was tried, and how it went."""

    batch: int
    rate: float
    recall: float  # at 1, mean of both directions, of the images that judge
    judges: int  # images
    seconds: float


def gentlest(trials: Sequence[Trial]) -> Trial:
    """Return, of the trials within a standard error of the best, the one with the largest batch, then smallest rate.

    What is behind the heads was pretrained, and forgets with a high rate.
    """
    best = max(trials, key=lambda trial: trial.recall)
    error = math.sqrt(best.recall * (1 - best.recall) / max(1, best.judges))
    return max((t for t in trials if t.recall >= best.recall - error), key=lambda trial: (trial.batch, -trial.rate))


def freeze_only(model: CLIP, freeze: Freeze) -> None:
    """Freeze these layers and train the others."""
    frozen = frozen_names(model, freeze)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.frozen_prefixes.clear()


def _encoded_texts(encoding: Encoding, model: CLIP, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return activations, of tokens padded with zeros, and tokens; those of one length are encoded together."""
    tokens = model.tokenizer(list(captions))
    lengths = model.tokenizer.lengths(tokens)
    rows: list[Tensor] = [torch.zeros(0)] * len(tokens)
    for length in lengths.unique().tolist():
        for some in (lengths == length).nonzero()[:, 0].split(AT_ONCE):
            found = encoding.activations(model.frozen_prefixes["text"], tokens[some, :length], [length] * len(some))
            for row, value in zip(some.tolist(), found.float(), strict=True):
                rows[row] = value
    return pad_sequence(rows, batch_first=True), tokens.to(rows[0].device)


def sample_of(module: Any, data: Any, precision: Precision, most_seconds: float, seed: int) -> Sample | None:
    """Encode some training images with a caption each; None if the encoders' heads read more than one vector.

    It ends early after ``most_seconds``.
    """
    model: CLIP = module.model
    freeze_only(model, Freeze(UnlockLast(0), UnlockLast(0)))
    with evaluation_mode(module):
        if any(use_frozen_prefix(model, tower) is None for tower in TOWERS):
            return None
        encoding = Encoding(model, lambda: autocast(model.device, precision), precision, AT_ONCE)
        source, pairs = data.train_source, data.validation_pairs(data.train_source)
        seen, captions, images = set(), [], []
        started, waiting = time.monotonic(), []
        for row in np.random.default_rng(seed).permutation(len(source)).tolist():
            if len(captions) == MOST_IMAGES or time.monotonic() - started > most_seconds:
                break
            try:
                identity = source.image_identity(row)
                pair = None if identity in seen else pairs[row]
            except BadSample:  # the run skips or refuses it
                continue
            seen.add(identity)
            if pair is not None:
                waiting.append(pair.image)
                captions.append(pair.caption)
            if len(waiting) == AT_ONCE:
                images.append(encoding.activations(model.frozen_prefixes["image"], torch.stack(waiting)).float())
                waiting = []
        if waiting:
            images.append(encoding.activations(model.frozen_prefixes["image"], torch.stack(waiting)).float())
        texts, tokens = _encoded_texts(encoding, model, captions)
    if len(captions) < FEWEST or images[0].ndim != 2 or texts.ndim != 2:
        return None
    numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([numbers[text] for text in captions], device=texts.device)
    sample = Sample(torch.cat(images), texts, tokens, ids)
    few = sample.part(torch.arange(2))
    with torch.no_grad():  # whether nothing but the heads follows
        pairs = zip(_features(model, few), _head_features(model, few), strict=True)
        return sample if all(torch.allclose(a, b, atol=1e-4) for a, b in pairs) else None


def _features(model: CLIP, sample: Sample) -> tuple[Tensor, Tensor]:
    lengths = model.tokenizer.lengths(sample.tokens).tolist()
    text = text_features_from(model, sample.text, sample.tokens, lengths)
    return unit(image_features_from(model, sample.image)), unit(text)


def _head_features(model: CLIP, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the heads' features; an empty batch through the frozen layers costs more than a head."""
    head = model.get_submodule(str(model.frozen_prefixes["image"].boundary))
    text = model.get_submodule(str(model.frozen_prefixes["text"].boundary))
    return unit(head(sample.image)), unit(text(sample.text))


def _recall(model: CLIP, sample: Sample) -> float:
    """Return recall@1, the mean of both directions, where equal captions count as one."""
    with torch.no_grad():
        image_ND, text_ND = _head_features(model, sample)
    _, first, number = np.unique(sample.captions.cpu().numpy(), return_index=True, return_inverse=True)
    order = number.argsort(kind="stable")
    text, earlier = number[order], np.arange(len(order)) - np.searchsorted(number[order], number[order])
    pairs = PairIndices(*map(torch.from_numpy, (order, text, np.ones_like(order), earlier)))
    metrics = evaluate_pairs(image_ND.cpu(), text_ND[torch.from_numpy(first)].cpu(), pairs).metrics
    merged = "merged_" if "merged_image_to_text_recall@1" in metrics else ""
    return sum(metrics[f"{merged}{name}_recall@1"] for name in ("image_to_text", "text_to_image")) / 2


def try_heads(
    model: CLIP, sample: Sample, settings: Sequence[tuple[int, float]], steps: int, most_seconds: float, seed: int
) -> list[Trial]:
    """Train the heads from the same weights with each batch and rate, for so many steps; a third of the sample judges.

    What does not begin within ``most_seconds`` is left out.
    """
    order = torch.randperm(len(sample.image), generator=torch.Generator().manual_seed(seed)).to(sample.image.device)
    held_out, train = sample.part(order[: len(order) // 3]), sample.part(order[len(order) // 3 :])
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in own.items()}
    trials: list[Trial] = []
    started = time.monotonic()
    for batch, rate in settings:
        begun = time.monotonic()
        if begun - started > most_seconds:
            break
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(initial[name])
        _train(model, list(own.values()), train, batch, rate, steps, seed)
        trials.append(Trial(batch, rate, _recall(model, held_out), len(held_out.image), time.monotonic() - begun))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(initial[name])
    return trials


def _train(
    model: CLIP, parameters: list[torch.nn.Parameter], sample: Sample, batch: int, rate: float, steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(sample.image))
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = WarmupCosine(optimizer, warmup_steps=max(1, steps // 10), total_steps=steps)
    rows: Tensor = torch.zeros(0, dtype=torch.long)
    for _ in range(steps):
        if len(rows) < batch:
            rows = torch.randperm(len(sample.image), generator=generator)
        some, rows = sample.part(rows[:batch].to(sample.image.device)), rows[batch:]
        image, text = _head_features(model, some)
        same = some.captions[:, None] == some.captions
        loss = contrastive_loss(image, text, image, text, model.logit_scale.exp(), same_BN=same, duplicates="positives")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.clamp_logit_scale()


def measure(module: Any, data: Any, precision: Precision, freeze: Freeze, augmented: bool) -> Speed:
    """Measure the layers in front of the last blocks and the heads, and steps of what is behind."""
    model: CLIP = module.model
    freeze_only(model, freeze)
    images_of = data.images_once(data.image_rows(int(augmented)), np.arange(0)).dataset
    count = min(AT_ONCE, len(images_of))
    _ = images_of[0].images  # the first one is slower
    started = time.monotonic()
    images = torch.cat([images_of[row].images for row in range(count)])
    decoding = (time.monotonic() - started) / count
    captions = [caption for row in range(count) for caption in data.train_source.captions(row)[:1]]
    with evaluation_mode(module):
        prefix = require_prefix(model)
        encoding = Encoding(model, lambda: autocast(model.device, precision), precision, AT_ONCE)
        stored, image = _timed(lambda: encoding.activations(prefix, images).float())
        (texts, tokens), text = _timed(lambda: _encoded_texts(encoding, model, captions))
    module.train()
    sample = Sample(stored, texts, tokens, torch.arange(count))
    sample = sample.part(torch.arange(STEP) % count)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)

    def step() -> None:
        with autocast(model.device, precision):
            both = _features(model, sample)
        optimizer.zero_grad()
        contrastive_loss(*both, *both, model.logit_scale.exp()).backward()
        optimizer.step()

    _, seconds = _timed(step)
    workers = max(1, data.num_workers)
    beside = (os.cpu_count() or 1) > workers  # images are decoded while others are encoded
    each = SLACK * max(image / count, decoding / workers) if beside else image / count + decoding / workers
    return Speed(each, text / len(captions), seconds / STEP)


def require_prefix(model: CLIP) -> FrozenPrefix:
    """Use the frozen layers of both encoders, and return the image encoder's."""
    found = [use_frozen_prefix(model, tower) for tower in TOWERS]
    for tower, prefix in zip(TOWERS, found, strict=True):
        require(
            prefix is not None,
            f"recipe: the {tower} encoder has no frozen layers to store; leave model.freeze out, or the recipe",
        )
    return model.frozen_prefixes["image"]


def _timed(call: Any) -> tuple[Any, float]:
    """Return what a call returns and its seconds: the median of three, after a first one, which is slower."""
    result, times = call(), []
    for _ in range(3):
        _wait_for_the_device()
        started = time.monotonic()
        result = call()
        _wait_for_the_device()
        times.append(time.monotonic() - started)
    return result, statistics.median(times)


def _wait_for_the_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
