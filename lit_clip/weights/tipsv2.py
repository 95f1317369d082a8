"""TIPSv2 in its published form: timm's DINOv2 with the first of two class tokens, and a transformers text encoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, TimmConfig
from lit_clip.weights.hugging_face_encoders import Converted, Folder, complete, ratio
from lit_clip.weights.hugging_face_keys import OPENAI_BLOCK, blocks, renamed
from lit_clip.weights.hugging_face_processor import agree, preprocessing_of, square


def read(folder: Folder) -> Converted:
    """Convert a ``Tipsv2Model``."""
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
        **_image(state),
        **renamed(of_texts, texts, inwards=False),
        "logit_scale": -temperature.float().log(),
    }


def _image(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the image encoder's weights under timm's names."""
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
