"""The arithmetic of a training step, and how much of it a device could do.

A multiplication with its addition counts as two FLOPs.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, height_width

LARGEST_PRODUCT = 4096  # rows of a matrix: 200 MB for the three of a product
LONG_ENOUGH = 0.02  # seconds of a product, from which on a larger one is no faster


class PairFlops(NamedTuple):
    """FLOPs of the forward and backward pass of both towers.

    Attributes:
        image: of an image.
        text: of a text of n tokens the factors of 1, n and n^2 (attention).
    """

    image: float
    text: tuple[float, float, float]

    def total(self, pairs: float, tokens: float, squares: float) -> float:
        """Of several pairs, whose texts' lengths and squared lengths add up to ``tokens`` and ``squares``."""
        constant, linear, quadratic = self.text
        return (self.image + constant) * pairs + linear * tokens + quadratic * squares


def training_flops(model: Any) -> PairFlops | None:
    """Count the arithmetic of a :class:`lit_clip.CLIP`.

    On torch's meta device, where nothing is computed; an encoder from elsewhere may look at its inputs, which are not
    there, and is run on one sample then.

    Matrix products, convolutions and attention are counted, each once: nothing is said of what is computed again to
    save memory. As in published tables, all tokens count in the last blocks too. What is frozen has no gradients, and a
    tower without anything that learns has no backward pass. Patches that ``patch_dropout`` leaves out do not count.

    Call it before a strategy cuts the weights in shards.

    Returns:
        None where it cannot be counted either way.
    """
    height, width = height_width(model.preprocessing.image_size)
    try:
        with torch.enable_grad():
            image = tower_flops(model.visual, torch.zeros(1, 3, height, width))
            text = _text_flops(model.text_encoder, model.context_length)
    except Exception:  # whatever encoders from elsewhere raise
        return None
    return PairFlops(image, text)


def _text_flops(encoder: nn.Module, context_length: int) -> tuple[float, float, float]:
    """As in :class:`PairFlops`: a polynomial through three lengths; some encoders read nothing but the whole context.

    A backward pass costs about the same multiple of the forward pass at any length (twice, if everything learns).
    """

    def tokens(length: int) -> Tensor:
        return torch.full((1, length), 5)  # nobody's padding

    whole = tower_flops(encoder, tokens(context_length))
    lengths = (context_length // 4, context_length // 2, context_length)
    if not 0 < lengths[0] < lengths[1] < lengths[2]:
        return float(whole), 0.0, 0.0
    try:
        with torch.no_grad():
            counts = [tower_flops(encoder, tokens(length)) for length in lengths]
    except Exception:  # likewise
        return float(whole), 0.0, 0.0
    powers = np.vander(np.array(lengths, dtype=np.float64), 3, increasing=True)
    constant, linear, quadratic = np.linalg.solve(powers, np.array(counts) * (whole / max(1, counts[-1]))).tolist()
    return constant, linear, quadratic


def tower_flops(tower: nn.Module, inputs: Tensor) -> int:
    """Of the forward pass, and of the backward pass where gradients are enabled; see :func:`training_flops`.

    Raises:
        Exception: whatever an encoder from elsewhere raises that cannot be run on such inputs.
    """
    try:
        return _count_on(tower, inputs, torch.device("meta"))
    except Exception:  # likewise
        return _count_on(tower, inputs, next(tower.parameters()).device)


def _count_on(tower: nn.Module, inputs: Tensor, device: torch.device) -> int:
    copied: Any = _replica(tower, device).eval()  # in training, blocks may compute their activations again
    if torch.is_grad_enabled():
        copied.training = tower.training and bool(getattr(tower, "patch_dropout", 0))  # a training step's patches
    copied.few_lengths = False  # as long as they are
    # Plain matrix products: the counter does not know a CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = copied(inputs.to(device))
        if features.requires_grad:
            features.sum().backward()
    return counter.get_total_flops()


def _replica(tower: nn.Module, device: torch.device) -> nn.Module:
    """A copy that is not compiled, with its weights on a device: no copies of those that are there.

    Not ``torch.func.functional_call``: adapters that wrap a parameter would leave a buffer in its place.
    """
    tensors: dict[int, Tensor] = {}
    for tensor in (*tower.parameters(), *tower.buffers()):
        moved = tensor.detach().to(device)
        tensors[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(tower, tensors)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of the fastest of several products of square matrices, found in about that time; at least two are made."""

    def random(size: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)  # its own: those of the run stay as they are
        return torch.randn(size, size, generator=generator, device=device).to(dtype)

    end = time.perf_counter() + seconds
    size, best, products = 512, 0.0, 0
    matrix = random(size)
    while products < 2 or time.perf_counter() < end:
        took, products = _seconds(matrix), products + 1
        best = max(best, 2 * size**3 / took)
        if took < LONG_ENOUGH and size < LARGEST_PRODUCT:
            size *= 2
            matrix = random(size)
    return best


def _seconds(matrix: Tensor) -> float:
    """Of a product."""
    _finish(matrix.device)
    since = time.perf_counter()
    torch.mm(matrix, matrix)
    _finish(matrix.device)
    return time.perf_counter() - since


def _finish(device: torch.device) -> None:
    """Wait until a device has done what it was told; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass
class ModelSize:
    """What a model takes; None where it cannot be known without its weights.

    Attributes:
        image_parameters: of the image encoder.
        text_parameters: of the text encoder.
        parameters: of all, the logits' scale (and bias) included.
        image_size: height and width, pixels.
        context_length: tokens.
        embed_dim: channels of the shared space.
        image_flops: of one image.
        text_flops: of one text of full length.
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
        """As they are shown."""
        counts = (self.image_parameters, self.text_parameters, self.parameters)
        flops = (self.image_flops, self.text_flops)
        return [
            *("?" if count is None else f"{count / 1e6:.2f}" for count in counts),
            *("?" if value is None else str(value) for value in (self.image_size, self.context_length, self.embed_dim)),
            *("?" if count is None else f"{count / 1e9:.2f}" for count in flops),
        ]


def measure(config: CLIPConfig) -> ModelSize:
    """Count a model's parameters and arithmetic on torch's meta device, where nothing is allocated or computed."""
    size = ModelSize(embed_dim=config.embed_dim)
    try:
        with torch.device("meta"):
            model = CLIP(config).eval().requires_grad_(False)  # the counter follows gradients where there are some
    except Exception:  # a tower from elsewhere may want real tensors, or files that are not here: its row says "?"
        return size
    size.parameters = _count(model.parameters())
    size.image_parameters = _count(model.visual.parameters())
    scales = _count(parameter for name, parameter in model.named_parameters() if name in ("logit_scale", "logit_bias"))
    size.text_parameters = size.parameters - size.image_parameters - scales
    size.context_length = model.context_length
    height, width = height_width(model.preprocessing.image_size)
    size.image_size = str(height) if height == width else f"{height} x {width}"
    with torch.device("meta"):
        size.image_flops = _flops(model.encode_image, torch.zeros(1, 3, height, width))
        size.text_flops = _flops(model.encode_text, torch.zeros(1, model.context_length, dtype=torch.long))
    return size


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _flops(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> int | None:
    """Of matrix products, convolutions and attention, two a multiply-add."""
    try:
        with FlopCounterMode(display=False) as counter:
            encode(inputs)
    except Exception:  # likewise
        return None
    return counter.get_total_flops()
