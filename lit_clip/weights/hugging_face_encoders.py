"""Convert encoders of Hugging Face's models to ours: code that the forms in this package share.

A form is a function, as in :mod:`lit_clip.weights.hugging_face_forms`, and a line in ``FORMS`` of
:mod:`lit_clip.weights.hugging_face`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lit_clip.errors import require
from lit_clip.models.config import (
    Activation,
    CLIPConfig,
    HuggingFaceTextConfig,
    TextConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
)
from lit_clip.tools.reading import reading
from lit_clip.weights.hugging_face_processor import agree, preprocessing_of, square

Converted = tuple[CLIPConfig, dict[str, Tensor]]
"""A model's architecture, and its weights by our names."""


class Folder(NamedTuple):
    """Contents of a transformers folder."""

    values: Mapping[str, Any]  # config.json
    state: Mapping[str, Tensor]
    preprocessor: Mapping[str, Any] | None  # preprocessor_config.json
    tokenizer: str  # its place, the folder or a name on the hub


ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",  # the formula of gelu_pytorch_tanh, written out
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(name: str, theirs: str) -> Activation:
    """Return our name of an activation; ``name`` is the setting, for messages."""
    require(theirs in ACTIVATIONS, f"{name} is {theirs}; must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def ratio(inner: int, width: int) -> float:
    """Return ``r`` such that ``int(width * r)`` is exactly ``inner`` in floating point."""
    found = inner / width
    return found if int(width * found) == inner else math.nextafter(found, math.inf)


def complete(kind: str, values: Mapping[str, Any]) -> Any:
    """Return transformers' configuration with all defaults, which files leave out."""
    import transformers

    with reading("config.json", kind):  # their validation raises anything
        return getattr(transformers, kind).from_dict(dict(values))


def clip_config(theirs: Any, preprocessor: Mapping[str, Any] | None, text: TextConfig) -> CLIPConfig:
    """Return the architecture of a model with a CLIPModel's image encoder and the given text encoder."""
    image = theirs.vision_config
    agree("vision_config.num_channels", image.num_channels, 3)
    size = square("vision_config.image_size", image.image_size)
    act = activation("vision_config.hidden_act", image.hidden_act)
    return CLIPConfig(
        embed_dim=theirs.projection_dim,
        image=VisionTransformerConfig(
            image_size=size,
            patch_size=square("vision_config.patch_size", image.patch_size),
            width=image.hidden_size,
            layers=image.num_hidden_layers,
            heads=image.num_attention_heads,
            mlp_ratio=ratio(image.intermediate_size, image.hidden_size),
            layer_norm_eps=image.layer_norm_eps,
            activation=act,
        ),
        text=text,
        activation=getattr(text, "activation", None) or act,
        preprocessing=None if preprocessor is None else preprocessing_of(preprocessor, size, "CLIPImageProcessor"),
    )


def text_transformer(theirs: Any, **settings: Any) -> TextTransformerConfig:
    """Return our text encoder from transformers' configuration and the settings that it lacks."""
    return TextTransformerConfig(
        context_length=theirs.max_position_embeddings,
        vocab_size=theirs.vocab_size,
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        mlp_ratio=ratio(theirs.intermediate_size, theirs.hidden_size),
        layer_norm_eps=theirs.layer_norm_eps,
        activation=activation("text_config.hidden_act", theirs.hidden_act),
        **settings,
    )


def timm_options(theirs: Any) -> dict[str, Any]:
    """Return the sizes of a transformers image encoder as arguments of timm's vision transformer."""
    return {
        "patch_size": square("vision_config.patch_size", theirs.patch_size),
        "embed_dim": theirs.hidden_size,
        "depth": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "mlp_ratio": ratio(theirs.intermediate_size, theirs.hidden_size),
        "act_layer": activation("vision_config.hidden_act", theirs.hidden_act),
    }


def plain(theirs: Any) -> dict[str, Any]:
    """Return a transformers configuration as plain values."""
    return json.loads(theirs.to_json_string(use_diff=False))


def bert(theirs: Any, kind: str, tokenizer: str, **settings: Any) -> HuggingFaceTextConfig:
    """Return a text encoder of BERT's family; ``kind`` is the ``model_type`` with the same weights."""
    model = {**plain(theirs), "model_type": kind}
    return HuggingFaceTextConfig(tokenizer, pretrained=False, pooling="cls", model=model, **settings)
