"""What a model is made of, as plain dataclasses that YAML files fill in and checkpoints store.

Named models are in :mod:`lit_clip.models.registry`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from lit_clip.errors import InputError, require

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
Size = int | tuple[int, int]
"""Pixels: of a square's side, or height and width."""


def height_width(size: Size) -> tuple[int, int]:
    """A :data:`Size` as height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _size(size: Size) -> Size:
    """JSON and YAML know lists only; a square is one number."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def _at_least(config: Any, where: str, **bounds: float) -> None:
    for name, least in bounds.items():
        value = getattr(config, name)
        require(value >= least, f"{where}: {name} {value} must be at least {least}")


def _check_heads(config: "VisionTransformerConfig | TextTransformerConfig", where: str) -> None:
    if config.width % config.heads:
        raise InputError(
            f"{where}: width {config.width} is not a multiple of heads {config.heads}; the paper uses width / 64 heads"
        )


@dataclass
class VisionTransformerConfig:
    """An image encoder: ViT with a class token, a learned position embedding and pre-LN blocks.

    Attributes:
        image_size: of the input, pixels.
        patch_size: height and width of a patch, pixels; divides ``image_size``.
        width: channels of a token.
        layers: number of blocks.
        heads: attention heads; the paper's models have 64 channels a head.
        mlp_ratio: width of the MLPs' inner layer, times ``width``.
    """

    image_size: Size = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        where = "architecture.image"
        self.image_size = _size(self.image_size)
        require(min(height_width(self.image_size)) >= 1, f"{where}: image_size {self.image_size} must be at least 1")
        _at_least(self, where, patch_size=1, width=1, layers=1, heads=1)
        require(self.mlp_ratio > 0, f"{where}: mlp_ratio {self.mlp_ratio} must be above 0")
        _check_heads(self, where)
        if any(side % self.patch_size for side in height_width(self.image_size)):
            raise InputError(
                f"{where}: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                "the rest of the image would be cut off"
            )


@dataclass
class ResNetConfig:
    """An image encoder: the paper's modified ResNet with attention pooling.

    Attributes:
        layers: bottleneck blocks of each of the four stages.
        width: channels of the stem; the features before pooling have 32 times as many.
        image_size: of the input, pixels; a multiple of 32.
    """

    layers: tuple[int, int, int, int]
    width: int = 64
    image_size: Size = 224

    def __post_init__(self) -> None:
        where = "architecture.image"
        a, b, c, d = self.layers
        self.layers, self.image_size = (a, b, c, d), _size(self.image_size)
        require(min(self.layers) >= 1, f"{where}: layers {list(self.layers)} must be at least 1")
        require(
            self.width >= 2 and self.width % 2 == 0, f"{where}: width {self.width} must be even: heads are width / 2"
        )
        if any(side < 32 or side % 32 for side in height_width(self.image_size)):
            raise InputError(f"{where}: image_size {self.image_size} is not a multiple of 32, the ResNet's stride")


@dataclass
class TimmConfig:
    """An image encoder from timm, and a projection behind it.

    Attributes:
        timm: the model's name in timm.
        pretrained: weights to start from: true for timm's own, or a local file of that model's weights.
        image_size: of the input, pixels; None: the one timm's weights were trained with.
        pool: timm's ``global_pool``; None: the model's own.
        projection: from the model's features to the embedding: one layer, two, what timm has for a ``classifier``, or
            none (the widths must agree).
        projection_bias: whether the (last) layer of the projection has a bias.
        options: other arguments of the timm model, such as ``drop_path_rate``.
    """

    timm: str
    pretrained: bool | str = False
    image_size: Size | None = None
    pool: str | None = None
    projection: Literal["linear", "mlp", "classifier", "none"] = "linear"
    projection_bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = "architecture.image"
        if self.image_size is not None:
            self.image_size = _size(self.image_size)
            least = min(height_width(self.image_size))
            require(least >= 1, f"{where}: image_size {self.image_size} must be at least 1")
        ours = {
            "img_size": "image_size",
            "global_pool": "pool",
            "num_classes": "projection",
            "pretrained": "pretrained",
        }
        for theirs in ours.keys() & self.options.keys():
            raise InputError(f"{where}: options.{theirs} is set by {ours[theirs]}")


@dataclass
class HuggingFaceTokenizer:
    """A tokenizer that Hugging Face's ``tokenizers`` can run.

    Attributes:
        source: a name on the hub, or a local folder.
        clean: of the text before: ``whitespace`` collapses it, ``lower`` lower-cases as well, ``canonicalize`` also
            takes punctuation out (as SigLIP was trained).
    """

    source: str
    clean: Literal["whitespace", "lower", "canonicalize"] = "whitespace"


@dataclass
class TextTransformerConfig:
    """A text encoder of pre-LN blocks; the paper's is causal and read at the end-of-text token.

    Attributes:
        context_length: most tokens a caption may have, start and end included.
        vocab_size: number of token ids.
        width: channels of a token.
        layers: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLPs' inner layer, times ``width``.
        causal: true: a token sees those before it, and the text is read at its end. False: every token sees every
            other, padding included, and the text is read at the last one (SigLIP).
        projection: whether there is one into the embedding; without it the widths must agree.
        projection_bias: whether it has a bias (SigLIP).
        layer_norm_eps: of every LayerNorm.
        tokenizer: None: CLIP's own byte-pair encoding.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    causal: bool = True
    projection: bool = True
    projection_bias: bool = False
    layer_norm_eps: float = 1e-5
    tokenizer: HuggingFaceTokenizer | None = None

    def __post_init__(self) -> None:
        where = "architecture.text"
        _at_least(self, where, context_length=3, vocab_size=1, width=1, layers=1, heads=1)  # start, a word, end
        require(self.mlp_ratio > 0, f"{where}: mlp_ratio {self.mlp_ratio} must be above 0")
        _check_heads(self, where)


@dataclass
class HuggingFaceTextConfig:
    """A text encoder from Hugging Face's transformers with its own tokenizer, and a projection behind it.

    Attributes:
        hugging_face: a name on the hub, or a local folder.
        pretrained: whether to start from that model's weights.
        context_length: most tokens a caption may have.
        pooling: which of the last layer's tokens are the text: the ``mean`` of those that are not padding, the first
            (``cls``), the ``last`` that is not padding, or what the model's own ``pooler`` makes of the first.
        projection: from the model's features to the embedding: one layer, two, or none (the widths must agree).
        model: the model's own configuration, so that a checkpoint needs no source; read from it when None.
    """

    hugging_face: str
    pretrained: bool = True
    context_length: int = 77
    pooling: Literal["mean", "cls", "last", "pooler"] = "mean"
    projection: Literal["linear", "mlp", "none"] = "linear"
    model: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _at_least(self, "architecture.text", context_length=3)

    @property
    def tokenizer(self) -> HuggingFaceTokenizer:
        """The one that lies beside the model."""
        return HuggingFaceTokenizer(self.hugging_face)


@dataclass
class Preprocessing:
    """How an image becomes the pixels a model was trained on.

    Attributes:
        image_size: pixels.
        mean: of each channel, on the scale 0 to 1 (the paper's, by default).
        std: of each channel, likewise.
        interpolation: the resampling filter.
        resize_mode: ``shortest`` resizes the shorter side and crops the centre, ``squash`` ignores the aspect ratio.
        crop_pct: share of the resized image's side that the crop keeps (timm's models; the paper's keep it all).
    """

    image_size: Size = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        (r, g, b), (r_std, g_std, b_std) = self.mean, self.std
        self.mean, self.std = (r, g, b), (r_std, g_std, b_std)  # JSON knows lists only
        self.image_size = _size(self.image_size)
        require(0 < self.crop_pct <= 1, f"architecture: preprocessing.crop_pct {self.crop_pct} must be in (0, 1]")


ImageConfig = VisionTransformerConfig | ResNetConfig | TimmConfig
TextConfig = TextTransformerConfig | HuggingFaceTextConfig


def _image(values: Mapping[str, Any]) -> ImageConfig:
    if "timm" in values:
        return TimmConfig(**values)
    return VisionTransformerConfig(**values) if "patch_size" in values else ResNetConfig(**values)


def _text(values: Mapping[str, Any]) -> TextConfig:
    if "hugging_face" in values:
        return HuggingFaceTextConfig(**values)
    tokenizer = values.get("tokenizer")
    return TextTransformerConfig(**{**values, "tokenizer": HuggingFaceTokenizer(**tokenizer) if tokenizer else None})


@dataclass
class CLIPConfig:
    """Two encoders into one embedding space.

    Attributes:
        embed_dim: channels of that space.
        image: the image encoder; by default that of the paper's ViT-B/32.
        text: the text encoder; likewise.
        activation: of every MLP of our own encoders; OpenAI's weights need ``quick_gelu``, open_clip's mostly ``gelu``.
        preprocessing: of images; None: the paper's at the image encoder's size, or what timm says of its model.
        logit_bias: whether the logits have a learned bias, as the sigmoid loss needs it (SigLIP).
    """

    embed_dim: int = 512
    # None only until __post_init__: jsonargparse would leave a default's sizes in an encoder of another kind.
    image: ImageConfig = cast(ImageConfig, None)
    text: TextConfig = cast(TextConfig, None)
    activation: Activation = "gelu"
    preprocessing: Preprocessing | None = None
    logit_bias: bool = False

    def __post_init__(self) -> None:
        require(self.embed_dim >= 1, f"architecture: embed_dim {self.embed_dim} must be at least 1")
        self.image, self.text = self.image or VisionTransformerConfig(), self.text or TextTransformerConfig()
        if isinstance(self.text, TextTransformerConfig) and not self.text.projection:
            width = self.text.width
            require(
                width == self.embed_dim, f"architecture.text: width {width} is not embed_dim {self.embed_dim}; project"
            )
        if self.preprocessing is None and not isinstance(self.image, TimmConfig):
            self.preprocessing = Preprocessing(self.image.image_size)
        size = self.image.image_size
        if self.preprocessing is not None and size is not None:
            wanted = self.preprocessing.image_size
            require(wanted == size, f"architecture: preprocessing.image_size {wanted} is not image.image_size {size}")

    @property
    def papers_layout(self) -> bool:
        """Whether the text encoder's weights lie beside ``visual.``, as OpenAI named them, or below ``text.``."""
        return isinstance(self.text, TextTransformerConfig) and self.text.causal

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """The inverse of :meth:`to_dict`."""
        preprocessing = values.get("preprocessing")
        return cls(
            **{
                **values,
                "image": _image(values["image"]),
                "text": _text(values["text"]),
                "preprocessing": Preprocessing(**preprocessing) if preprocessing else None,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint stores them: with its own weights it asks for no others."""
        values = dataclasses.asdict(self)
        for tower in ("image", "text"):
            if "pretrained" in values[tower]:
                values[tower]["pretrained"] = False
        return values

    def without_pretrained(self) -> "CLIPConfig":
        """The same sizes, with random weights in both towers."""
        return CLIPConfig.from_dict(self.to_dict())


def described(config: CLIPConfig) -> dict[str, Any]:
    """All that an architecture's features depend on beside the weights, as plain values by name.

    Where towers and tokenizers come from is left out; the sizes of a Hugging Face encoder show in its weights.
    """
    values = config.to_dict()
    for name, tower in (("image", values.pop("image")), ("text", values.pop("text"))):
        if tower.get("tokenizer"):
            tower["tokenizer"] = tower["tokenizer"]["clean"]
        values[f"{name} encoder"] = type(getattr(config, name)).__name__.removesuffix("Config")
        values.update({f"{name}.{key}": value for key, value in tower.items() if key not in ("hugging_face", "model")})
    values.update({f"preprocessing.{key}": value for key, value in values.pop("preprocessing").items()})
    return values


def differences(theirs: CLIPConfig, ours: CLIPConfig) -> list[str]:
    """What two architectures (:func:`described`) do not agree on, each as ``image.width 768 there and 1024 here``."""
    there, here = described(theirs), described(ours)
    return [
        f"{key} {there[key]} there and {here[key]} here" for key in here if key in there and there[key] != here[key]
    ]
