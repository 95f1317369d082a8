"""Translate models to open_clip's configuration; :mod:`lit_clip.models.open_clip_configs` does the opposite."""

from typing import Any

from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    ResNetConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    height_width,
)
from lit_clip.models.custom import custom_encoders
from lit_clip.models.open_clip_configs import POOLER, TEXT, TEXT_POOLERS, VISION


def open_clip_model(model: CLIP) -> dict[str, Any]:
    """Return a model's ``model_cfg``; its weights already have open_clip's names."""
    config = model.config
    for _, own in custom_encoders(config):
        raise InputError(f"open_clip has no encoder {own}; use onnx")
    quick = {activation == "quick_gelu" for activation in config.activations}
    require(len(quick) < 2, "open_clip has QuickGELU in both encoders or in none; use onnx")
    values: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": True in quick,
        "vision_cfg": _open_clip_vision(model),
        "text_cfg": _open_clip_text(config),
        "custom_text": not config.papers_layout,
    }
    if config.logit_bias:
        values["init_logit_bias"] = -10  # declares that there is one; the weights overwrite the value
    return values


def _open_clip_vision(model: CLIP) -> dict[str, Any]:
    image = model.config.image
    assert image.image_size is not None  # a model's config has all settings filled in
    height, width = height_width(image.image_size)
    size = {"image_size": height if height == width else [height, width]}
    if isinstance(image, ResNetConfig):
        require(height == width, f"open_clip has a ResNet of squares only, not {image.image_size}; use onnx")
        return {**size, "layers": list(image.layers), "width": image.width, "patch_size": None}
    if isinstance(image, TimmConfig):
        others = {name: value for name, value in image.options.items() if name != "drop_path_rate"}
        require(not model.visual.joined, f"open_clip has no pool {image.pool}; use onnx")
        require(not others, f"open_clip cannot pass {others} to timm's {image.timm}; use onnx")
        trunk: Any = model.visual.trunk
        pool = getattr(trunk.global_pool, "pool_type", trunk.global_pool)  # a module in convolutional networks
        return {
            **size,
            "timm_model_name": image.timm,
            "timm_model_pretrained": False,
            # An empty pool would mean no pooling at all if open_clip adds no projection of its own.
            "timm_pool": image.pool or (pool if image.projection in ("none", "classifier") else ""),
            "timm_proj": "" if image.projection == "classifier" else image.projection,
            "timm_proj_bias": image.projection_bias,
        }
    if not isinstance(image, VisionTransformerConfig):  # open_clip_model has refused those of your own
        raise InputError("open_clip has no image encoder of transformers; use onnx")
    entries = VISION | (POOLER if image.pool == "attention" else {})
    activation = image.activation or model.config.activation
    tanh = {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}
    usual = image.layer_norm_eps == VisionTransformerConfig.layer_norm_eps
    return {
        **size,
        **{theirs: getattr(image, ours) for theirs, (ours, _) in entries.items()},
        "head_width": image.width // image.heads,
        **tanh,
        **({} if usual else {"norm_kwargs": {"eps": image.layer_norm_eps}}),
        **({} if image.ln_pre else {"no_ln_pre": True}),
        **_POOLS[image.pool],
    }


_POOLS = {
    "class": {},
    "mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "attention": {"attentional_pool": True},
}


def _open_clip_text(config: CLIPConfig) -> dict[str, Any]:
    text = config.text
    values: dict[str, Any] = {"context_length": text.context_length}
    if text.tokenizer is not None:  # open_clip looks in the folder first
        stripped = {"strip_sep_token": True} if text.tokenizer.strip_sep_token else {}
        kwargs = {"clean": text.tokenizer.clean, **stripped}
        values |= {"hf_tokenizer_name": text.tokenizer.source, "tokenizer_kwargs": kwargs}
    if isinstance(text, HuggingFaceTextConfig):
        poolers: dict[str, str] = {ours: theirs for theirs, ours in TEXT_POOLERS.items()}
        require(text.pooling in poolers, f"open_clip has no pooling {text.pooling!r} for text; use onnx")
        known = text.projection in ("linear", "mlp") and not text.projection_bias
        require(known, f"open_clip has no projection {text.projection!r} after a Hugging Face encoder; use onnx")
        return {
            **values,
            "hf_model_name": text.hugging_face,
            "hf_model_pretrained": False,
            "hf_proj_type": text.projection,
            "hf_pooler_type": poolers[text.pooling],
        }
    assert isinstance(text, TextTransformerConfig)
    values |= {
        **{name: getattr(text, name) for name in TEXT},
        "norm_kwargs": {"eps": text.layer_norm_eps},
        "proj_type": "linear" if text.projection else "none",
        "proj_bias": text.projection_bias,
    }
    if (text.activation or config.activation) == "gelu_tanh":
        values["act_kwargs"] = {"approximate": "tanh"}
    if not text.causal:
        values["no_causal_mask"] = True
    if text.pool == "class":
        return {**values, "embed_cls": True}
    return {**values, "pool_type": text.pool, "eos_id": text.eos_id}
