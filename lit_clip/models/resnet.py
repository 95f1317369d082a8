"""The paper's ResNet: ResNet-D with anti-aliased strides and attention pooling.

Parameter names and shapes are those of OpenAI's code. Shapes: B batch, C channels, L tokens, D embedding dimension.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.models.config import ResNetConfig, height_width
from lit_clip.models.transformer import ImageEncoder

EXPANSION = 4


def weight_format(device: torch.device) -> torch.memory_format:
    """Return the memory format for convolution weights on a device; CUDA would convert any other in every step."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class Bottleneck(nn.Module):
    """A residual block that strides by average pooling, also in the shortcut."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * EXPANSION
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        nn.init.zeros_(self.bn3.weight)  # as in OpenAI's code: a block starts as its shortcut
        self.downsample = None
        if stride > 1 or channels != out:
            conv, norm = nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)
            # OpenAI's numbering counts the convolution as 0.
            self.downsample = nn.Sequential(OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", norm)]))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """Attention pooling: the mean of all positions attends to itself and to all; includes the projection."""

    def __init__(self, positions: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, channels).div_(channels**0.5))
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=channels**-0.5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, D]``."""
        x = x_BCHW.flatten(2).transpose(1, 2)  # [B, L-1, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [B, L, C]
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, 1 or L, C / heads]
            for layer, tokens in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        pooled = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 1, C / heads]
        return self.c_proj(pooled.transpose(1, 2).flatten(1))


class ModifiedResNet(ImageEncoder):
    """Three stem convolutions, four stages of bottlenecks, attention pooling (paper, section 2.4).

    Where it is moved to another device, the convolutions' weights get the memory format of :func:`weight_format`.
    """

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.image_size = config.image_size
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        stages = []
        for stage, blocks in enumerate(config.layers):
            planes = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            inputs = [channels] + [planes * EXPANSION] * (blocks - 1)
            stages.append(nn.Sequential(*(Bottleneck(c, planes, s) for c, s in zip(inputs, strides, strict=True))))
            channels = planes * EXPANSION
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        height, length = height_width(config.image_size)
        self.grid = (height // 32, length // 32)
        self.attnpool = AttentionPool(self.grid[0] * self.grid[1], channels, channels // 64, embed_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = next(self.parameters()).device
        super()._apply(fn, recurse)
        after = next(self.parameters()).device
        for parameter in self.parameters() if after != before else ():
            if parameter.ndim == 4:  # of a convolution
                parameter.data = parameter.data.contiguous(memory_format=weight_format(after))
        return self

    def features(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, D]``: the pooling projects, so no features exist before it."""
        self.check(images)
        return self.attnpool(self.feature_map(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` of any size -> ``[B, C, H/32, W/32]``, before the pooling."""
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))

    def ordered_blocks(self) -> list[nn.Module]:
        """Return the blocks of all four stages."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def stem(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` of any size -> ``[B, C, H/4, W/4]``, before the stages."""
        x = images
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            # Faster, and kept by all layers; not in float32, where a CPU's gradients would lose two digits.
            x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return self.avgpool(x)
