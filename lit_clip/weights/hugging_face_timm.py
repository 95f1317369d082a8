"""Models of transformers with timm's vision transformer for images: EVA-CLIP 8B and 18B, and TIPSv2.

EVA-CLIP's names, settings and defaults follow ``modeling_evaclip.py`` and ``configuration_evaclip.py`` of
BAAI/EVA-CLIP-8B-448.
"""

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.weights.hugging_face_encoders import (
    Converted,
    Folder,
    activation,
    complete,
    ratio,
    text_transformer,
    timm_options,
)
from lit_clip.weights.hugging_face_keys import OPENAI_BLOCK, blocks, eva_pairs, renamed, text_pairs
from lit_clip.weights.hugging_face_processor import agree, check_vocabulary, preprocessing_of, square

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
