"""Encoders as a user would write them, named by class path in tests; the lower half has mistakes."""

import torch
from torch import Tensor, nn

from lit_clip.models.config import CLIPConfig
from lit_clip.models.external_config import CustomImageConfig, CustomTextConfig

TRUNK_WIDTH = 8


class Image(nn.Module):
    def __init__(self, embed_dim: int, width: int = TRUNK_WIDTH, depth: int = 2, image_size: int = 32) -> None:
        super().__init__()
        self.image_size = image_size
        self.trunk = nn.Conv2d(3, width, 8, 8)  # a name that timm's encoders have too
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.trunk(images).flatten(2).mean(dim=2)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


class Text(nn.Module):
    """Reads texts of full length, with CLIP's tokenizer."""

    def __init__(self, embed_dim: int, width: int = TRUNK_WIDTH, context_length: int = 16) -> None:
        super().__init__()
        self.context_length = context_length
        self.embedding = nn.Embedding(49408, width)
        self.mix = nn.Linear(context_length * width, embed_dim)  # padding included: it needs the full length

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(self.embedding(tokens).flatten(1))


class Characters:
    """A tokenizer of characters: the ASCII code of each, padded with 200."""

    pad_id = 200

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [[ord(letter) % 128 for letter in text[: self.context_length]] for text in texts]
        return torch.tensor([row + [self.pad_id] * (self.context_length - len(row)) for row in rows])

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


class TextOfLengths(nn.Module):
    """Reads batches without common padding, with a tokenizer of its own."""

    def __init__(self, embed_dim: int, context_length: int = 24, masked: bool = True) -> None:
        super().__init__()
        self.context_length, self.masked = context_length, masked
        self.tokenizer = Characters(context_length)
        self.embedding = nn.Embedding(256, embed_dim)
        self.blocks = [nn.Linear(embed_dim, embed_dim)]
        self.block = self.blocks[0]

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        x = self.embedding(tokens)
        if not self.masked:
            return self.block(x.mean(dim=1))
        rows = [x[i, :length].mean(dim=0) for i, length in enumerate(lengths)]
        return self.block(torch.stack(rows))


class NotAModule:
    def __init__(self, embed_dim: int) -> None:
        self.embed_dim = embed_dim


class NoForward(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()


class NoEmbedDim(Image):
    def __init__(self, dim: int = 4) -> None:
        super().__init__(dim)


class NoSize(Image):
    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        del self.image_size


class Wider(Image):
    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim + 1)


class Float64(Image):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).double()


class Pair(Image):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images), images  # type: ignore[return-value]


class NeedsDepth(Image):
    def __init__(self, embed_dim: int, depth: int) -> None:
        super().__init__(embed_dim, depth=depth)


class ShortTokens(Text):
    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        self.tokenizer = Characters(9)


class NameOfTokenizer(Text):
    tokenizer = "bert-base-uncased"


class MethodTokenizer(Text):
    def tokenizer(self, texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), self.context_length, dtype=torch.long)


def architecture(text: type[nn.Module] = TextOfLengths, **image: int) -> CLIPConfig:
    return CLIPConfig(6, CustomImageConfig(Image, dict(image)), CustomTextConfig(text))
