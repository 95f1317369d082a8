"""What a CLIP is made of, as plain dataclasses that YAML files fill in, and the models that have a name.

Sizes are those of tables 19 and 20 of the paper and names open_clip's, a tiny one to start with apart.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from lit_clip.errors import InputError, require

Activation = Literal["quick_gelu", "gelu"]


@dataclass
class VisionTransformerConfig:
    """An image encoder: ViT with a class token, a learned position embedding and pre-LN blocks.

    Attributes:
        image_size: height and width of the input, pixels.
        patch_size: height and width of a patch, pixels; divides ``image_size``.
        width: channels of a token.
        layers: number of blocks.
        heads: attention heads; the paper's models have 64 channels a head.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12


@dataclass
class TextTransformerConfig:
    """A text encoder: causal pre-LN blocks, read at the end-of-text token.

    Attributes:
        context_length: most tokens a caption may have, start and end included.
        vocab_size: number of token ids.
        width: channels of a token.
        layers: number of blocks.
        heads: attention heads.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8


@dataclass
class Preprocessing:
    """How a picture becomes the pixels a model was trained on.

    Attributes:
        image_size: height and width, pixels.
        mean: of each channel, on the scale 0 to 1 (the paper's, by default).
        std: of each channel, likewise.
        interpolation: the resampling filter.
        resize_mode: ``shortest`` resizes the shorter side and crops the centre, ``squash`` ignores the aspect ratio.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"

    def __post_init__(self) -> None:
        (r, g, b), (r_std, g_std, b_std) = self.mean, self.std
        self.mean, self.std = (r, g, b), (r_std, g_std, b_std)  # JSON knows lists only


@dataclass
class CLIPConfig:
    """Two encoders into one embedding space.

    Attributes:
        embed_dim: channels of that space.
        image: the image encoder.
        text: the text encoder.
        activation: of every MLP; OpenAI's weights need ``quick_gelu``, most of open_clip's ``gelu``.
        preprocessing: of pictures; None: the paper's, at the image encoder's size.
    """

    embed_dim: int = 512
    image: VisionTransformerConfig = field(default_factory=VisionTransformerConfig)
    text: TextTransformerConfig = field(default_factory=TextTransformerConfig)
    activation: Activation = "gelu"
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        require(self.embed_dim >= 1, f"architecture: embed_dim {self.embed_dim} must be at least 1")
        for tower, config in (("image", self.image), ("text", self.text)):
            for name, size in dataclasses.asdict(config).items():
                least = 3 if name == "context_length" else 1  # start, a word, end
                require(size >= least, f"architecture.{tower}: {name} {size} must be at least {least}")
            if config.width % config.heads:
                raise InputError(
                    f"architecture.{tower}: width {config.width} is not a multiple of heads {config.heads}; "
                    "the paper uses width / 64 heads"
                )
        if self.image.image_size % self.image.patch_size:
            raise InputError(
                f"architecture.image: image_size {self.image.image_size} is not a multiple of patch_size "
                f"{self.image.patch_size}; the rest of the picture would be cut off"
            )

        if self.preprocessing is None:
            self.preprocessing = Preprocessing(image_size=self.image.image_size)
        theirs, ours = self.preprocessing.image_size, self.image.image_size
        require(theirs == ours, f"architecture: preprocessing.image_size {theirs} is not image.image_size {ours}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """The inverse of :func:`dataclasses.asdict`."""
        return cls(
            **{
                **values,
                "image": VisionTransformerConfig(**values["image"]),
                "text": TextTransformerConfig(**values["text"]),
                "preprocessing": Preprocessing(**values["preprocessing"]),
            }
        )


def _vit(patch_size: int, activation: Activation) -> CLIPConfig:
    return CLIPConfig(image=VisionTransformerConfig(patch_size=patch_size), activation=activation)


_MODELS = {
    "ViT-B-32": _vit(32, "gelu"),
    "ViT-B-32-quickgelu": _vit(32, "quick_gelu"),
    "ViT-B-16": _vit(16, "gelu"),
    "ViT-B-16-quickgelu": _vit(16, "quick_gelu"),
    # Ours, for small pictures on a CPU: 17.7 million parameters, 12.6 of them the token embedding.
    "ViT-tiny-16-64": CLIPConfig(
        embed_dim=256,
        image=VisionTransformerConfig(image_size=64, patch_size=16, width=256, layers=4, heads=4),
        text=TextTransformerConfig(context_length=32, width=256, layers=2, heads=4),
    ),
}


def list_models() -> list[str]:
    """Names that :func:`lit_clip.create_model` and ``--model.architecture`` understand."""
    return list(_MODELS)


def resolve_architecture(architecture: "str | CLIPConfig | Mapping[str, Any]") -> CLIPConfig:
    """The configuration behind a model's name (a copy), a mapping (as a checkpoint stores it) or itself."""
    if isinstance(architecture, CLIPConfig):
        return architecture
    if isinstance(architecture, Mapping):
        return CLIPConfig.from_dict(architecture)
    if architecture.lstrip().startswith("{"):  # sizes typed on the command line that did not parse as a CLIPConfig
        raise InputError(f"model.architecture: {architecture} has an unknown entry or a value of the wrong type")
    if architecture not in _MODELS:
        near = get_close_matches(architecture, _MODELS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_MODELS)}"
        raise InputError(f"no model is called {architecture!r}; {hint}")
    return CLIPConfig.from_dict(dataclasses.asdict(_MODELS[architecture]))
