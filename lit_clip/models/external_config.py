"""Architectures of encoders that are not ours as plain dataclasses: timm's, Hugging Face's, and your own."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from lit_clip.errors import InputError, require
from lit_clip.models.size import ContextLength, Size, normalised
from lit_clip.tools.parts import is_plain, qualified_name, script_name
from lit_clip.tools.untrusted import check_fields, check_names_nothing, check_options, convert, entries

HUB = "hf-hub:"


def check_timm_options(options: dict[str, Any], where: str) -> None:
    """Raise :class:`InputError` for timm model arguments that make timm load a file or a repository."""
    check_options(options, where)
    loaders = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    for name in loaders & options.keys():
        raise InputError(f"{where}.{name} is not allowed; set pretrained")


# The timm model of a hub name; see :func:`lit_clip.models.external_settings.timm_hub_model`.
_HUB_MODEL = entries({"architecture": str, **dict.fromkeys(("model_args", "data"), dict[str, Any])}, total=True)


@dataclass
class TimmConfig:
    """An image encoder from timm, followed by a projection.

    Attributes:
        timm: the model's name in timm, or ``hf-hub:org/name``.
        pretrained: weights to start from: true for timm's own or the hub's, or a local file of that model's weights.
        image_size: input size in pixels; None: the size timm's weights were trained with.
        pool: timm's ``global_pool``; or ``token+mean``, the class token and the mean of the patches, joined (dino.txt);
            None: the model's own.
        projection: from the model's features to the embedding: one layer, two layers, timm's ``classifier``, or none
            (the widths must agree).
        projection_bias: whether the last layer of the projection has a bias.
        options: other arguments of the timm model, such as ``drop_path_rate``.
        model: what a hub name stands for, so that a checkpoint does not depend on it, see
            :func:`lit_clip.models.external_settings.timm_hub_model`; None: read from there when the model is created.
    """

    timm: str
    pretrained: bool | str = False
    image_size: Size | None = None
    pool: str | None = None
    projection: Literal["linear", "mlp", "classifier", "none"] = "linear"
    projection_bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        where = "architecture.image"
        check_fields(self, where)
        if self.image_size is not None:
            self.image_size = normalised(self.image_size)
        check_timm_options(self.options, f"{where}: options")
        ours = {"img_size": "image_size", "global_pool": "pool", "num_classes": "projection"}
        ours["in_chans"] = "preprocessing.mean, one number a band"
        for theirs in ours.keys() & self.options.keys():
            raise InputError(f"{where}: options.{theirs} is not allowed; set {ours[theirs]}")
        if self.model is not None:
            convert(self.model, _HUB_MODEL, f"{where}.model")
            check_timm_options(self.model["model_args"], f"{where}: model.model_args")
            check_names_nothing(self.model, f"{where}: model")

    @property
    def on_hub(self) -> bool:
        """Whether a name on the Hugging Face hub identifies the model."""
        return self.timm.startswith(HUB)


@dataclass
class HuggingFaceTokenizerConfig:
    """Location of a tokenizer that Hugging Face's ``tokenizers`` can run.

    Attributes:
        source: a name on the hub, or a local folder.
        clean: how texts are cleaned first: ``whitespace`` collapses white space, ``lower`` also lower-cases,
            ``canonicalize`` also removes punctuation (as in SigLIP's training).
        strip_sep_token: whether the tokenizer's separator is replaced by id 0 (CLIPA).
    """

    source: str
    clean: Literal["whitespace", "lower", "canonicalize"] = "whitespace"
    strip_sep_token: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "architecture.text.tokenizer")


# Settings of transformers' models that fetch something, or say how a file was written; names that begin with _ too.
_LOADERS = {
    *("attn_implementation", "experts_implementation", "auto_map", "trust_remote_code", "custom_pipelines"),
    *("quantization_config", "name_or_path", "dtype", "torch_dtype", "transformers_weights", "gguf_file", "cache_dir"),
    *("base_model_tp_plan", "base_model_pp_plan", "transformers_version", "architectures"),
}


def _without_loaders(values: Any) -> Any:
    """Return a transformers configuration without settings, at any depth, that name a kernel, file or class."""
    if isinstance(values, Mapping):
        kept = {name: value for name, value in values.items() if not str(name).startswith("_")}
        return {name: _without_loaders(value) for name, value in kept.items() if name not in _LOADERS}
    return [_without_loaders(value) for value in values] if isinstance(values, list) else values


# Parts of transformers' models, by their model_type, that its AutoModel does not know.
IMAGE_CLASSES = {
    "aimv2_vision_model": "Aimv2VisionModel",
    "align_vision_model": "AlignVisionModel",
    "groupvit_vision_model": "GroupViTVisionModel",
}
TEXT_CLASSES = {"aimv2_text_model": "Aimv2TextModel", "groupvit_text_model": "GroupViTTextModel"}


@dataclass
class HuggingFaceImageConfig:
    """An image encoder from Hugging Face's transformers, followed by a projection.

    Attributes:
        model: its configuration there, without ``image_size``; its ``model_type`` is one of :data:`IMAGE_CLASSES`.
        image_size: in pixels.
        projection: from the model's features to the embedding: one layer, none (the widths must agree), or GroupViT's
            ``batch_norm`` between two layers.
    """

    model: dict[str, Any]
    image_size: Size = 224
    projection: Literal["linear", "none", "batch_norm"] = "linear"

    def __post_init__(self) -> None:
        check_fields(self, "architecture.image")
        self.image_size = normalised(self.image_size)
        self.model = _without_loaders(self.model)
        check_options(self.model, "architecture.image: model")
        self.model.pop("image_size", None)  # ours is used
        if self.model.get("is_native"):
            raise InputError("architecture.image.model: is_native: images of any size are not read here")


@dataclass
class HuggingFaceTextConfig:
    """A text encoder from Hugging Face's transformers with its own tokenizer, followed by a projection.

    Attributes:
        hugging_face: a name on the hub, or a local folder.
        pretrained: whether to start from that model's weights.
        context_length: maximum tokens of a caption.
        pooling: how the last layer's tokens become one feature: the ``mean`` of all except padding, the first
            (``cls``), the ``last`` except padding, the model's own ``pooler``, applied to the first, or the ``end`` of
            a text in CLIP's tokens, for the causal encoders of :data:`TEXT_CLASSES`.
        projection: from the model's features to the embedding: one layer, two layers, none (the widths must agree), a
            ``norm`` and two layers without an activation between them (AltCLIP), or GroupViT's ``batch_norm`` between
            two layers.
        projection_bias: whether a linear projection, or the last layer of two, has a bias.
        model: the model's own configuration, so that a checkpoint does not depend on the source; None: read from the
            source when the model is created.
    """

    hugging_face: str
    pretrained: bool = True
    context_length: ContextLength = 77
    pooling: Literal["mean", "cls", "last", "pooler", "end"] = "mean"
    projection: Literal["linear", "mlp", "none", "norm", "batch_norm"] = "linear"
    projection_bias: bool = False
    model: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "architecture.text")
        self.model = None if self.model is None else _without_loaders(self.model)
        check_options(self.model or {}, "architecture.text: model")

    @property
    def tokenizer(self) -> HuggingFaceTokenizerConfig | None:
        """The tokenizer of the model's source; None: CLIP's own."""
        return None if self.pooling == "end" else HuggingFaceTokenizerConfig(self.hugging_face)


@dataclass
class CustomEncoderConfig:
    """Your own encoder; :mod:`lit_clip.models.custom` says what its class must offer.

    Attributes:
        class_path: the class, as ``module.Class``; in Python also the class itself.
        init_args: its arguments beside ``embed_dim``; plain values, as a checkpoint holds them.
    """

    class_path: str | type
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.class_path
        self.class_path = path = qualified_name(path) if isinstance(path, type) else path
        for name, value in self.init_args.items() if isinstance(self.init_args, Mapping) else ():
            if not is_plain(value):
                can = "a checkpoint can only hold numbers, strings, lists and mappings"
                raise InputError(f"architecture: init_args.{name} of {path} is a {type(value).__name__}; {can}")
        check_fields(self, "architecture", "class_path")
        parts = path.split(".") if isinstance(path, str) else []
        named = len(parts) >= 2 and all(part.isidentifier() for part in parts)
        require(named, f"architecture: class_path {path!r} must be a module and a class of it: my_encoder.MyEncoder")


@dataclass
class CustomImageConfig(CustomEncoderConfig):
    """Your own image encoder; its size is read from it when the model is created."""

    image_size: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = None if self.image_size is None else normalised(self.image_size)


@dataclass
class CustomTextConfig(CustomEncoderConfig):
    """Your own text encoder; its context length is read when the model is created, and 0 until then."""

    context_length: Annotated[int, Meta(ge=0, le=65536)] = 0

    @property
    def tokenizer(self) -> None:
        """None: the encoder's class has its own tokenizer."""


def how_to_import(class_path: str) -> str:
    """Return instructions for importing a missing class."""
    module = class_path.rpartition(".")[0]
    return f"import {module} first (in Python), or name it: lit-clip --import {module} COMMAND ..."


def find_class(class_path: str) -> Any:
    """Return a class of an imported module or of the running script; import nothing. None if it does not exist."""
    module, _, name = class_path.rpartition(".")
    if module not in sys.modules and module == script_name():
        module = "__main__"
    # Not getattr: a package may import a submodule when asked for a name.
    return vars(sys.modules[module]).get(name) if module in sys.modules else None
