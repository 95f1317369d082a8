"""Translate models to open_clip's configuration, and find the architecture of its training checkpoints.

These name none: it is that of ``params.txt``, or follows from the shapes. :mod:`lit_clip.models.open_clip_configs`
translates open_clip's configurations.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

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
from lit_clip.models.external_settings import with_external_settings
from lit_clip.models.open_clip_configs import (
    POOLER,
    TEXT,
    TEXT_POOLERS,
    VISION,
    from_open_clip,
    model_config,
    open_clip_names,
)
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import shortened

LONGEST = 65_536  # bytes of a params.txt that are read; open_clip's have 2,000


def run_architecture(path: Path, named: bool) -> tuple[CLIPConfig, str] | None:
    """Return the architecture with which a checkpoint's run was started, and its source.

    The checkpoint is ``NAME/checkpoints/epoch_1.pt`` or a copy beside ``params.txt``. A model that open_clip does not
    list is no error if the architecture is ``named`` otherwise.
    """
    for folder in (path.parent, path.parent.parent):
        params = _params(folder / "params.txt")
        if {"model", "force_quick_gelu"} <= params.keys():
            name, file = params["model"].replace("/", "-"), folder / "params.txt"
            if name in open_clip_names():
                with reading(file, "params.txt of open_clip"):
                    return _architecture(name, params, str(file)), f"{name} by {file.name}"
            put = "put a listed name in front, as NAME:PATH"
            copy = "copy the weights into a folder with the model's open_clip_config.json"
            listed = f"its {file.name} names {shortened(name)}, which open_clip does not list"
            require(named, f"{path}: {listed}; {put}, or {copy}")
    return None


def _params(file: Path) -> dict[str, str]:
    """Return the ``name: value`` lines of a run's settings, without unset ones; empty if there is no file."""
    if not file.is_file():
        return {}
    with reading(file, "params.txt"), file.open("rb") as opened:
        text = opened.read(LONGEST).decode(errors="replace")
    pairs = (line.partition(": ") for line in text.split("\n"))
    return {name: value.strip() for name, _, value in pairs if value.strip() not in ("", "None")}


def _architecture(name: str, params: Mapping[str, str], where: str) -> CLIPConfig:
    """Return the architecture as open_clip's trainer creates it (``open_clip_train.main``)."""
    model, tag, preprocess = model_config(name), params.get("pretrained", ""), dict[str, Any]()
    if tag and os.sep not in tag:
        from open_clip.pretrained import get_pretrained_cfg  # takes seconds

        known: dict[str, Any] = get_pretrained_cfg(name, tag)
        preprocess = {key: known.get(key) for key in ("mean", "std", "interpolation", "resize_mode")}
    if params["force_quick_gelu"] == "True":
        model["quick_gelu"] = True
    if params.get("siglip") == "True":
        model["init_logit_bias"] = -10
    if "force_image_size" in params:
        model["vision_cfg"]["image_size"] = json.loads(params["force_image_size"])
    if "force_context_length" in params:
        model["text_cfg"]["context_length"] = json.loads(params["force_context_length"])
    for key in ("mean", "std"):
        if f"image_{key}" in params:
            preprocess[key] = json.loads(params[f"image_{key}"])
    for key in ("interpolation", "resize_mode"):
        value = params.get(f"image_{key}")
        preprocess[key] = "bicubic" if value == "random" else value or preprocess.get(key)  # random in training only
    return with_external_settings(from_open_clip(model, preprocess, where))


def architecture_by_shapes(
    state: Mapping[str, Tensor], fits: Callable[[CLIPConfig], bool], name: str
) -> CLIPConfig | None:
    """Return the only open_clip model with weights of these names and shapes; None if there is none.

    ``fits`` returns whether all weights are those of an architecture; ``name`` is their source, for messages.
    """
    found = {
        model: config
        for model, config in _plausible(state)
        if isinstance(config.text, HuggingFaceTextConfig) or fits(config)  # whose sizes are on the hub
    }
    configs = list(found.values())
    if not configs:
        return None
    alone, first = f"{name}: has no params.txt of its run beside it", next(iter(found))
    advice = f"put the name of its model in front, as in {first}:{name}"
    same = all(config == configs[0] for config in configs)
    require(same, f"{alone}, and its weights fit {', '.join(found)}; {advice}")
    only = "the only model with its shapes in open_clip, with that model's activation and preprocessing"
    warnings.warn(f"{alone}; read as {first}, {only}", stacklevel=2)
    return with_external_settings(configs[0])


def _plausible(state: Mapping[str, Tensor]) -> Iterator[tuple[str, CLIPConfig]]:
    """Yield models with the sizes that a few of the weights have."""
    tokens = state.get("token_embedding.weight", state.get("text.token_embedding.weight"))
    patches, timm = state.get("visual.conv1.weight"), any(key.startswith("visual.trunk.") for key in state)
    for name in open_clip_names():
        model = model_config(name)
        vision, text = model["vision_cfg"], model["text_cfg"]
        layers, width, patch = (vision.get(*each) for each in (("layers", 12), ("width", 768), ("patch_size", 16)))
        expected = None if "hf_model_name" in text else (text.get("vocab_size", 49408), text.get("width", 512))
        if expected != (None if tokens is None else tuple(tokens.shape)) or timm != ("timm_model_name" in vision):
            continue
        if not timm and isinstance(layers, list):
            blocks = ("visual.layer1.0.conv1.weight", f"visual.layer3.{layers[2]}.conv1.weight")
        elif not timm and (patches is None or tuple(patches.shape) != (width, 3, patch, patch)):
            continue
        else:
            blocks = tuple(f"visual.transformer.resblocks.{index}.ln_1.weight" for index in (layers - 1, layers))
        if not timm and (blocks[0] not in state or blocks[1] in state):
            continue
        try:
            config = from_open_clip(model, None, name)
        except InputError:  # one that lit-clip does not support
            continue
        yield name, replace(config, logit_bias="logit_bias" in state)


def open_clip_model(model: CLIP) -> dict[str, Any]:
    """Return a model's ``model_cfg``; its weights already have open_clip's names."""
    config = model.config
    for own in config.own_encoders.values():
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
