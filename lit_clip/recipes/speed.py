"""Measure how fast a machine encodes pairs through frozen layers and trains the layers after them."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_clip.errors import require
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.finetuning import Freeze, frozen_names
from lit_clip.models.frozen_prefix import FrozenPrefix, image_features_from, text_features_from, use_frozen_prefix
from lit_clip.models.layers import TOWERS
from lit_clip.models.running import evaluation_mode
from lit_clip.tools.hardware import Precision, autocast
from lit_clip.training.frozen_features import Encoding

AT_ONCE, TEXTS = 32, 128  # images that are encoded at once, and captions: those of one length are
ENOUGH, MOST_CALLS = 0.3, 30  # seconds to measure a call for
STEP, SLACK = 64, 1.2  # images or captions of a step; of decoding beside encoding, which share the cores


class Speed(NamedTuple):
    """Seconds per item on one device, for a given choice of trainable layers."""

    image: float  # to decode, augment and encode an image through the frozen layers
    text: float  # to encode a caption
    image_step: float  # of a training step, for each image
    text_step: float  # for each caption


def measure(module: Any, data: Any, precision: Precision, freeze: Freeze, augmented: bool) -> Speed:
    """Measure the frozen layers, and training steps of the last blocks and heads after them."""
    model: CLIP = module.model
    frozen = frozen_names(model, freeze)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.frozen_prefixes.clear()
    stored_rows = data.image_rows(int(augmented))
    read, count = data.image_reader(stored_rows), min(AT_ONCE, stored_rows.count)
    read([0])  # the first one is slower
    started = time.perf_counter()
    images = read(range(count)).images  # once: read again they may come from memory
    decoding = time.perf_counter() - started
    listed = range(min(TEXTS, len(data.train_source)))
    captions = [caption for row in listed for caption in data.train_source.captions(row)[:1]]
    with evaluation_mode(module):
        prefix = require_prefix(model)
        encoding = Encoding(model, lambda: autocast(model.device, precision), precision, AT_ONCE)
        stored, image = _timed(lambda: encoding.activations(prefix, images).float())
        (texts, tokens), text = _timed(lambda: _encoded_texts(encoding, model, captions))
    module.train()
    lengths = model.tokenizer.lengths(tokens).tolist()
    rows, text_rows = (torch.arange(STEP) % number for number in (count, len(captions)))
    stored, texts, tokens = stored[rows], texts[text_rows], tokens[text_rows]
    repeated = [lengths[row] for row in text_rows.tolist()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)

    def step(features: Callable[[], Tensor]) -> None:
        with autocast(model.device, precision):
            loss = unit(features()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    _, image_step = _timed(lambda: step(lambda: image_features_from(model, stored)))
    _, text_step = _timed(lambda: step(lambda: text_features_from(model, texts, tokens, repeated)))
    workers = max(1, data.num_workers)
    beside = (os.cpu_count() or 1) > workers  # images are decoded while others are encoded
    each = SLACK * max(image, decoding / workers) if beside else image + decoding / workers
    return Speed(each / count, text / len(captions), image_step / STEP, text_step / STEP)


def _encoded_texts(encoding: Encoding, model: CLIP, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return activations, padded with zeros, and tokens; texts of equal length are encoded together."""
    tokens = model.tokenizer(list(captions))
    lengths = model.tokenizer.lengths(tokens)
    rows: list[Tensor] = [torch.zeros(0)] * len(tokens)
    for length in lengths.unique().tolist():
        some = (lengths == length).nonzero()[:, 0]
        found = encoding.activations(model.frozen_prefixes["text"], tokens[some, :length], [length] * len(some))
        for row, value in zip(some.tolist(), found.float(), strict=True):
            rows[row] = value
    return pad_sequence(rows, batch_first=True), tokens[:, : int(lengths.max())].to(rows[0].device)


def require_prefix(model: CLIP) -> FrozenPrefix:
    """Set up the frozen layers of both encoders, and return the image encoder's."""
    found = [use_frozen_prefix(model, tower) for tower in TOWERS]
    for tower, prefix in zip(TOWERS, found, strict=True):
        require(
            prefix is not None,
            f"recipe: the {tower} encoder has no frozen layers to store; leave model.freeze out, or the recipe",
        )
    return model.frozen_prefixes["image"]


def _timed(call: Any) -> tuple[Any, float]:
    """Return a call's result and its seconds: the median of some calls after a slower first one.

    Of three short calls a busy moment slows two: a run planned by them ended after 3.6 of its 5 minutes.
    """
    result, times = call(), []
    while len(times) < 3 or (len(times) * min(times) < ENOUGH and len(times) < MOST_CALLS):
        started = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return result, statistics.median(times)
