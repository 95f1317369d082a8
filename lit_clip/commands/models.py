"""``lit-clip models``: what can be made, and what it takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_clip.cli.subcommands import progress
from lit_clip.errors import require
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, height_width
from lit_clip.models.registry import list_models, resolve_architecture


def models(patterns: list[str], *, pretrained: bool = False) -> None:
    """List the models that can be made by name, or published weights.

    A multiplication with its addition counts as two FLOPs, for one picture and one text of full length, as in the
    tables that give ViT-B/32 8.82 + 5.96 GFLOPs; normalisation, activations and softmax are not counted. Those tables
    have 2 to 5 % more for the ResNets: their attention pooling computes every position, ours the one that is used.

    Args:
        patterns: only names that contain one of these (* and ? match anything); none: all.
        pretrained: list open_clip's registry of published weights instead, as lit_clip.load_model takes them; those
            of a kind that lit-clip lacks are refused there by name.
    """
    names = _registry() if pretrained else list_models()
    names = [name for name in names if not patterns or any(matches(name, pattern) for pattern in patterns)]
    require(bool(names), f"no {'weights' if pretrained else 'model'} called {' or '.join(patterns)}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file has room
    if pretrained:
        for name in names:
            console.print(name, markup=False, soft_wrap=True)
        return
    table = Table(
        box=box.SIMPLE_HEAD, caption="M: millions of parameters; a multiplication with its addition: two FLOPs"
    )
    table.add_column("model", overflow="fold")
    for column in (
        "image\nM",
        "text\nM",
        "total\nM",
        "pixels",
        "tokens",
        "embed\ndim",
        "image\nGFLOPs",
        "text\nGFLOPs",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    with progress("models", len(names)) as advance:
        for name in names:
            table.add_row(name, *measure(resolve_architecture(name)).cells())
            advance(1)
    console.print(table)


def _registry() -> list[str]:
    import open_clip

    return [f"{model}:{tag}" for model, tag in open_clip.list_pretrained()]


def matches(name: str, pattern: str) -> bool:
    """Whether the name contains the pattern, letter case aside."""
    return fnmatch(name.lower(), f"*{pattern.lower()}*")


@dataclass
class Size:
    """What a model takes; None where it cannot be known without its weights.

    Attributes:
        image_parameters: of the image encoder.
        text_parameters: of the text encoder.
        parameters: of all, the logits' scale (and bias) included.
        image_size: height and width, pixels.
        context_length: tokens.
        embed_dim: channels of the shared space.
        image_flops: of one picture.
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


def measure(config: CLIPConfig) -> Size:
    """Count a model's parameters and arithmetic on torch's meta device, where nothing is allocated or computed."""
    size = Size(embed_dim=config.embed_dim)
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
