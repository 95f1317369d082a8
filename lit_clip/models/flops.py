"""Count a training step's FLOPs with torch's counter; a multiply-add counts as two."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, height_width


class PairFlops(NamedTuple):
    """FLOPs of forward and backward pass: of an image, and coefficients of 1, n, n^2 for a text of n tokens."""

    image: float
    text: tuple[float, float, float]

    def total(self, pairs: float, tokens: float, squares: float) -> float:
        """Return the FLOPs of several pairs, from the sums of their text lengths and of the lengths' squares."""
        constant, linear, quadratic = self.text
        return (self.image + constant) * pairs + linear * tokens + quadratic * squares


def training_flops(model: Any) -> PairFlops | None:
    """Count a :class:`lit_clip.CLIP`'s FLOPs in training; None if an encoder does not allow it.

    Runs on torch's meta device, where nothing is computed. An encoder of another library that reads the values of its
    inputs is run on one real sample instead. Must be called before a strategy shards the weights.

    Matrix products, convolutions and attention count, each once: recomputation to save memory does not. As in published
    tables, all tokens count in the last blocks too. Frozen parameters have no gradients, and a tower without trainable
    parameters has no backward pass. Patches dropped by ``patch_dropout`` do not count.
    """
    try:
        with torch.enable_grad():
            image = tower_flops(model.visual, torch.zeros(1, *model.preprocessing.shape))
            text = _text_flops(model.text_encoder, model.context_length)
    except Exception:  # encoders of other libraries raise anything
        return None
    return PairFlops(image, text)


def _text_flops(encoder: nn.Module, context_length: int) -> tuple[float, float, float]:
    """Fit the polynomial of :class:`PairFlops` through three lengths; some encoders accept only the full context.

    A backward pass costs about the same multiple of the forward pass at any length (twice, if nothing is frozen).
    """

    def tokens(length: int) -> Tensor:
        return torch.full((1, length), 5)  # an id that no tokenizer uses for padding

    forward, whole = _counts(encoder, tokens(context_length))
    lengths = (context_length // 4, context_length // 2, context_length)
    if not 0 < lengths[0] < lengths[1] < lengths[2]:
        return float(whole), 0.0, 0.0
    try:
        with torch.no_grad():
            counts = [*(tower_flops(encoder, tokens(length)) for length in lengths[:2]), forward]
    except Exception:  # encoders of other libraries raise anything
        return float(whole), 0.0, 0.0
    powers = np.vander(np.array(lengths, dtype=np.float64), 3, increasing=True)
    constant, linear, quadratic = np.linalg.solve(powers, np.array(counts) * (whole / max(1, counts[-1]))).tolist()
    return constant, linear, quadratic


def tower_flops(tower: nn.Module, inputs: Tensor) -> int:
    """Count the forward pass, and the backward pass if gradients are enabled; see :func:`training_flops`.

    An encoder of another library that cannot run on such inputs raises anything.
    """
    return _counts(tower, inputs)[1]


@torch.no_grad()
def forward_flops(tower: nn.Module, inputs: Tensor) -> int | None:
    """Count the forward pass; None if the encoder does not allow it."""
    try:
        return tower_flops(tower, inputs)
    except Exception:  # encoders of other libraries raise anything
        return None


def _counts(tower: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Count the FLOPs of the forward pass, and of both passes together."""
    try:
        return _count_on(tower, inputs, torch.device("meta"))
    except Exception:  # it reads the values of its inputs, which the meta device does not have
        return _count_on(tower, inputs, next(tower.parameters()).device)


def _count_on(tower: nn.Module, inputs: Tensor, device: torch.device) -> tuple[int, int]:
    copied: Any = _replica(tower, device).eval()  # in training mode, blocks may recompute their activations
    if torch.is_grad_enabled():
        copied.training = tower.training and bool(getattr(tower, "patch_dropout", 0))  # dropped as in a step
    # As plain matrix products: the counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lengths = {"lengths": [inputs.shape[1]]} if getattr(copied, "reads_lengths", False) else {}
        features = copied(inputs.to(device), **lengths)
        forward = counter.get_total_flops()
        if features.requires_grad:
            features.sum().backward()
    return forward, counter.get_total_flops()


def _replica(tower: nn.Module, device: torch.device) -> nn.Module:
    """Copy a tower to a device, uncompiled; weights that are already there are shared.

    Not with ``torch.func.functional_call``: adapters that wrap a parameter would leave a buffer in its place.
    """
    tensors: dict[int, Tensor] = {}
    for tensor in (*tower.parameters(), *tower.buffers()):
        moved = tensor.detach().to(device)
        tracked = tensor.requires_grad and torch.is_grad_enabled()  # the counter fails on what no gradient will reach
        tensors[id(tensor)] = nn.Parameter(moved, tracked) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(tower, tensors)


@dataclass
class ModelSize:
    """Parameters, sizes in pixels, tokens and channels, and FLOPs per image and text; None if unknown without files.

    The parameters of the whole model include logit scale and bias.
    """

    image_parameters: int | None = None
    text_parameters: int | None = None
    parameters: int | None = None
    image_size: str | None = None
    context_length: int | None = None
    embed_dim: int | None = None
    image_flops: int | None = None
    text_flops: int | None = None

    def cells(self) -> list[str]:
        """Format the values for a table: millions of parameters, GFLOPs."""
        counts = (self.image_parameters, self.text_parameters, self.parameters)
        sizes = (self.image_size, self.context_length, self.embed_dim)
        return [
            *("?" if count is None else f"{count / 1e6:.2f}" for count in counts),
            *("?" if size is None else str(size) for size in sizes),
            *("?" if count is None else f"{count / 1e9:.2f}" for count in (self.image_flops, self.text_flops)),
        ]


def measure(config: CLIPConfig) -> ModelSize:
    """Count a model's parameters and FLOPs on torch's meta device, where nothing is allocated or computed."""
    size = ModelSize(embed_dim=config.embed_dim)
    try:
        with torch.device("meta"):
            model = CLIP(config)
    except Exception:  # encoders of other libraries may need real tensors or absent files; shown as "?"
        return size
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    size.parameters = sum(counts.values())
    size.image_parameters = sum(count for name, count in counts.items() if name.startswith("visual."))
    scales = counts["logit_scale"] + counts.get("logit_bias", 0)
    size.text_parameters = size.parameters - size.image_parameters - scales
    size.context_length = model.context_length
    height, width = height_width(model.preprocessing.image_size)
    size.image_size = str(height) if height == width else f"{height} x {width}"
    images, texts = torch.zeros(1, *model.preprocessing.shape), torch.zeros(1, model.context_length, dtype=torch.long)
    size.image_flops, size.text_flops = forward_flops(model.visual, images), forward_flops(model.text_encoder, texts)
    return size
