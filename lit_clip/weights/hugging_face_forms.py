"""Models of transformers other than SigLIP's as ours: one function for each form, and the code that forms share.

A form is a function here and a line in ``FORMS`` of :mod:`lit_clip.weights.hugging_face`. EVA-CLIP's names, settings
and defaults follow ``modeling_evaclip.py`` and ``configuration_evaclip.py`` of BAAI/EVA-CLIP-8B-448.
"""

import json
import math
import warnings
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.models.config import (
    Activation,
    CLIPConfig,
    HuggingFaceImageConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    TextConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.models.external import GROUPVIT_RATIO
from lit_clip.models.tokenizer import EOT_ID
from lit_clip.tools.reading import reading
from lit_clip.weights.hugging_face_keys import (
    OPENAI_BLOCK,
    blocks,
    clip_pairs,
    eva_pairs,
    renamed,
    same_pairs,
    text_pairs,
    vision_pairs,
)
from lit_clip.weights.hugging_face_processor import agree, check_vocabulary, preprocessing_of, square

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


# Sizes of an encoder's blocks, in our configurations: transformers' names.
SIZES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "layer_norm_eps": "layer_norm_eps",
}
# Arguments of timm's vision transformer: our names.
TIMM_SIZES = {
    "embed_dim": "width",
    "depth": "layers",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "act_layer": "activation",
}


def _sizes(theirs: Any, part: str) -> dict[str, Any]:
    """Return the sizes and activation of an encoder's blocks; ``part`` is its place in ``config.json``."""
    return {
        **{ours: getattr(theirs, name) for ours, name in SIZES.items()},
        "mlp_ratio": ratio(theirs.intermediate_size, theirs.hidden_size),
        "activation": activation(f"{part}.hidden_act", theirs.hidden_act),
    }


def clip_config(theirs: Any, preprocessor: Mapping[str, Any] | None, text: TextConfig) -> CLIPConfig:
    """Return the architecture of a model with a CLIPModel's image encoder and the given text encoder."""
    vision = theirs.vision_config
    agree("vision_config.num_channels", vision.num_channels, 3)
    size, patch = (square(f"vision_config.{name}", getattr(vision, name)) for name in ("image_size", "patch_size"))
    image = VisionTransformerConfig(size, patch, **_sizes(vision, "vision_config"))
    return CLIPConfig(
        embed_dim=theirs.projection_dim,
        image=image,
        text=text,
        activation=getattr(text, "activation", None) or cast(Activation, image.activation),
        preprocessing=None if preprocessor is None else preprocessing_of(preprocessor, size, "CLIPImageProcessor"),
    )


def text_transformer(theirs: Any, **settings: Any) -> TextTransformerConfig:
    """Return our text encoder from transformers' configuration and the settings that it lacks."""
    sizes = _sizes(theirs, "text_config")
    return TextTransformerConfig(theirs.max_position_embeddings, theirs.vocab_size, **sizes, **settings)


def timm_options(theirs: Any) -> dict[str, Any]:
    """Return the sizes of a transformers image encoder as arguments of timm's vision transformer."""
    sizes, patch = _sizes(theirs, "vision_config"), square("vision_config.patch_size", theirs.patch_size)
    return {"patch_size": patch} | {name: sizes[ours] for name, ours in TIMM_SIZES.items()}


def plain(theirs: Any) -> dict[str, Any]:
    """Return a transformers configuration as plain values."""
    return json.loads(theirs.to_json_string(use_diff=False))


def bert(theirs: Any, kind: str, tokenizer: str, **settings: Any) -> HuggingFaceTextConfig:
    """Return a text encoder of BERT's family; ``kind`` is the ``model_type`` with the same weights."""
    model = {**plain(theirs), "model_type": kind}
    return HuggingFaceTextConfig(tokenizer, pretrained=False, pooling="cls", model=model, **settings)


# CLIP's image encoder, or transformers' own classes

# Tokens of a text in the owner's training, of the 512 positions of BERT and XLM-R.
CHINESE_CLIP_CONTEXT, ALTCLIP_CONTEXT, ALIGN_CONTEXT = 52, 77, 64
# Pixels from -1 to 1, by EfficientNet's processor.
ALIGN_SCALE = {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False, "include_top": False}

FG_CLIP = "text_model.embeddings.position_embedding_res.weight"  # the weight that a CLIPModel has not
_FG_CLIP_LEFT_OUT = (
    *("text_model.embeddings.position_embedding_ori.", "text_model.embeddings.position_embedding_res."),
    *("text_filip_projection.", "logit_scale_finegraind", "logit_scale_hardneg"),  # sic; of FG-CLIP
    *("longtext_head.", "boxtext_head.", "dense_feature_head."),  # of FG-CLIP 2
)


def fg_clip_of_short_texts(folder: Folder) -> Folder:
    """Return the part of FG-CLIP (2) for whole images and short texts, a ``CLIPModel`` or ``Siglip2Model``."""
    left_out = [part for part in _FG_CLIP_LEFT_OUT if any(name.startswith(part) for name in folder.state)]
    parts = ", ".join(part.strip(".") for part in left_out)
    warnings.warn(f"{folder.tokenizer}: left out, as they read long texts and regions: {parts}", stacklevel=2)
    state = {name: tensor for name, tensor in folder.state.items() if not name.startswith(_FG_CLIP_LEFT_OUT)}
    if folder.values["model_type"] != "clip":
        return folder._replace(values={**folder.values, "model_type": "siglip2"}, state=state)
    # Its owner's examples squash an image before the processor.
    preprocessor = {**(folder.preprocessor or {}), "do_center_crop": False}
    side = preprocessor.get("crop_size", 224)
    size = side if isinstance(side, dict) else {"height": side, "width": side}
    return folder._replace(state=state, preprocessor={**preprocessor, "size": size})


def metaclip_2(folder: Folder) -> Converted:
    """Convert a ``MetaClip2Model``: a CLIPModel with a multilingual tokenizer, pooled at the end of text."""
    theirs = complete("MetaClip2Config", folder.values)
    text, source = theirs.text_config, HuggingFaceTokenizerConfig(folder.tokenizer)
    encoder = text_transformer(text, pool="eos", eos_id=text.eos_token_id, tokenizer=source)
    pairs = clip_pairs(theirs.vision_config.num_hidden_layers, text.num_hidden_layers)
    return clip_config(theirs, folder.preprocessor, encoder), renamed(folder.state, pairs, inwards=True)


def chinese_clip(folder: Folder) -> Converted:
    """Convert a ``ChineseCLIPModel``: its texts are read by the first token of a BERT."""
    theirs = complete("ChineseCLIPConfig", folder.values)
    length = min(CHINESE_CLIP_CONTEXT, theirs.text_config.max_position_embeddings)
    text = bert(theirs.text_config, "bert", folder.tokenizer, context_length=length)
    pairs = [
        *vision_pairs(theirs.vision_config.num_hidden_layers),
        *same_pairs(folder.state, {"text.transformer.": "text_model.", "text.proj.": "text_projection."}),
    ]
    return clip_config(theirs, folder.preprocessor, text), renamed(folder.state, pairs, inwards=True)


def altclip(folder: Folder) -> Converted:
    """Convert an ``AltCLIPModel``: behind the first token of an XLM-R come a norm and two layers."""
    theirs = complete("AltCLIPConfig", folder.values)
    text = theirs.text_config
    agree("text_config.project_dim", text.project_dim, theirs.projection_dim)
    agree("text_config.layer_norm_eps", text.layer_norm_eps, 1e-5)
    # Releases of transformers disagree whether blocks are `layer` or `layers`.
    state = {
        name.replace(".layers.", ".layer.")
        if name.startswith("text_model.")
        else name.replace(".layer.", ".layers."): tensor
        for name, tensor in folder.state.items()
    }
    prefixes = {"text.transformer.": "text_model.roberta.", "text.proj.0.": "text_model.pre_LN."}
    prefixes |= {"text.proj.1.": "text_model.transformation.", "text.proj.2.": "text_projection."}
    pairs = [
        *vision_pairs(theirs.vision_config.num_hidden_layers),
        *same_pairs(state, prefixes),
    ]
    length = min(ALTCLIP_CONTEXT, text.max_position_embeddings - text.pad_token_id - 1)
    encoder = bert(text, "xlm-roberta", folder.tokenizer, context_length=length, projection="norm")
    return clip_config(theirs, folder.preprocessor, encoder), renamed(state, pairs, inwards=True)


def aimv2_or_groupvit(folder: Folder) -> Converted:
    """Convert an ``Aimv2Model`` or a ``GroupViTModel``: transformers' own encoders, which read CLIP's tokens."""
    groups, state = folder.values["model_type"] == "groupvit", folder.state
    theirs = complete("GroupViTConfig" if groups else "Aimv2Config", folder.values)
    image, text, dim = theirs.vision_config, theirs.text_config, theirs.projection_dim
    if groups:
        agree("projection_intermediate_dim", theirs.projection_intermediate_dim, GROUPVIT_RATIO * dim)
    else:
        agree("vision_config.use_head", image.use_head, True)
    if not groups or text.eos_token_id != 2:  # with which GroupViT reads the highest id
        agree("text_config.eos_token_id", text.eos_token_id, EOT_ID)
    agree("vision_config.num_channels", image.num_channels, 3)
    check_vocabulary(Path(folder.tokenizer))
    projection, inner = ("batch_norm", ("vision_model.", "text_model.")) if groups else ("linear", ("", ""))
    size = square("vision_config.image_size", image.image_size)
    length, model = text.max_position_embeddings, plain(text)
    ours = CLIPConfig(
        embed_dim=dim,
        image=HuggingFaceImageConfig(plain(image), size, projection),
        text=HuggingFaceTextConfig(folder.tokenizer, False, length, "end", projection, model=model),
        preprocessing=preprocessing_of(folder.preprocessor or {}, size, "CLIPImageProcessor"),
    )
    prefixes = {f"visual.encoder.{inner[0]}": "vision_model.", "visual.proj.": "visual_projection."}
    prefixes |= {f"text.transformer.{inner[1]}": "text_model.", "text.proj.": "text_projection."}
    return ours, renamed(state, same_pairs(state, {**prefixes, "logit_scale": "logit_scale"}), inwards=True)


def align(folder: Folder) -> Converted:
    """Convert an ``AlignModel``: transformers' own EfficientNet, and the first token of a BERT."""
    theirs = complete("AlignConfig", folder.values)
    image, text = theirs.vision_config, theirs.text_config
    agree("vision_config.num_channels", image.num_channels, 3)
    # The file has TensorFlow's momentum, the share of the old mean that stays.
    model = plain(image) | {"batch_norm_momentum": 1 - image.batch_norm_momentum}
    pixels = dict(folder.preprocessor or {})
    for name, usual in ALIGN_SCALE.items():
        agree(f"preprocessor {name}", pixels.get(name), usual)
    pixels |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    preprocessing = preprocessing_of(pixels, None, "SiglipImageProcessor")
    length = min(ALIGN_CONTEXT, text.max_position_embeddings)
    ours = CLIPConfig(
        embed_dim=theirs.projection_dim,
        image=HuggingFaceImageConfig(model, preprocessing.image_size, "none"),
        text=bert(text, "bert", folder.tokenizer, context_length=length, projection_bias=True),
        preprocessing=preprocessing,
    )
    state = {name: tensor for name, tensor in folder.state.items() if not name.startswith("text_model.pooler.")}
    temperature = state.pop("temperature")
    prefixes = {"visual.encoder.": "vision_model.", "text.transformer.": "text_model."}
    pairs = same_pairs(state, {**prefixes, "text.proj.": "text_projection."})
    return ours, {**renamed(state, pairs, inwards=True), "logit_scale": -temperature.float().log()}


# timm's vision transformer for images: EVA-CLIP 8B and 18B, and TIPSv2

EVA_SCALE = 100.0  # of similarities in the owner's examples; some files have no temperature
EVA_BASES = {1e-6: "vit_base_patch32_224", 1e-5: "vit_base_patch32_clip_224"}  # timm's models by their norms' epsilon
EVA_OTHERS = ("post_layernorm", "use_rope", "use_sub_ln", "use_swiglu_mlp")  # in the same owner's smaller models
EVA_CLASS = "vision_model.embeddings.class_embedding"


def eva_clip(folder: Folder) -> Converted:
    """Convert an ``EvaCLIPModel``; the weights say which of their layers have biases."""
    check_vocabulary(Path(folder.tokenizer))
    parts = {f"{part}_config": {"model_type": f"clip_{part}_model"} for part in ("text", "vision")}
    parts = {part: {"hidden_act": "gelu", **(folder.values.get(part) or {}), **kind} for part, kind in parts.items()}
    theirs = complete("CLIPConfig", {**folder.values, **parts, "model_type": "clip"})
    image, text, state = theirs.vision_config, theirs.text_config, dict(folder.state)
    agree("text_config.use_rms_norm", getattr(text, "use_rms_norm", False), False)
    for name in EVA_OTHERS:
        agree(f"text_config.{name}", getattr(text, name, False), False)
        agree(f"vision_config.{name}", getattr(image, name, False), False)
    rms, projection_bias = "vision_model.post_layernorm.bias" not in state, "visual_projection.bias" in state
    queries = [name for name in state if name.startswith("vision_model.") and name.endswith(".q_proj.bias")]
    for name in queries:  # a bias of keys adds the same to all scores of a query
        state[name.replace(".q_proj.", ".k_proj.")] = torch.zeros_like(state[name])
    state[EVA_CLASS] = state[EVA_CLASS][None]
    temperature = state.pop("logit_scale", torch.tensor(math.log(EVA_SCALE)))
    absent = [*([] if queries else ["q_proj.bias"]), *(["norm1.bias", "norm2.bias", "layernorm.bias"] if rms else [])]
    absent += [] if projection_bias else ["visual_projection.bias"]
    images = (pair for pair in eva_pairs(image.num_hidden_layers) if not pair[1][0].endswith(tuple(absent)))
    weights = renamed(state, chain(images, text_pairs(text.num_hidden_layers)), inwards=True)
    size = square("vision_config.image_size", image.image_size)
    crop = {"size": {"shortest_edge": size}, "crop_size": size}  # in the owner's examples; its folders have no file
    agree("vision_config.num_channels", image.num_channels, 3)
    agree("vision_config.use_rms_norm", getattr(image, "use_rms_norm", rms), rms)
    eps, known = image.layer_norm_eps, [1e-6] if rms else list(EVA_BASES)
    require(eps in known, f"vision_config.layer_norm_eps is {eps}; must be {' or '.join(map(str, known))}")
    options = timm_options(image) | {"qkv_bias": bool(queries), "pre_norm": False}
    options |= {"norm_layer": "rmsnorm"} if rms else {}
    ours = CLIPConfig(
        embed_dim=theirs.projection_dim,
        image=TimmConfig(EVA_BASES[eps], image_size=size, projection_bias=projection_bias, options=options),
        text=text_transformer(text),
        activation=activation("text_config.hidden_act", text.hidden_act),
        preprocessing=preprocessing_of(folder.preprocessor or crop, size, "CLIPImageProcessor"),
    )
    return ours, {**weights, "logit_scale": temperature}


def tipsv2(folder: Folder) -> Converted:
    """Convert a ``Tipsv2Model``: timm's DINOv2 with the first of two class tokens, and a transformers text encoder."""
    theirs, state = complete("Tipsv2Config", folder.values), folder.state
    image, text = theirs.vision_config, theirs.text_config
    for name, value in {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}.items():
        agree(f"vision_config.{name}", getattr(image, name), value)
    size, inner = square("vision_config.image_size", image.image_size), int(image.hidden_size * image.mlp_ratio)
    if image.use_swiglu_ffn:  # DINOv2's: two thirds of the width, a multiple of 8; timm counts both its parts
        inner = 2 * ((int(inner * 2 / 3) + 7) // 8 * 8)
    options = {
        "patch_size": square("vision_config.patch_size", image.patch_size),
        "embed_dim": image.hidden_size,
        "depth": image.num_hidden_layers,
        "num_heads": image.num_attention_heads,
        "mlp_ratio": ratio(inner, image.hidden_size),
        "reg_tokens": image.num_register_tokens,
    }
    kind = "giant" if image.use_swiglu_ffn else "base"
    model = {**(folder.values.get("text_config") or {}), "model_type": text.model_type, "vocab_size": text.vocab_size}
    length, usual = text.max_position_embeddings, {"do_normalize": False, "resample": 2}
    usual["size"] = {"height": size, "width": size}
    ours = CLIPConfig(
        embed_dim=image.hidden_size,
        image=TimmConfig(f"vit_{kind}_patch14_reg4_dinov2", False, size, "token", "none", options=options),
        text=HuggingFaceTextConfig(folder.tokenizer, False, length, pooling="mean", projection="none", model=model),
        preprocessing=preprocessing_of(usual | dict(folder.preprocessor or {}), size, "SiglipImageProcessor"),
    )
    texts = [
        *blocks(OPENAI_BLOCK, "text_encoder.transformer.resblocks", "text.transformer", text.num_hidden_layers),
        (["text_encoder.token_embedding.weight"], ["text.transformer.embeddings.token_embedding.weight"], "same"),
        (["text_encoder.ln_final.weight"], ["text.transformer.final_layer_norm.weight"], "same"),
        (["text_encoder.ln_final.bias"], ["text.transformer.final_layer_norm.bias"], "same"),
    ]
    of_texts = {name: tensor for name, tensor in state.items() if name.startswith("text_encoder.")}
    temperature = state.get("temperature", torch.tensor(theirs.temperature_init_value))  # published files have none
    return ours, {
        **_tipsv2_image(state),
        **renamed(of_texts, texts, inwards=False),
        "logit_scale": -temperature.float().log(),
    }


def _tipsv2_image(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    there = "vision_encoder."
    found = {name.removeprefix(there): tensor for name, tensor in state.items() if name.startswith(there)}
    found.pop("mask_token", None)
    positions = found["pos_embed"]  # of the class token too; timm adds it to that
    found |= {"cls_token": found["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:].contiguous()}
    found["reg_token"] = found.pop("register_tokens")
    # The last of each pair is transformers' name of what the owner's file calls the first.
    others = {".w12.": ".fc1.", ".w3.": ".fc2.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}
    for there, here in others.items():
        found = {name.replace(there, here): tensor for name, tensor in found.items()}
    return {f"visual.trunk.{name}": tensor for name, tensor in found.items()}
