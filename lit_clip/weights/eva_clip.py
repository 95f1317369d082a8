"""EVA-CLIP 8B and 18B in their owner's form for transformers: a vision transformer of timm, CLIP's text encoder.

Names, settings and defaults follow ``modeling_evaclip.py`` and ``configuration_evaclip.py`` of BAAI/EVA-CLIP-8B-448.
"""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lit_clip.errors import require
from lit_clip.models.config import CLIPConfig, TimmConfig
from lit_clip.weights.hugging_face_encoders import Converted, Folder, activation, complete, ratio, text_transformer
from lit_clip.weights.hugging_face_keys import eva_pairs, renamed, text_pairs
from lit_clip.weights.hugging_face_processor import agree, check_vocabulary, preprocessing_of, square

SCALE = 100.0  # of similarities in the owner's examples; some files have no temperature
BASES = {1e-6: "vit_base_patch32_224", 1e-5: "vit_base_patch32_clip_224"}  # timm's models by their norms' epsilon
OTHERS = ("post_layernorm", "use_rope", "use_sub_ln", "use_swiglu_mlp")  # in the same owner's smaller models
CLASS = "vision_model.embeddings.class_embedding"


def read(folder: Folder) -> Converted:
    """Convert an ``EvaCLIPModel``; the weights say which of their layers have biases."""
    check_vocabulary(Path(folder.tokenizer))
    parts = {f"{part}_config": {"model_type": f"clip_{part}_model"} for part in ("text", "vision")}
    parts = {part: {"hidden_act": "gelu", **(folder.values.get(part) or {}), **kind} for part, kind in parts.items()}
    theirs = complete("CLIPConfig", {**folder.values, **parts, "model_type": "clip"})
    image, text, state = theirs.vision_config, theirs.text_config, dict(folder.state)
    agree("text_config.use_rms_norm", getattr(text, "use_rms_norm", False), False)
    for name in OTHERS:
        agree(f"text_config.{name}", getattr(text, name, False), False)
        agree(f"vision_config.{name}", getattr(image, name, False), False)
    rms, projection_bias = "vision_model.post_layernorm.bias" not in state, "visual_projection.bias" in state
    queries = [name for name in state if name.startswith("vision_model.") and name.endswith(".q_proj.bias")]
    for name in queries:  # a bias of keys adds the same to all scores of a query
        state[name.replace(".q_proj.", ".k_proj.")] = torch.zeros_like(state[name])
    state[CLASS] = state[CLASS][None]
    temperature = state.pop("logit_scale", torch.tensor(math.log(SCALE)))
    absent = [*([] if queries else ["q_proj.bias"]), *(["norm1.bias", "norm2.bias", "layernorm.bias"] if rms else [])]
    absent += [] if projection_bias else ["visual_projection.bias"]
    images = (pair for pair in eva_pairs(image.num_hidden_layers) if not pair[1][0].endswith(tuple(absent)))
    weights = renamed(state, chain(images, text_pairs(text.num_hidden_layers)), inwards=True)
    size = square("vision_config.image_size", image.image_size)
    crop = {"size": {"shortest_edge": size}, "crop_size": size}  # in the owner's examples; its folders have no file
    ours = CLIPConfig(
        embed_dim=theirs.projection_dim,
        image=_image(image, size, rms, qkv_bias=bool(queries), projection_bias=projection_bias),
        text=text_transformer(text),
        activation=activation("text_config.hidden_act", text.hidden_act),
        preprocessing=preprocessing_of(folder.preprocessor or crop, size, "CLIPImageProcessor"),
    )
    return ours, {**weights, "logit_scale": temperature}


def _image(theirs: Any, size: int, rms: bool, qkv_bias: bool, projection_bias: bool) -> TimmConfig:
    agree("vision_config.num_channels", theirs.num_channels, 3)
    agree("vision_config.use_rms_norm", getattr(theirs, "use_rms_norm", rms), rms)
    eps, known = theirs.layer_norm_eps, [1e-6] if rms else list(BASES)
    require(eps in known, f"vision_config.layer_norm_eps is {eps}; must be {' or '.join(map(str, known))}")
    options = {
        "patch_size": square("vision_config.patch_size", theirs.patch_size),
        "embed_dim": theirs.hidden_size,
        "depth": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "mlp_ratio": ratio(theirs.intermediate_size, theirs.hidden_size),
        "act_layer": activation("vision_config.hidden_act", theirs.hidden_act),
        "qkv_bias": qkv_bias,
        "pre_norm": False,
        **({"norm_layer": "rmsnorm"} if rms else {}),
    }
    return TimmConfig(BASES[eps], image_size=size, projection_bias=projection_bias, options=options)
