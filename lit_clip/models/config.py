"""Architectures as plain dataclasses, filled in by YAML files and stored in checkpoints.

Named models are in :mod:`lit_clip.models.registry`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from msgspec import Meta

from lit_clip.errors import InputError
from lit_clip.models.external_config import (
    CustomEncoderConfig,
    CustomImageConfig,
    CustomTextConfig,
    HuggingFaceImageConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    TimmConfig,
)
from lit_clip.models.size import (
    ContextLength,
    Layers,
    Ratio,
    Side,
    Size,
    TokenID,
    VocabSize,
    Width,
    height_width,
    normalised,
)
from lit_clip.tools.levels import MOST_BANDS, Window, check_window
from lit_clip.tools.untrusted import check_fields, from_plain, shortened

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

Epsilon = Annotated[float, Meta(ge=0, le=1)]
Mean = Annotated[float, Meta(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Meta(ge=1e-6, le=1e6)]


@dataclass
class Preprocessing:
    """How an image becomes pixels for a model, as in its training.

    Attributes:
        image_size: in pixels.
        mean: per band, on the scale 0 to 1, and so the number of bands; of red, green and blue the paper's by default.
        std: per band, on the scale 0 to 1.
        interpolation: the resampling filter.
        resize_mode: ``shortest`` resizes the shorter side and crops the centre, ``squash`` ignores the aspect ratio.
        crop_pct: fraction of the resized image's side that the crop keeps; 1 for the paper's models, less for some of
            timm's.
        max_patches: budget of patches of NaFlex: an image keeps its aspect ratio and is resized to as many patches as
            that allows (:mod:`lit_clip.models.patches`); ``image_size`` is then the square of that many patches, and
            ``resize_mode`` has no meaning. None: images of one size.
        patch_size: side of NaFlex's patches in pixels.
        window: grey levels of more than 8 bits that become 0 and 255: two numbers, ``{percentiles: [low, high]}`` of
            each image, or ``bit_depth``, the range of the file's bits. None: ``bit_depth`` too, with a warning.
    """

    image_size: Size = 224
    mean: Annotated[tuple[Mean, ...], Meta(min_length=1, max_length=MOST_BANDS)] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Deviation, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    crop_pct: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_patches: Annotated[int, Meta(ge=1, le=65535)] | None = None
    patch_size: Annotated[int, Meta(ge=2, le=1024)] | None = None
    window: Window | None = None

    def __post_init__(self) -> None:
        where = "architecture.preprocessing"
        check_fields(self, where)
        if self.window is not None:
            check_window(self.window, f"{where}.window")
        if len(self.std) != self.bands:
            raise InputError(f"{where}.std: {len(self.std)} numbers for {self.bands} bands; give one for each of mean")
        if self.max_patches is not None:
            if self.patch_size is None:
                raise InputError(f"{where}.patch_size: must be set with max_patches, to at least 2")
            if self.bands != 3:
                raise InputError(f"{where}.max_patches: NaFlex patches have 3 bands, mean has {self.bands}")
            self.image_size = math.isqrt(self.max_patches) * self.patch_size
        elif self.patch_size is not None:
            raise InputError(f"{where}.patch_size: is for NaFlex; set max_patches too")
        self.image_size = normalised(self.image_size)

    @property
    def bands(self) -> int:
        """Number of bands (channels) of an image."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a preprocessed image: ``(C, H, W)``, or for NaFlex ``(1 + max_patches, 3PP)``."""
        if self.max_patches is not None and self.patch_size is not None:
            return 1 + self.max_patches, 3 * self.patch_size**2
        return self.bands, *height_width(self.image_size)


def _check_heads(config: "VisionTransformerConfig | TextTransformerConfig", where: str) -> None:
    if config.width % config.heads:
        problem = f"width {config.width} is not a multiple of heads {config.heads}; the paper uses width / 64 heads"
        raise InputError(f"{where}: {problem}")


@dataclass
class VisionTransformerConfig:
    """An image encoder: ViT with a class token, a learned position embedding and pre-LN blocks.

    Attributes:
        image_size: input size in pixels.
        patch_size: height and width of a patch in pixels; divides ``image_size``.
        width: channels of a token.
        layers: number of blocks.
        heads: attention heads; the paper's models have 64 channels per head.
        mlp_ratio: width of the MLPs' inner layer, as a multiple of ``width``.
        ln_pre: whether there is a LayerNorm before the first block.
        pool: the features are those of the ``class`` token, the ``mean`` of the patches' (CLIPA), or what one query
            reads from all tokens by ``attention`` (CoCa); the last LayerNorm follows.
        pool_queries: queries of attention pooling; the first is read, CoCa's caption decoder reads the others.
        pool_heads: attention heads of attention pooling, whose width is ``embed_dim``.
        layer_norm_eps: epsilon of every LayerNorm.
        activation: in its MLPs; None: the architecture's.
    """

    image_size: Size = 224
    patch_size: Side = 32
    width: Width = 768
    layers: Layers = 12
    heads: Width = 12
    mlp_ratio: Ratio = 4.0
    ln_pre: bool = True
    pool: Literal["class", "mean", "attention"] = "class"
    pool_queries: Width = 256
    pool_heads: Width = 8
    layer_norm_eps: Epsilon = 1e-5
    activation: Activation | None = None

    def __post_init__(self) -> None:
        where = "architecture.image"
        check_fields(self, where)
        self.image_size = normalised(self.image_size)
        _check_heads(self, where)
        if any(side % self.patch_size for side in height_width(self.image_size)):
            problem = f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            raise InputError(f"{where}: {problem}; the rest of the image would be lost")


@dataclass
class ResNetConfig:
    """An image encoder: the paper's modified ResNet with attention pooling.

    Attributes:
        layers: bottleneck blocks in each of the four stages.
        width: channels of the stem; the features before pooling have 32 times as many.
        image_size: input size in pixels, a multiple of 32.
    """

    layers: tuple[Layers, Layers, Layers, Layers]
    width: Width = 64
    image_size: Size = 224

    def __post_init__(self) -> None:
        where = "architecture.image"
        check_fields(self, where)
        self.image_size = normalised(self.image_size)
        if self.width % 2:
            raise InputError(f"{where}: width {self.width} must be even: heads are width / 2")
        if any(side < 32 or side % 32 for side in height_width(self.image_size)):
            raise InputError(f"{where}: image_size {self.image_size} is not a multiple of 32, the ResNet's stride")


@dataclass
class TextTransformerConfig:
    """A text encoder of pre-LN blocks; the paper's is causal and pooled at the end-of-text token.

    Attributes:
        context_length: maximum tokens of a caption, including start and end.
        vocab_size: number of token ids.
        width: channels of a token.
        layers: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLPs' inner layer, as a multiple of ``width``.
        causal: true: a token attends to those before it. False: every token attends to all, padding included.
        projection: whether a projection maps into the embedding; without it the widths must agree.
        projection_bias: whether the projection has a bias (SigLIP).
        layer_norm_eps: epsilon of every LayerNorm.
        tokenizer: None: CLIP's own byte-pair encoding.
        pool: the token whose features are the text's: ``argmax``, the highest id, which ends a text in CLIP's encoding;
            ``eos``, the first of id ``eos_id``; ``last``, of the whole context (SigLIP); or ``class``, a token of its
            own behind a causal text (CoCa). None: ``argmax`` if causal, else ``last``.
        eos_id: id of the end of text, for ``pool: eos``.
        activation: in its MLPs; None: the architecture's.
    """

    context_length: ContextLength = 77
    vocab_size: VocabSize = 49408
    width: Width = 512
    layers: Layers = 12
    heads: Width = 8
    mlp_ratio: Ratio = 4.0
    causal: bool = True
    projection: bool = True
    projection_bias: bool = False
    layer_norm_eps: Epsilon = 1e-5
    tokenizer: HuggingFaceTokenizerConfig | None = None
    pool: Literal["argmax", "eos", "last", "class"] | None = None
    eos_id: TokenID = 2
    activation: Activation | None = None

    def __post_init__(self) -> None:
        where = "architecture.text"
        if self.pool is None:
            self.pool = "argmax" if self.causal is True else "last"
        check_fields(self, where)
        _check_heads(self, where)
        if self.pool == "class" and not (self.causal and self.tokenizer is None):
            needs = "pool class needs a causal encoder and CLIP's own tokenizer, whose padding is known"
            raise InputError(f"{where}: {needs}")

    @property
    def padding_read(self) -> int:
        """Largest number of padding tokens after a text that affect its features."""
        if self.pool == "class":
            return 1  # CoCa's mask of padding is one token off, and published weights were trained with it
        return 0 if self.causal and self.pool != "last" else self.context_length


# jsonargparse must try the encoders by class path first: for others it would import what class_path names.
ImageConfig = CustomImageConfig | VisionTransformerConfig | ResNetConfig | TimmConfig | HuggingFaceImageConfig
TextConfig = CustomTextConfig | TextTransformerConfig | HuggingFaceTextConfig


def _image(values: Any) -> ImageConfig:
    kinds = {"class_path": CustomImageConfig, "timm": TimmConfig, "patch_size": VisionTransformerConfig}
    kinds["model"] = HuggingFaceImageConfig
    keys = values if isinstance(values, Mapping) else {}
    return from_plain(next((kinds[key] for key in kinds if key in keys), ResNetConfig), values, "architecture.image")


def _text(values: Any) -> TextConfig:
    where, keys = "architecture.text", values if isinstance(values, Mapping) else {}
    kinds = {"class_path": CustomTextConfig, "hugging_face": HuggingFaceTextConfig}
    if keys.get("tokenizer") is not None:
        values = {**keys, "tokenizer": from_plain(HuggingFaceTokenizerConfig, keys["tokenizer"], f"{where}.tokenizer")}
    return from_plain(next((kinds[key] for key in kinds if key in keys), TextTransformerConfig), values, where)


@dataclass
class CLIPConfig:
    """Two encoders with one embedding space.

    Attributes:
        embed_dim: channels of that space.
        image: the image encoder, by default the one of the paper's ViT-B/32.
        text: the text encoder, by default the one of the paper's ViT-B/32.
        activation: in the MLPs of our own encoders that name no other; OpenAI's weights need ``quick_gelu``, most of
            open_clip's ``gelu``.
        preprocessing: of images; None: the paper's at the image encoder's size, or timm's for its model.
        logit_bias: whether the logits have a learned bias, which the sigmoid loss needs (SigLIP).
    """

    embed_dim: Width = 512
    # None only until __post_init__: jsonargparse would mix a default's sizes into an encoder of another kind.
    image: ImageConfig = cast(ImageConfig, None)
    text: TextConfig = cast(TextConfig, None)
    activation: Activation = "gelu"
    preprocessing: Preprocessing | None = None
    logit_bias: bool = False

    def __post_init__(self) -> None:
        self.image, self.text = self.image or VisionTransformerConfig(), self.text or TextTransformerConfig()
        check_fields(self, "architecture", "image", "text")
        if not (isinstance(self.image, ImageConfig) and isinstance(self.text, TextConfig)):
            raise InputError("architecture: image and text must be configurations of encoders")
        image, text, wide = self.image, self.text, self.embed_dim
        if isinstance(text, TextTransformerConfig) and not text.projection and text.width != wide:
            problem = f"width {text.width} is not embed_dim {self.embed_dim}; set projection to true"
            raise InputError(f"architecture.text: {problem}")
        if isinstance(image, VisionTransformerConfig) and image.pool == "attention" and wide % image.pool_heads:
            problem = f"embed_dim {self.embed_dim} is not a multiple of pool_heads {image.pool_heads}"
            raise InputError(f"architecture.image: {problem}")
        # One spelling of equal architectures: an encoder's activation is named only if it is another.
        if getattr(image, "activation", None) == self.activation:
            self.image = dataclasses.replace(image, activation=None)
        if getattr(text, "activation", None) == self.activation:
            self.text = dataclasses.replace(text, activation=None)
        size = self.image.image_size
        if self.preprocessing is None and size is not None and not isinstance(self.image, TimmConfig):
            self.preprocessing = Preprocessing(size)
        if self.preprocessing is not None and size is not None:
            wanted = self.preprocessing.image_size
            if wanted != size:
                raise InputError(f"architecture: preprocessing.image_size {wanted} is not image.image_size {size}")

    @property
    def papers_layout(self) -> bool:
        """Whether the text encoder's weights have OpenAI's names, beside ``visual.`` and not below ``text.``."""
        return isinstance(self.text, TextTransformerConfig) and self.text.causal and self.text.pool in ("argmax", "eos")

    @property
    def own_encoders(self) -> dict[Literal["image", "text"], str]:
        """The class paths of towers that are encoders of your own."""
        towers: dict[Literal["image", "text"], Any] = {"image": self.image, "text": self.text}
        return {name: str(each.class_path) for name, each in towers.items() if isinstance(each, CustomEncoderConfig)}

    @property
    def activations(self) -> set[Activation]:
        """The activations of our own encoders."""
        ours = [each for each in (self.image, self.text) if hasattr(each, "activation")]
        return {cast(Any, each).activation or self.activation for each in ours}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """Create a configuration from the values of :meth:`to_dict`; they may come from a file."""
        where = "architecture"
        if not (isinstance(values, Mapping) and {"image", "text"} <= values.keys()):
            raise InputError(f"{where}: {shortened(values)} must be a mapping of settings with image and text")
        parts: dict[str, Any] = {"image": _image(values["image"]), "text": _text(values["text"])}
        if values.get("preprocessing") is not None:
            parts["preprocessing"] = from_plain(Preprocessing, values["preprocessing"], f"{where}.preprocessing")
        return from_plain(cls, {**values, **parts}, where)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint; ``pretrained`` is false, because the checkpoint has the weights."""
        values = dataclasses.asdict(self)
        for tower in ("image", "text"):
            if "pretrained" in values[tower]:
                values[tower]["pretrained"] = False
        return values

    def without_pretrained(self) -> "CLIPConfig":
        """Return the same sizes, with random weights in both towers."""
        return CLIPConfig.from_dict(self.to_dict())


def described(config: CLIPConfig) -> dict[str, Any]:
    """Return everything that affects features, except the weights, as plain values by name.

    The sources of towers and tokenizers are left out; the sizes of a Hugging Face encoder show in its weights.
    """
    values = config.to_dict()
    for name, tower in (("image", values.pop("image")), ("text", values.pop("text"))):
        if tower.get("tokenizer"):
            tower["strip_sep_token"] = tower["tokenizer"]["strip_sep_token"]
            tower["tokenizer"] = tower["tokenizer"]["clean"]
        values[f"{name} encoder"] = type(getattr(config, name)).__name__.removesuffix("Config")
        values.update({f"{name}.{key}": value for key, value in tower.items() if key not in ("hugging_face", "model")})
    preprocessing = values.pop("preprocessing").items()
    values.update({f"preprocessing.{key}": value for key, value in preprocessing if key != "window" or value})
    return values


def differences(theirs: CLIPConfig, ours: CLIPConfig) -> list[str]:
    """List how two architectures (:func:`described`) differ, such as ``image.width 768 there and 1024 here``.

    A window may differ: a run gives the model that of its own images.
    """
    there, here = ({**described(config), "preprocessing.window": None} for config in (theirs, ours))
    return [
        f"{key} {there[key]} there and {here[key]} here" for key in here if key in there and there[key] != here[key]
    ]
